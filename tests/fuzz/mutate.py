"""Seeded damage to bytes, JSON values and zip archives: what hostile and broken files look like.

``for content in mutations(original, seed, count)`` gives `count` damaged copies of a file; the same seed gives the same
copies. `damaged_json` and `damaged_bytes` do one piece of damage to a value or to bytes, for formats of one's own.
"""

from __future__ import annotations

import io
import json
import random
import resource
import struct
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

_EDGES = (0, 1, 2, 7, 127, 128, 255)
_ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**10, 10**18, int("9" * 30), 0.5, -0.0, 1e308),
    *("", "a", "..", "/etc/passwd", "__import__('os')", 'x"; import os #', "\x00", "é" * 50, "x" * 5000, "NaN"),
    *([], {}, [[]], {"a": {}}, [1, "a", None], {"class_name": "Lambda", "config": {}}),
)
_RAW = (b"NaN", b"Infinity", b"1" * 5000, b"[" * 3000 + b"]" * 3000, b"1e999", b'"\\ud800"', b'{"a":1,"a":2}', b"")


def damaged_bytes(content: bytes, rng: random.Random) -> bytes:
    """`content` with a few bytes flipped, cut, doubled, moved or filled in."""
    data = bytearray(content)
    kind = rng.randrange(6)
    if not data:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(1, 20)))
    at = rng.randrange(len(data))
    length = rng.randrange(1, 1 + min(64, len(data) - at))
    if kind == 0:
        for _ in range(rng.randrange(1, 8)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        del data[at : at + length]
    elif kind == 3:
        data[at:at] = data[at : at + length] * rng.randrange(1, 4)
    elif kind == 4:
        data[at : at + length] = bytes(rng.choice(_EDGES) for _ in range(length))
    else:
        other = rng.randrange(len(data))
        data[at : at + length] = data[other : other + length]
    return bytes(data)


def damaged_json(value: Any, rng: random.Random) -> Any:
    """A copy of a JSON value in which one or two parts are odd, missing, doubled or another's."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2))):
        places = list(_places(value))
        if not places:
            return rng.choice(_ODD)
        holder, key = rng.choice(places)
        kind = rng.randrange(5)
        if kind < 2:
            holder[key] = json.loads(json.dumps(rng.choice(_ODD)))
        elif kind == 2 and isinstance(holder, dict):
            part = holder.pop(key)
            if rng.random() < 0.5:
                holder[rng.choice((key.upper(), key + "x", "module", "class_name", "a.b", ""))] = part
        elif kind == 3:
            other, name = rng.choice(places)
            if name in other if isinstance(other, dict) else name < len(other):
                holder[key] = json.loads(json.dumps(other[name]))
        elif isinstance(holder, list):
            holder.insert(key, json.loads(json.dumps(holder[key])))
        elif isinstance(holder[key], (int, float)) and not isinstance(holder[key], bool):
            holder[key] = holder[key] * rng.choice((-1, 10**6, 2, 0)) + rng.choice((0, 1, -1))
        else:
            del holder[key]
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield value, key
            yield from _places(part)
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield value, index
            yield from _places(part)


def damaged_text(content: bytes, rng: random.Random) -> bytes:
    """JSON text with a damaged value, or with what JSON does not have; other text with damaged bytes."""
    try:
        value = json.loads(content)
    except ValueError:
        return damaged_bytes(content, rng)
    if rng.random() < 0.1:
        return rng.choice(_RAW)
    text = json.dumps(damaged_json(value, rng)).encode()
    if rng.random() < 0.1:
        numbers = [i for i in range(len(text)) if text[i : i + 1].isdigit()]
        if numbers:
            at = rng.choice(numbers)
            text = text[:at] + rng.choice(_RAW) + text[at + 1 :]
    return text


def damaged_zip(content: bytes, rng: random.Random, nested: Callable[[str], bool] = lambda name: False) -> bytes:
    """A zip, its checksums right, with a member damaged, renamed, doubled, left out, added or exchanged."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    at = rng.randrange(len(members))
    name, held = members[at]
    kind = rng.randrange(10)
    if kind < 6:
        texts = [i for i, (n, _) in enumerate(members) if n.endswith(".json")]
        at = rng.choice(texts) if texts and rng.random() < 0.7 else at
        name, held = members[at]
        damage = damaged_zip if nested(name) else damaged_text if name.endswith(".json") else damaged_bytes
        members[at] = (name, damage(held, rng))
    elif kind == 6:
        odd = (name + "x", name.upper(), "/" + name, "../" + name, name.replace("/", "\\"), "a/" + name, name + ".pkl")
        members[at] = (rng.choice(odd), held)
    elif kind == 7:
        members.insert(rng.randrange(len(members)), (name, damaged_bytes(held, rng)))
    elif kind == 8:
        del members[at]
    else:
        other = rng.randrange(len(members))
        members[at] = (name, members[other][1])
    buffer = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if rng.random() < 0.05 else zipfile.ZIP_STORED
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", method) as archive:
        warnings.simplefilter("ignore")  # of names that are twice there, which is meant
        for member, data in members:
            archive.writestr(zipfile.ZipInfo(member), data, method)
    return buffer.getvalue()


def damaged_safetensors(content: bytes, rng: random.Random) -> bytes:
    """Safetensors with a damaged header of the right length."""
    (length,) = struct.unpack_from("<Q", content)
    header = damaged_text(content[8 : 8 + length], rng)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def damaged_onnx(content: bytes, rng: random.Random) -> bytes:
    """An ONNX message with a damaged field, as far as protobuf still takes it."""
    import onnx
    from google.protobuf import json_format

    value = json_format.MessageToDict(onnx.ModelProto.FromString(content))
    try:
        return json_format.ParseDict(damaged_json(value, rng), onnx.ModelProto()).SerializeToString()
    except (json_format.ParseError, ValueError, TypeError):
        return damaged_bytes(content, rng)


def mutations(
    content: bytes, seed: int, count: int, structured: Callable[[bytes, random.Random], bytes] = damaged_zip
) -> Iterator[bytes]:
    """`count` damaged copies of a file: most of them inside its structure, the others in its bytes."""
    for index in range(count):
        rng = random.Random(zlib.crc32(f"{seed}/{index}".encode()))
        yield structured(content, rng) if rng.random() < 0.8 else damaged_bytes(content, rng)


def outcome(read: Callable[[], Any], refusal: type[Exception], seconds: float = 10.0, megabytes: float = 400.0) -> str:
    """``"read"`` or ``"refused"``; anything else, or more of the processor or of new memory than that, is an error."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        read()
        result = "read"
    except refusal as error:
        assert "\n" not in str(error) and len(str(error)) < 1500, str(error)
        result = "refused"
    taken = time.process_time() - started
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3
    assert taken < seconds, f"{taken:.1f} s"
    assert grown < megabytes, f"{grown:.0f} MB"
    return result
