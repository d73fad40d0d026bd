"""Example inputs in files of `torch.export.save`: a pickle, of which only plain tensors are understood.

No unpickler is involved. `read` walks the opcodes itself, on a stack of its own, and knows three names, which it never
looks up: how torch rebuilds a tensor, its kinds of storage, and an ordered dict.
"""

from __future__ import annotations

import math
import pickletools
from typing import Any

import numpy as np

from slimline.files import archive
from slimline.files.archive import Archive, Damaged
from slimline.frameworks.base import Array

OPCODES, DEPTH = 20_000, 64
_STORAGES = {
    "FloatStorage": "f4",
    "DoubleStorage": "f8",
    "HalfStorage": "f2",
    "LongStorage": "i8",
    "IntStorage": "i4",
    "ShortStorage": "i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}
_REBUILD, _TYPED, _ORDERED = "torch._utils _rebuild_tensor_v2", "torch._tensor _rebuild_from_type_v2", "OrderedDict"
_KNOWN = {
    **{name: name for name in (_REBUILD, _TYPED, "torch Tensor")},
    "collections OrderedDict": _ORDERED,
    "torch.nn.parameter Parameter": "torch Tensor",
    **{f"torch {name}": name for name in _STORAGES},
}


class NotPlain(Exception):
    """The pickle holds something else than tensors."""


class _Name(str):
    """A name that the pickle mentions."""


_MARK = _Name("mark")


def read(content: bytes) -> tuple[Array, ...]:
    """The tensors of a pickled ``((tensor, …), {})``, as arrays.

    Raises
    ------
    NotPlain : anything else.
    """
    try:
        held = archive.read(content)
        (pickle,) = [name for name in held.sizes if name.endswith("/data.pkl")]
        return _Reader(held, pickle.removesuffix("data.pkl")).tensors(held.read(pickle, 1 << 20))
    except NotPlain:
        raise
    except (Damaged, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as reason:
        raise NotPlain from reason


class _Reader:
    def __init__(self, held: Archive, folder: str) -> None:
        self._held, self._folder = held, folder
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def tensors(self, pickle: bytes) -> tuple[Array, ...]:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(pickle)):
            if count > OPCODES:
                raise NotPlain
            if opcode.name == "STOP":
                break
            self._step(opcode.name, argument)
        match self._stack:
            case [(tuple() as inputs, dict() as keywords)] if not keywords:
                if inputs and all(isinstance(x, np.ndarray) for x in inputs):
                    return inputs
        raise NotPlain

    def _step(self, opcode: str, argument: Any) -> None:
        stack = self._stack
        match opcode:
            case "PROTO" | "FRAME":
                pass
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                self._memo[int(argument)] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(self._memo[int(argument)])
            case "GLOBAL":
                stack.append(_Name(_KNOWN[argument]))
            case "MARK":
                stack.append(_MARK)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINUNICODE" | "SHORT_BINUNICODE" | "BINFLOAT":
                stack.append(argument)
            case "EMPTY_TUPLE" | "EMPTY_DICT" | "EMPTY_LIST":
                stack.append({"EMPTY_TUPLE": (), "EMPTY_DICT": {}, "EMPTY_LIST": []}[opcode])
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode[-1])
                taken = tuple(stack[-count:])
                if len(taken) != count or any(x is _MARK for x in taken):
                    raise NotPlain
                stack[-count:] = [taken]
            case "TUPLE":
                stack.append(tuple(self._marked()))
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                stack[-1][key] = value
            case "SETITEMS":
                pairs = self._marked()
                stack[-1].update(zip(pairs[::2], pairs[1::2], strict=True))
            case "APPENDS":
                items = self._marked()
                stack[-1].extend(items)
            case "BINPERSID":
                stack.append(self._storage(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_call(function, arguments))
            case _:
                raise NotPlain

    def _marked(self) -> list[Any]:
        taken: list[Any] = []
        while (item := self._stack.pop()) is not _MARK:
            taken.append(item)
        return taken[::-1]

    def _storage(self, told: Any) -> Array:
        kind, storage, key, device, count = told
        if kind != "storage" or not isinstance(storage, _Name) or device != "cpu" or not str(key).isdecimal():
            raise NotPlain
        numbers = np.frombuffer(self._held.read(f"{self._folder}data/{key}"), _STORAGES[storage])
        if len(numbers) != count:
            raise NotPlain
        return numbers


def _call(function: Any, arguments: Any) -> Any:
    if not isinstance(function, _Name):
        raise NotPlain
    if function == _ORDERED and arguments == ():
        return {}
    if function == _TYPED:
        inner, _, parts, _ = arguments
        return _call(inner, parts)
    if function == _REBUILD:
        return _array(*arguments)
    raise NotPlain


def _array(numbers: Any, offset: Any, sizes: Any, strides: Any, *_: Any) -> Array:
    if not isinstance(numbers, np.ndarray) or numbers.ndim != 1 or len(sizes) != len(strides) or len(sizes) > DEPTH:
        raise NotPlain
    if any(type(n) is not int or not 0 <= n < 2**48 for n in (offset, *sizes, *strides)):
        raise NotPlain
    count = math.prod(sizes)
    reach = offset + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True)) + 1 if count else 0
    if reach > len(numbers) or count > len(numbers):
        raise NotPlain
    steps = tuple(step * numbers.itemsize for step in strides)
    return np.lib.stride_tricks.as_strided(numbers[offset:], sizes, steps).copy()
