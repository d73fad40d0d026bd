"""How Core ML holds weights: integers with scales in blocks, palettes, bits that tell what is not zero, or several.

Of all ways that give a weight exactly the smallest is taken. `Stored` is one of them, as arrays; `constexpr` writes it
into a program of coremltools. Codes are the model's own; scales and levels are rounded to the program's precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from slimline.methods.formats import Blocks, FloatFormat, Format, IntegerGrid, Levels, Masked, Scaled, spread

Array = np.ndarray[Any, np.dtype[Any]]

_NAMESPACE = "slimline"
_MULTIPLIES = frozenset({"conv", "conv_transpose", "linear", "matmul", "gather"})
"""Operators of Core ML whose weights may be decoded from something."""
_HEADER = 512
"""Bits that the file of weights spends on each array besides its content."""
_WIDTHS = (1, 2, 3, 4, 6, 8)
"""Of places in a palette."""
_LEGACY_WIDTHS = (1, 2, 4, 6, 8)
"""The same before iOS 18."""
_MOST, _SOME = 256, 1024
"""Numbers that a palette may hold, and as many of a weight's as mostly show that it has more."""
_SHORT_FLOATS = ("float8_e4m3fn", "float8_e5m2")


@dataclass(frozen=True, eq=False)
class Stored:
    """A weight: ``scale * (data - offset)``, or ``scale * levels[data]``, where `mask` is set, and zero elsewhere.

    Attributes
    ----------
    data : of the weight's shape: integers, places in `levels`, or the real numbers themselves.
    kind : the type of its numbers in the file: ``int4``, ``uint3``, ``float16``, …
    real : the type of decoded numbers, ``float16`` or ``float32``.
    levels : float32, of the weight's dimensions, 1 where one palette serves all, and one more for the levels.
    scale : float32, of the weight's dimensions, each of which its sizes divide; None for 1.
    offset : integers of `kind`, the shape of `scale`; None for 0.
    mask : bool, of the weight's shape; None where all is stored.
    """

    data: Array
    kind: str
    real: str
    levels: Array | None = None
    scale: Array | None = None
    offset: Array | None = None
    mask: Array | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is stored as it is used."""
        return self.mask is None and self.kind.startswith("float")

    @property
    def bits(self) -> int:
        """What it takes in the file."""
        width, real = _width(self.kind), _width(self.real)
        count = self.data.size if self.mask is None else int(self.mask.sum())
        sides = ((self.levels, real), (self.scale, real), (self.offset, width), (self.mask, 1))
        rest = [array.size * each + _HEADER for array, each in sides if array is not None]
        return count * width + _HEADER + sum(rest)

    @property
    def legacy(self) -> bool:
        """Whether iOS 17 has it: one form at a time, in 8 bits with scales along one dimension, or one palette."""
        if self.kind.startswith("float"):
            return True
        if self.mask is not None:
            return False
        if self.levels is not None:
            one = self.levels.size == self.levels.shape[-1]
            return one and self.scale is None and _width(self.kind) in _LEGACY_WIDTHS
        assert self.scale is not None
        several = [d for d, n in enumerate(self.scale.shape) if n > 1]
        whole = all(self.scale.shape[d] == self.data.shape[d] for d in several)
        return _width(self.kind) == 8 and whole and len(several) < 2

    def values(self) -> Array:
        """The weight, float32."""
        shape = self.data.shape
        if self.levels is not None:
            rows = _spread(self.levels, (*shape, self.levels.shape[-1]))
            values = np.take_along_axis(rows, self.data[..., None].astype(np.int64), -1)[..., 0]
        else:
            values = self.data.astype(np.float32)
        if self.offset is not None:
            values = values - _spread(self.offset.astype(np.float32), shape)
        if self.scale is not None:
            values = values * _spread(self.scale, shape)
        return values if self.mask is None else np.where(self.mask, values, np.float32(0))

    def laid(self, shape: Sequence[int], turned: bool) -> Stored:
        """The same for a weight whose two dimensions are `turned`, or that has more or fewer dimensions of size 1."""

        def one(array: Array) -> Array:
            if turned:
                return np.ascontiguousarray(np.moveaxis(array, 0, 1))
            rank = self.data.ndim
            long = iter([n for n, size in zip(array.shape[:rank], self.data.shape, strict=True) if size != 1])
            sizes = [1 if size == 1 else next(long) for size in shape]
            return array.reshape(*sizes, *array.shape[rank:])

        levels, scale, offset, mask = (
            None if array is None else one(array) for array in (self.levels, self.scale, self.offset, self.mask)
        )
        return replace(self, data=one(self.data), levels=levels, scale=scale, offset=offset, mask=mask)


def smallest(weight: Array, each: Format | None, real: str, legacy: bool) -> Stored:
    """The smallest of all ways to hold exactly a weight.

    Parameters
    ----------
    weight : float32.
    each : its format; None where nothing is known but its numbers.
    real : the precision of the program, ``float16`` or ``float32``.
    legacy : whether it has to be one that iOS 17 has.
    """
    ways = _of_numbers(weight, real, legacy) if each is None else _of_format(weight, each, real, legacy)
    plain = Stored(weight, real, real)
    return min([plain, *(way for way in ways if way.legacy or not legacy)], key=lambda way: way.bits)


def can_store(each: Format, real: str, legacy: bool) -> bool:
    """Whether there is a way for weights of a format that is smaller than to store them plainly."""
    if isinstance(each, Masked):
        return not legacy and can_store(each.inner, real, legacy)
    if isinstance(each, FloatFormat):
        if each.dtype == "float16":
            return each.is_plain and real == "float16"
        return each.dtype in _SHORT_FLOATS and (each.per_tensor or not legacy)
    if isinstance(each, IntegerGrid):
        return each.bits <= 8 and (not legacy or each.per_tensor or each.axis is not None)
    if not isinstance(each, Levels) or each.codebook.size > 256:
        return False
    return not legacy or each.per_tensor or (each.axis is not None and each.grid is not None)


def container(each: Format, legacy: bool) -> int:
    """Bits that a code takes in the file."""
    if isinstance(each, Masked):
        return container(each.inner, legacy)
    if isinstance(each, FloatFormat):
        return each.code_bits
    if legacy and not (isinstance(each, Scaled) and each.per_tensor):
        return 8
    if isinstance(each, IntegerGrid) and (each.zero_point is not None or each.bits in (4, 8)):
        return 8 if each.bits > 4 or legacy else 4
    return _fitting(2**each.code_bits, _LEGACY_WIDTHS if legacy else _WIDTHS)


def _of_numbers(weight: Array, real: str, legacy: bool) -> Iterator[Stored]:
    """Without zeros, and with palettes: one for all, or one for each position of one of the first dimensions."""
    for keep in _masks(weight):
        if keep is not None:
            yield Stored(weight, real, real, mask=keep)
        for axis in (None, *range(min(weight.ndim, 2))):
            if (way := _palette(weight, real, legacy, keep, axis)) is not None:
                yield way


def _of_format(weight: Array, each: Format, real: str, legacy: bool) -> Iterator[Stored]:
    """As the codes of a format; only those from which the weight comes back as it is."""
    for way in _coded(weight, each, real, legacy):
        if np.array_equal(way.values(), weight) and _precise(way):
            yield way


def _coded(weight: Array, each: Format, real: str, legacy: bool) -> Iterator[Stored]:
    inner = each.inner if isinstance(each, Masked) else each
    grid = inner.grid if isinstance(inner, Levels) else inner
    for keep in _masks(weight):
        if isinstance(inner, FloatFormat) and inner.is_plain and inner.dtype == real:
            if keep is not None:
                yield Stored(weight, real, real, mask=keep)
            continue
        if isinstance(grid, IntegerGrid):
            kind = f"{'int' if grid.signed else 'uint'}{4 if grid.bits <= 4 and not legacy else 8}"
            codes = grid.encode(weight)
            offset = None if grid.zero_point is None else _even(grid.zero_point, grid.blocks, weight.shape)
            offset = None if offset is None else offset.astype(codes.dtype)
            yield Stored(codes, kind, real, None, _even(grid.scale, grid.blocks, weight.shape), offset, keep)
        most = {4: 8, 8: 64}[_width(kind)] if isinstance(inner, IntegerGrid) else _MOST  # else integers are as small
        if isinstance(inner, Scaled) and (unscaled := _unscaled(weight, inner)) is not None:
            scale: Array | None = _even(inner.scale, inner.blocks, weight.shape)
            if inner.per_tensor:
                unscaled, scale = unscaled * inner.scale, None
            if (way := _palette(unscaled, real, legacy, keep, None, most)) is not None:
                yield replace(way, scale=scale)


def _unscaled(weight: Array, each: Scaled) -> Array | None:
    """A weight before it is scaled, float32; None where that depends on a zero point."""
    codes = each.encode(weight)
    if isinstance(each, Levels):
        return each.codebook[codes]
    if isinstance(each, FloatFormat):
        return FloatFormat.plain(each.dtype).decode(codes) if each.dtype in _SHORT_FLOATS else None
    if isinstance(each, IntegerGrid) and each.zero_point is None:
        return codes.astype(np.float32)
    return None


def _masks(weight: Array) -> list[Array | None]:
    """None, and where the weight is not zero if that says anything."""
    keep = weight != 0
    return [None, keep] if 0 < np.count_nonzero(keep) < keep.size else [None]


def _palette(
    values: Array, real: str, legacy: bool, keep: Array | None, axis: int | None, most: int = _MOST
) -> Stored | None:
    """Places in palettes of the numbers that occur; None where there are more than `most` of them."""

    def rows(array: Array) -> Array:
        return array.reshape(1, -1) if axis is None else np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)

    widths = _LEGACY_WIDTHS if legacy else _WIDTHS
    lists, masks = rows(values), None if keep is None else rows(keep)
    places, palettes = np.zeros(lists.shape, np.uint8), []
    for number, row in enumerate(lists):
        inside = slice(None) if masks is None else masks[number]
        if np.unique(row[inside][:_SOME]).size > most:
            return None
        levels, place = np.unique(row[inside], return_inverse=True)
        if levels.size > most:
            return None
        places[number, inside] = place
        palettes.append(levels)
    width = _fitting(max(levels.size for levels in palettes), widths)
    table = np.stack([np.pad(levels, (0, 2**width - levels.size)) for levels in palettes]).astype(np.float32)
    if axis is None:
        return Stored(
            places.reshape(values.shape), f"uint{width}", real, table.reshape(*[1] * values.ndim, -1), mask=keep
        )
    moved = values.shape[axis : axis + 1] + values.shape[:axis] + values.shape[axis + 1 :]
    shape = [n if d == axis else 1 for d, n in enumerate(values.shape)]
    laid = np.ascontiguousarray(np.moveaxis(places.reshape(moved), 0, axis))
    return Stored(laid, f"uint{width}", real, table.reshape(*shape, -1), mask=keep)


def _fitting(count: int, widths: Sequence[int]) -> int:
    return next(width for width in widths if 2**width >= count)


def _even(array: Array, blocks: Blocks, shape: Sequence[int]) -> Array:
    """What is there per block, for blocks that divide the sizes: where the last one is shorter, for parts of blocks."""
    if not blocks:
        return array.reshape([1] * len(shape))
    for axis, (block, size) in enumerate(zip(blocks, shape, strict=True)):
        if block is not None and block < size and size % block:
            part = math.gcd(block, size)
            array = np.repeat(array, block // part, axis).take(range(size // part), axis)
    return array


def _spread(array: Array, shape: Sequence[int]) -> Array:
    blocks = tuple(size // n for n, size in zip(array.shape, shape, strict=True))
    return np.broadcast_to(spread(array, blocks, shape), shape)


def _precise(way: Stored) -> bool:
    """Whether the program's precision has the scales, up to its rounding."""
    if way.scale is None:
        return True
    rounded = way.scale.astype(way.real).astype(np.float32)
    return bool((np.abs(rounded - way.scale) <= np.finfo(way.real).eps * way.scale).all())


