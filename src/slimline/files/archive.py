"""Zip files from anybody, read under limits: a list of members is only believed where every part of the file agrees.

A zip says twice what it holds, before each member and in a directory at its end, and readers differ in which they
believe. `read` takes a file only where both agree, members neither overlap nor leave gaps that hold anything, and
names are plain; checksums are verified whenever a member is read. `write` gives the same bytes for the same members.
"""

from __future__ import annotations

import io
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from slimline.basics.errors import SlimlineError
from slimline.files.atomic import replacing

EPOCH = (1980, 1, 1, 0, 0, 0)
MEMBERS = 100_000
"""Members that a file may have."""
FREE_BYTES, RATIO = 256 << 20, 100
"""What all members may unpack to: so many bytes, or so many times the file's size if that is more."""
_NAME = re.compile(r"[^\x00-\x1f\x7f\\:]{1,1000}")
_LOCAL = struct.Struct("<4s5H3I2H")
_ENCRYPTED = 0x0001 | 0x0040 | 0x2000
_DESCRIPTOR = 0x0008
_END = 22  # bytes of the record that closes an archive


class Damaged(Exception):
    """What is wrong with a file, in words that follow "it"; the reader of a format says which file it is."""


@dataclass(frozen=True)
class Archive:
    """A zip whose directory has been checked.

    Attributes
    ----------
    sizes : unpacked bytes by member name, in the order of the directory.
    places : by member name, where in the file its bytes begin, of members that are not deflated.
    """

    sizes: Mapping[str, int]
    places: Mapping[str, int] = field(repr=False)
    _zip: zipfile.ZipFile = field(repr=False)

    def read(self, name: str, limit: int | None = None) -> bytes:
        """The bytes of a member, checksum verified.

        Raises
        ------
        Damaged : there is none of that name, it is larger than `limit` bytes, or its bytes are not what was stored.
        """
        if name not in self.sizes:
            raise Damaged(f"lacks {name}")
        if limit is not None and self.sizes[name] > limit:
            raise Damaged(f"holds {name} of {self.sizes[name]:,} bytes, where {limit:,} are allowed")
        with self.open(name) as stream:
            try:
                content = stream.read(self.sizes[name] + 1)
            except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError) as reason:
                raise Damaged(f"holds {name} with other bytes than its checksum says") from reason
        if len(content) != self.sizes[name]:
            raise Damaged(f"holds {name} of another size than it says")
        return content

    def open(self, name: str) -> IO[bytes]:
        """A member as a stream, which ends where its size says."""
        try:
            return self._zip.open(name)
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, KeyError, OSError) as reason:
            raise Damaged(f"holds {name}, which cannot be read") from reason


def read(source: Path | bytes, packed: bool = False) -> Archive:
    """The checked archive in a file or in memory.

    Parameters
    ----------
    packed : whether members may be deflated; by default they are stored as they are.

    Raises
    ------
    Damaged : no zip, one that contradicts itself, or one that slimline does not read: encrypted members, links,
        folders, other compressions, names that are twice there, absolute, lead out of the archive, or differ only in
        case; or members that unpack to far more than the file's size.
    """
    try:
        stream: IO[bytes] = io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")
        archive = zipfile.ZipFile(stream)
        size = stream.seek(0, os.SEEK_END)
        infos = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, struct.error, NotImplementedError, UnicodeDecodeError) as reason:
        raise Damaged("is no zip archive, or a damaged one") from reason
    if len(infos) > MEMBERS:
        raise Damaged(f"has {len(infos):,} members, where {MEMBERS:,} are allowed")
    _check_names(infos)
    for info in infos:
        _check_kind(info, packed)
    unpacked = sum(i.file_size for i in infos)
    if unpacked > max(FREE_BYTES, RATIO * size):
        raise Damaged(f"unpacks to {unpacked:,} bytes from {size:,}: write it without compression")
    starts = _check_layout(archive, infos, stream)
    plain = {i.filename: starts[i.filename] for i in infos if i.compress_type == zipfile.ZIP_STORED}
    return Archive({i.filename: i.file_size for i in infos}, plain, archive)


def _check_names(infos: Iterable[zipfile.ZipInfo]) -> None:
    seen: set[str] = set()
    for info in infos:
        name = info.filename
        parts = name.split("/")
        if name != info.orig_filename or not _NAME.fullmatch(name) or any(p in ("", ".", "..") for p in parts):
            raise Damaged(f"names a member {name[:80]!r}, which is no plain path in it")
        if name.casefold() in seen:
            raise Damaged(f"has two members named {name[:80]!r}")
        seen.add(name.casefold())


