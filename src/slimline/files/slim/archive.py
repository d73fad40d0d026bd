"""The container: which bytes of a file are arrays, their codes, everything else deflated, and checksums of both.

::

    "SLIM", version (1 byte), length of the header (4 bytes, little-endian)
    header: JSON, see `Header`
    what is in no array, deflated
    the arrays, see `slimline.files.slim.arrays`
    SHA-256 of all before

A file comes back byte for byte. What an archive says of sizes is bounded before anything is allocated, and held against
the bytes that are there; what it gives is compared with the checksum of the file that was packed.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from slimline.basics.errors import SlimlineError
from slimline.files import json_models
from slimline.files.slim import arrays
from slimline.files.slim.arrays import Grid
from slimline.files.strictjson import Malformed

SUFFIX = ".slim"
VERSION = 1
FREE_BYTES, RATIO = 64 << 20, 1000
"""What an archive may unpack to: so many bytes, or so many times its size if that is more."""
LONGEST_HEADER = 16 << 20
_MAGIC = b"SLIM"
_START = struct.Struct("<4sBI")
_DIGEST = 32

Size = Annotated[int, Field(ge=0, lt=2**48)]


@dataclass(frozen=True)
class Span:
    """Where in a file an array lies.

    Attributes
    ----------
    at : of its first byte.
    shape, width : of the array, and the bytes of its numbers, which lie in C order, little-endian.
    grids : that it may lie on.
    """

    at: int
    shape: tuple[int, ...]
    width: int
    grids: Sequence[Grid] = field(default=(), compare=False)

    @property
    def size(self) -> int:
        """In bytes."""
        size = self.width
        for n in self.shape:
            size *= n
        return size


class Part(BaseModel):
    """A coded array: where in the file it is, its bytes there, and those of one number."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    at: Size
    size: Size
    width: Literal[1, 2, 4, 8]


class Header(BaseModel):
    """What an archive says of itself.

    Attributes
    ----------
    suffix : of the file's name.
    size, sha256 : of the file.
    rest : bytes that all that is in no array takes, deflated.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    suffix: Annotated[str, Field(pattern=r"^\.[a-z0-9]{1,12}$")]
    size: Size
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    rest: Size
    parts: tuple[Part, ...]


def pack(content: bytes, suffix: str, spans: Sequence[Span]) -> bytes:
    """The archive of a file; of the same file the same bytes.

    Parameters
    ----------
    spans : its arrays, as far as they are known; what overlaps another is no array.
    """
    parts, codes, rest, end = [], [], [], 0
    for span in sorted(spans, key=lambda span: span.at):
        if span.at < end or span.at + span.size > len(content):
            continue
        numbers = content[span.at : span.at + span.size]
        code = arrays.encode(numbers, span.shape, span.width, span.grids)
        if code is None:
            continue
        parts.append(Part(at=span.at, size=span.size, width=span.width))  # type: ignore[arg-type]
        codes.append(code)
        rest.append(content[end : span.at])
        end = span.at + span.size
    rest.append(content[end:])
    deflated = zlib.compress(b"".join(rest), 9)
    header = Header(
        suffix=suffix,
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        rest=len(deflated),
        parts=tuple(parts),
    )
    text = header.model_dump_json().encode()
    body = b"".join((_START.pack(_MAGIC, VERSION, len(text)), text, deflated, arrays.written(codes)))
    archive = body + hashlib.sha256(body).digest()
    if unpack(archive, "the archive")[1] != content:
        raise SlimlineError("The model cannot be packed: its archive does not give it back; report this to slimline.")
    return archive


def read_header(archive: bytes, where: str) -> tuple[Header, int]:
    """What an archive says of itself, and where its header ends.

    Raises
    ------
    SlimlineError : no archive, one of another version, a damaged one, or one that says what cannot be so.
    """
    if len(archive) < _START.size + _DIGEST or archive[:4] != _MAGIC:
        raise SlimlineError(f"{where} is no {SUFFIX} archive: give one that slimline pack wrote.")
    _, version, length = _START.unpack_from(archive)
    if version != VERSION:
        raise SlimlineError(
            f"{where} is of version {version} of {SUFFIX} archives, and this slimline reads {VERSION}: "
            "unpack it with the slimline that wrote it, or a newer one."
        )
    if hashlib.sha256(archive[:-_DIGEST]).digest() != archive[-_DIGEST:]:
        raise json_models.damaged(where, "its bytes are not those that were written")
    end = _START.size + length
    if length > LONGEST_HEADER or end > len(archive) - _DIGEST:
        raise json_models.damaged(where, "its header is longer than it may be")
    header = json_models.validate(Header, archive[_START.size : end], where)
    if header.size > max(FREE_BYTES, RATIO * len(archive)):
        raise json_models.damaged(where, f"it unpacks to {header.size:,} bytes from {len(archive):,}")
    if header.rest > len(archive) - _DIGEST - end:
        raise json_models.damaged(where, "it holds fewer bytes than it says")
    return header, end


def unpack(archive: bytes, where: str) -> tuple[Header, bytes]:
    """The header and the file that was packed, `where` names the archive in messages.

    Raises
    ------
    SlimlineError : as of `read_header`; codes that are none, or that give other bytes than were packed.
    """
    header, at = read_header(archive, where)
    view = memoryview(archive)
    try:
        end = 0
        for part in header.parts:
            if part.at < end or part.at + part.size > header.size:
                raise Malformed("holds arrays that overlap, or lie outside of the file")
            end = part.at + part.size
        rest = memoryview(_inflated(view[at : at + header.rest], header.size - sum(p.size for p in header.parts)))
        coded = view[at + header.rest : -_DIGEST]
        pieces: list[bytes | memoryview] = []
        end = taken = 0
        decoded = arrays.read(coded, [(part.size, part.width) for part in header.parts])
        for part, content in zip(header.parts, decoded, strict=True):
            before = part.at - end
            pieces += [rest[taken : taken + before], content]
            taken, end = taken + before, part.at + part.size
        whole = b"".join((*pieces, rest[taken:]))
    except Malformed as reason:
        raise json_models.damaged(where, f"it {reason}") from reason
    except MemoryError as reason:
        raise SlimlineError(f"There is not enough memory to unpack {where}: close other programs.") from reason
    if len(whole) != header.size or hashlib.sha256(whole).hexdigest() != header.sha256:
        raise json_models.damaged(where, "it does not give the file that was packed")
    return header, whole


def _inflated(deflated: memoryview, size: int) -> bytes:
    """The `size` bytes that were deflated."""
    if size < 0:
        raise Malformed("holds arrays of more bytes than the file has")
    inflater = zlib.decompressobj()
    try:
        content = inflater.decompress(deflated, size + 1)
    except zlib.error as reason:
        raise Malformed("holds bytes that cannot be inflated") from reason
    if len(content) != size or not inflater.eof or inflater.unused_data or inflater.unconsumed_tail:
        raise Malformed("holds other bytes beside its arrays than it says")
    return content


def read(path: Path) -> bytes:
    """The bytes of an archive.

    Raises
    ------
    SlimlineError : no such file, or one that cannot be read.
    """
    if not path.is_file():
        raise SlimlineError(f"There is no file {path}: check the path.")
    try:
        return path.read_bytes()
    except OSError as reason:
        raise SlimlineError(f"{path} cannot be read ({reason.strerror or reason}): check the file.") from reason