def _width(kind: str) -> int:
    return int("".join(letter for letter in kind if letter.isdigit()))


def add_pass(pipeline: Any, held: Sequence[tuple[Array, Stored]]) -> None:
    """Append to a pipeline of coremltools what puts `constexpr` in the places of weights, once they stay as they are.

    Parameters
    ----------
    held : weights, float32, and how they are to be held.
    """
    from coremltools.converters.mil._deployment_compatibility import AvailableTarget
    from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
    from coremltools.converters.mil.mil.passes.pass_registry import register_pass

    class StoreWeights(AbstractGraphPass):  # type: ignore[misc]  # coremltools has no types
        def apply(self, prog: Any) -> None:
            """Replace the constants of a program."""
            for block in prog.functions.values():
                with block:
                    for constant in [op for op in block.operations if op.op_type == "const"]:
                        (old,) = constant.outputs
                        readers = [op.op_type for op in old.child_ops]
                        way = _way(old.val, held) if readers and _MULTIPLIES.issuperset(readers) else None
                        if way is None:
                            continue
                        new = constexpr(way, constant, constant.name, block.opset_version < AvailableTarget.iOS18)
                        block.replace_uses_of_var_after_op(constant, old, new, no_check_var_types=True)
                        block.remove_ops([constant])

    register_pass(_NAMESPACE, override=True)(StoreWeights)
    pipeline.append_pass(f"{_NAMESPACE}::{StoreWeights.__name__}")