def _check_kind(info: zipfile.ZipInfo, packed: bool) -> None:
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        raise Damaged(f"holds {info.filename[:80]!r}, which is a link or no ordinary file")
    if info.flag_bits & _ENCRYPTED:
        raise Damaged(f"holds {info.filename[:80]!r} encrypted")
    allowed = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) if packed else (zipfile.ZIP_STORED,)
    if info.compress_type not in allowed:
        raise Damaged(f"holds {info.filename[:80]!r} in a compression that is not read")
    if info.compress_type == zipfile.ZIP_STORED and info.file_size != info.compress_size:
        raise Damaged(f"gives two sizes for {info.filename[:80]!r}")


def _check_layout(archive: zipfile.ZipFile, infos: Iterable[zipfile.ZipInfo], stream: IO[bytes]) -> dict[str, int]:
    """Where the bytes of each member begin. Members lie one behind the other from the first byte to the directory, and
    each says what the directory does."""
    starts = {}
    stream.seek(-_END, os.SEEK_END)
    if archive.comment or stream.read(4) != b"PK\x05\x06":
        raise Damaged("has bytes that belong to no member behind its directory")
    end = 0
    for info in sorted(infos, key=lambda i: i.header_offset):
        if info.header_offset != end:
            raise Damaged(f"has bytes that belong to no member, or members that overlap, at {info.filename[:80]!r}")
        stream.seek(info.header_offset)
        header = stream.read(_LOCAL.size)
        if len(header) < _LOCAL.size or header[:4] != b"PK\x03\x04":
            raise Damaged(f"has no header for {info.filename[:80]!r}")
        _, _, flags, method, _, _, crc, packed, size, name_length, extra_length = _LOCAL.unpack(header)
        name = stream.read(name_length)
        extra = stream.read(extra_length)
        starts[info.filename] = info.header_offset + _LOCAL.size + name_length + extra_length
        end = starts[info.filename] + info.compress_size
        if flags & _DESCRIPTOR:
            for early, listed in ((crc, info.CRC), (packed, info.compress_size), (size, info.file_size)):
                if early not in (0, listed, 0xFFFFFFFF):
                    raise Damaged(f"says two things of {info.filename[:80]!r}")
            stream.seek(end)
            crc, packed, size, length = _descriptor(stream.read(24), info)
            end += length
        elif 0xFFFFFFFF in (packed, size):
            size, packed = _wide(extra, size, packed)
        encoding = "utf-8" if flags & 0x800 else "cp437"
        local_header = (name, flags & ~0x6, method, crc, packed, size)
        directory_entry = info.filename.encode(encoding, "replace"), info.flag_bits & ~0x6, info.compress_type
        if local_header != (*directory_entry, info.CRC, info.compress_size, info.file_size):
            raise Damaged(f"says two things of {info.filename[:80]!r}")
    if end != archive.start_dir:
        raise Damaged("has bytes that belong to no member before its directory")
    return starts


def _descriptor(tail: bytes, info: zipfile.ZipInfo) -> tuple[int, int, int, int]:
    """Checksum, packed and unpacked size that follow a member, and the length of that note: four forms are in use."""
    listed = (info.CRC, info.compress_size, info.file_size)
    for mark in (b"PK\x07\x08", b""):
        for form in ("<III", "<IQQ"):
            length = len(mark) + struct.calcsize(form)
            if tail.startswith(mark) and len(tail) >= length:
                fields = struct.unpack(form, tail[len(mark) : length])
                following = tail[length : length + 2]
                if fields == listed and following in (b"PK", b""):
                    return (*listed, length)
    raise Damaged(f"says two things of {info.filename[:80]!r}")


def _wide(extra: bytes, size: int, packed: int) -> tuple[int, int]:
    """Sizes of a member of more than four gigabytes, which stand in an extra field."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1 and length >= 16 and at + 20 <= len(extra):
            wide = struct.unpack_from("<QQ", extra, at + 4)
            return (wide[0] if size == 0xFFFFFFFF else size), (wide[1] if packed == 0xFFFFFFFF else packed)
        at += 4 + length
    return size, packed


def write(path: Path, members: Mapping[str, bytes]) -> None:
    """Write a zip of stored members atomically; the same members in the same order give the same bytes.

    Raises
    ------
    SlimlineError : the place cannot be written to, or is full.
    """
    try:
        with replacing(path) as part, part.open("xb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                for name, content in members.items():
                    archive.writestr(zipfile.ZipInfo(name, EPOCH), content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as reason:
        raise SlimlineError(
            f"Cannot write {path} ({reason.strerror}): choose a place that can be written to."
        ) from reason