def _way(array: Any, held: Sequence[tuple[Array, Stored]]) -> Stored | None:
    """How a constant of the program is to be held."""
    if isinstance(array, np.ndarray):
        for weight, way in held:
            for laid, turned in ways(array, weight.shape):
                if np.array_equal(weight.astype(array.dtype), laid):
                    return way.laid(array.shape, turned)
    return None


def ways(array: Array, shape: Sequence[int]) -> Iterator[tuple[Array, bool]]:
    """An array as a tensor of `shape`, and whether its two dimensions were turned for it."""
    if [n for n in array.shape if n != 1] == [n for n in shape if n != 1]:
        yield array.reshape(shape), False
    if array.ndim == 2 and array.shape[::-1] == tuple(shape):
        yield array.T, True


def constexpr(stored: Stored, before: Any, name: str, legacy: bool) -> Any:
    """The value, in a program of coremltools, that decodes a weight.

    Parameters
    ----------
    before : the operator before which it is put.
    legacy : whether the program is for iOS 17.
    """
    return (_legacy if legacy else _modern)(stored, before, name)


def _modern(stored: Stored, before: Any, name: str) -> Any:
    from coremltools.converters.mil.mil import Builder as mb

    mask = None if stored.mask is None else stored.mask.astype(_numpy("uint1"))
    data = _typed(stored.data if stored.mask is None else stored.data[stored.mask], stored.kind)
    scale = None if stored.scale is None else stored.scale.astype(stored.real)
    offset = None if stored.offset is None else _typed(stored.offset, stored.kind)
    where: dict[str, Any] = {"before_op": before}
    if stored.levels is not None:
        levels = stored.levels[..., None].astype(stored.real)
        if mask is None:
            data = mb.constexpr_lut_to_dense(indices=data, lut=levels, name=f"{name}_levels", **where)
        else:
            mask, data = mb.constexpr_lut_to_sparse(
                indices_mask=mask, indices_nonzero_data=data, lut=levels, name=f"{name}_levels", **where
            )
    if scale is not None and mask is not None and stored.levels is None:
        mask, data = mb.constexpr_sparse_blockwise_shift_scale(
            data_mask=mask, nonzero_data=data, scale=scale, offset=offset, name=f"{name}_scaled", **where
        )
        scale = None
    if mask is not None:
        data = mb.constexpr_sparse_to_dense(nonzero_data=data, mask=mask, name=f"{name}_dense", **where)
    if scale is not None:
        data = mb.constexpr_blockwise_shift_scale(data=data, scale=scale, offset=offset, name=f"{name}_scaled", **where)
    return data


def _legacy(stored: Stored, before: Any, name: str) -> Any:
    from coremltools.converters.mil.mil import Builder as mb

    where: dict[str, Any] = {"before_op": before, "name": f"{name}_stored"}
    shape = np.array(stored.data.shape, np.uint32)
    if stored.mask is not None:
        nonzero = stored.data[stored.mask].astype(stored.real)
        return mb.constexpr_sparse_to_dense(nonzero_data=nonzero, mask=packed(stored.mask, 1), shape=shape, **where)
    if stored.levels is not None:
        levels = stored.levels.reshape(-1).astype(stored.real)
        return mb.constexpr_lut_to_dense(
            indices=packed(stored.data, _width(stored.kind)), lut=levels, shape=shape, **where
        )
    assert stored.scale is not None
    several = [d for d, n in enumerate(stored.scale.shape) if n > 1]
    zero = np.zeros((), stored.kind) if stored.offset is None else stored.offset.reshape(-1 if several else ())
    return mb.constexpr_affine_dequantize(
        quantized_data=_typed(stored.data, stored.kind),
        scale=stored.scale.astype(stored.real).reshape(-1 if several else ()),
        zero_point=_typed(zero, stored.kind),
        axis=np.int32(several[0] if several else 0),
        **where,
    )


def packed(codes: Array, width: int) -> Array:
    """Codes one behind the other, low bits first, as bytes."""
    bits = (codes.reshape(-1, 1).astype(np.uint8) >> np.arange(width, dtype=np.uint8)) & 1
    return np.packbits(bits.reshape(-1), bitorder="little")


def unpacked(content: Array, width: int, count: int) -> Array:
    """The codes that `packed` wrote, uint8 ``(count,)``."""
    bits = np.unpackbits(content, bitorder="little")[: width * count].reshape(count, width)
    codes: Array = (bits << np.arange(width, dtype=np.uint8)).sum(1, dtype=np.uint8)
    return codes


def _typed(array: Array, kind: str) -> Array:
    return array.astype(_numpy(kind))


def _numpy(kind: str) -> Any:
    """The numpy type under which coremltools knows one of Core ML's."""
    from coremltools.converters.mil.mil import types

    short = kind.replace("float", "fp")
    return types.nptype_from_builtin(types.string_to_builtin(short))
