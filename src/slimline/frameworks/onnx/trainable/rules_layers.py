"""Layers with weights, norms, products, pooling, reductions and what picks by size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from slimline.frameworks.onnx.operators import stored
from slimline.frameworks.onnx.read import is_statistic
from slimline.frameworks.onnx.trainable.call import RULES, Call, Rule, aten, plain, rule

_CONVOLUTIONS = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
_TRANSPOSED = {1: aten.conv_transpose1d.default, 2: aten.conv_transpose2d.input, 3: aten.conv_transpose3d.input}
_MAXIMA = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_MEANS: dict[int, Any] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


class _Window:
    """Kernel, strides, dilations and padding of an operator that moves over an image."""

    def __init__(self, call: Call, kernel: Sequence[int]) -> None:
        count = len(kernel)
        if not 1 <= count <= 3:
            raise call.refusal(f"of {count} dimensions")
        self.kernel = list(kernel)
        self.strides = call.attribute("strides") or [1] * count
        self.dilations = call.attribute("dilations") or [1] * count
        pads = call.attribute("pads") or [0] * 2 * count
        self.before, self.after = pads[:count], pads[count:]
        way = call.attribute("auto_pad", "NOTSET")
        if way == "VALID":
            self.before = self.after = [0] * count
        elif way != "NOTSET":
            if call.node.op_type == "ConvTranspose":
                raise call.refusal(f"padded by {way}")
            totals = [
                max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
                for n, k, s, d in zip(call.shape()[2:], kernel, self.strides, self.dilations, strict=True)
            ]
            less, more = [t // 2 for t in totals], [t - t // 2 for t in totals]
            self.before, self.after = (less, more) if way == "SAME_UPPER" else (more, less)

    @property
    def even(self) -> bool:
        """Whether both sides are padded alike."""
        return self.before == self.after

    @property
    def around(self) -> list[int]:
        """The padding as torch's pad takes it."""
        return [n for pair in zip(reversed(self.before), reversed(self.after), strict=True) for n in pair]


@rule("Conv")
def _conv(call: Call) -> fx.Node:
    x, window = call.tensor(0), _Window(call, call.shape(1)[2:])
    padding = window.before
    if not window.even:
        x, padding = call.emit(aten.constant_pad_nd.default, x, window.around, 0), [0] * len(padding)
    return call.emit(
        _CONVOLUTIONS[len(padding)], x, call.tensor(1), call.optional(2), window.strides, padding, window.dilations,
        call.attribute("group", 1),
    )  # fmt: skip


@rule("ConvTranspose")
def _transposed(call: Call) -> fx.Node:
    window = _Window(call, call.shape(1)[2:])
    count = len(window.kernel)
    more = call.attribute("output_padding") or [0] * count
    if call.attribute("output_shape"):
        raise call.refusal("to a given shape")
    padding = window.before if window.even else [0] * count
    y = call.emit(
        _TRANSPOSED[count], call.tensor(0), call.tensor(1), call.optional(2), window.strides, padding, more,
        call.attribute("group", 1), window.dilations,
    )  # fmt: skip
    if not window.even:
        for d in range(count):
            y = call.emit(aten.slice.Tensor, y, d + 2, window.before[d], window.before[d] + call.output[d + 2], 1)
    return y


def product(a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float, turn: tuple[int, int]) -> Tensor:
    """``alpha * a @ b + beta * c``, of turned matrices where `turn` says so."""
    y = (a.mT if turn[0] else a) @ (b.mT if turn[1] else b)
    y = y if alpha == 1 else alpha * y
    return y if c is None else y + (c if beta == 1 else beta * c)


@rule("Gemm")
def _gemm(call: Call) -> fx.Node:
    alpha, beta = call.attribute("alpha", 1.0), call.attribute("beta", 1.0)
    turn = (call.attribute("transA", 0), call.attribute("transB", 0))
    if (alpha, beta, *turn) == (1, 1, 0, 1) and (not call.has(2) or call.shape(2) == call.shape(1)[:1]):
        return call.emit(aten.linear.default, call.tensor(0), call.tensor(1), call.optional(2))
    return call.emit(product, call.tensor(0), call.tensor(1), call.optional(2), alpha, beta, turn)


RULES["MatMul"] = plain(torch.matmul)


@rule("Einsum")
def _einsum(call: Call) -> fx.Node:
    return call.emit(torch.einsum, str(call.attribute("equation")), *call.tensors())


# -- norms -------------------------------------------------------------------------------


@rule("BatchNormalization")
def _batch_norm(call: Call) -> fx.Node:
    """Trained as torch trains its own: by the statistics of each batch, of which the stored ones become a mean."""
    statistics = call.node.inputs[3:5]
    if call.attribute("training_mode", 0) or any(stored(v) is None or not is_statistic(v) for v in statistics if v):
        raise call.refusal("whose statistics are computed, or read by others too")
    return call.emit(
        aten.batch_norm.default, *call.tensors(), False, 1 - call.attribute("momentum", 0.9),
        call.attribute("epsilon", 1e-5), True,
    )  # fmt: skip


def layer_norm(x: Tensor, scale: Tensor | None, shift: Tensor | None, axis: int, eps: float) -> Tensor:
    """Over all dimensions from `axis` on; scale and shift broadcast."""
    y = F.layer_norm(x, x.shape[axis:], eps=eps)
    y = y if scale is None else y * scale
    return y if shift is None else y + shift


def rms_norm(x: Tensor, scale: Tensor, axis: int, eps: float) -> Tensor:
    """The same without a mean."""
    return F.rms_norm(x, x.shape[axis:], eps=eps) * scale


@rule("LayerNormalization")
def _layer_norm(call: Call) -> fx.Node:
    axis, eps = call.axis(-1), call.attribute("epsilon", 1e-5)
    operands = [call.tensor(0), call.optional(1), call.optional(2)]
    sizes = list(call.shape()[axis:])
    if axis and all(list(call.shape(k)) == sizes for k in (1, 2) if call.has(k)):
        return call.emit(aten.layer_norm.default, operands[0], sizes, *operands[1:], eps)
    return call.emit(layer_norm, *operands, axis, eps)


@rule("RMSNormalization")
def _rms_norm(call: Call) -> fx.Node:
    return call.emit(rms_norm, *call.tensors(), call.axis(-1), call.attribute("epsilon", 1e-5))


def group_norm(x: Tensor, scale: Tensor, shift: Tensor, groups: int, eps: float) -> Tensor:
    """Scale and shift are of the channels, or in older versions of the groups."""
    each = x.shape[1] // len(scale)
    scale, shift = (v.repeat_interleave(each) if each > 1 else v for v in (scale, shift))
    return F.group_norm(x, groups, scale, shift, eps)


@rule("GroupNormalization", "InstanceNormalization")
def _group_norm(call: Call) -> fx.Node:
    groups = call.attribute("num_groups", call.shape()[1])
    return call.emit(group_norm, *call.tensors(), groups, call.attribute("epsilon", 1e-5))


def local_norm(x: Tensor, alpha: float, beta: float, bias: float, size: int) -> Tensor:
    """By the squares of the channels around each."""
    squares = F.pad(x.square().flatten(2).transpose(1, 2), ((size - 1) // 2, size // 2))
    sums = squares.unfold(2, size, 1).sum(-1).transpose(1, 2).reshape(x.shape)
    return x / (bias + alpha / size * sums) ** beta


def unit_norm(x: Tensor, axis: int, p: int) -> Tensor:
    """Divided by its length; zero stays."""
    length = torch.linalg.vector_norm(x, p, axis, keepdim=True)
    return x / torch.where(length == 0, torch.ones_like(length), length)


def standardised(x: Tensor, axes: list[int]) -> Tensor:
    """With mean zero and variance one."""
    centred = x - x.mean(axes, keepdim=True)
    return centred / (centred.square().mean(axes, keepdim=True).sqrt() + 1e-9)


RULES |= {
    "LRN": plain(local_norm, alpha=1e-4, beta=0.75, bias=1.0, size=1),
    "LpNormalization": plain(unit_norm, axis=-1, p=2),
    "MeanVarianceNormalization": plain(standardised, axes=[0, 2, 3]),
}


# -- pooling -----------------------------------------------------------------------------


def max_pool(
    x: Tensor, kernel: list[int], strides: list[int], around: list[int], even: list[int] | None,
    dilations: list[int], ceil: bool,
) -> Tensor:  # fmt: skip
    """With the padding `even`, or `around` of it where the sides differ."""
    x = x if even is not None else F.pad(x, around, value=-math.inf)
    pooled: Tensor = _MAXIMA[len(kernel)](x, kernel, strides, even or [0] * len(kernel), dilations, ceil)
    return pooled


def mean_pool(
    x: Tensor, kernel: list[int], strides: list[int], around: list[int], even: list[int] | None,
    ceil: bool, whole: bool,
) -> Tensor:  # fmt: skip
    """The same; the padding counts where it is `whole`."""
    pool = _MEANS[len(kernel)]
    if even is not None:
        pooled: Tensor = pool(x, kernel, strides, even, ceil, whole)
        return pooled
    pooled = pool(F.pad(x, around), kernel, strides, 0, ceil)
    return pooled if whole else pooled / pool(F.pad(torch.ones_like(x), around), kernel, strides, 0, ceil)


def length_pool(x: Tensor, kernel: list[int], strides: list[int], around: list[int], ceil: bool, p: int) -> Tensor:
    """The length of what a window sees."""
    pooled: Tensor = _MEANS[len(kernel)](F.pad(x.abs() ** p, around), kernel, strides, 0, ceil)
    return torch.pow(pooled * math.prod(kernel), 1 / p)


@rule("MaxPool", "AveragePool", "LpPool")
def _pool(call: Call) -> fx.Node:
    kind, x = call.node.op_type, call.tensor(0)
    window = _Window(call, call.attribute("kernel_shape"))
    ceil = bool(call.attribute("ceil_mode", 0))
    fits = window.even and all(2 * p <= k for p, k in zip(window.before, window.kernel, strict=True))
    even = window.before if fits else None
    if kind == "MaxPool":
        return call.emit(max_pool, x, window.kernel, window.strides, window.around, even, window.dilations, ceil)
    if set(window.dilations) != {1}:
        raise call.refusal("with dilations")
    if kind == "LpPool":
        return call.emit(length_pool, x, window.kernel, window.strides, window.around, ceil, call.attribute("p", 2))
    whole = bool(call.attribute("count_include_pad", 0))
    return call.emit(mean_pool, x, window.kernel, window.strides, window.around, even, ceil, whole)


@rule("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(call: Call) -> fx.Node:
    function = aten.mean.dim if call.node.op_type == "GlobalAveragePool" else aten.amax.default
    return call.emit(function, call.tensor(0), list(range(2, call.rank)), True)


def total_length(x: Tensor, p: int) -> Tensor:
    """Of all positions of a channel."""
    lengths: Tensor = torch.linalg.vector_norm(x, p, list(range(2, x.dim())), keepdim=True)
    return lengths


RULES["GlobalLpPool"] = plain(total_length, p=2)


# -- reductions and softmax --------------------------------------------------------------


def total(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """A sum in the type of `x`."""
    return x.sum(axes, keep, dtype=x.dtype)


def product_over(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """A product in the type of `x`."""
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keep, dtype=x.dtype)
    return x


def absolute(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """The sum of absolute numbers."""
    return total(x.abs(), axes, keep)


def length(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """The root of the sum of squares."""
    lengths: Tensor = torch.linalg.vector_norm(x, 2, axes, keep)
    return lengths


def log_sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """The logarithm of the sum."""
    return total(x, axes, keep).log()


def squares(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """The sum of squares."""
    return total(x.square(), axes, keep)


def _reduction(function: Any) -> Rule:
    def apply(call: Call) -> fx.Node:
        axes = call.numbers("axes", 1)
        if not axes:
            if call.attribute("noop_with_empty_axes", 0):
                raise call.refusal("over no dimension")
            axes = list(range(call.rank))
        keep = bool(call.attribute("keepdims", 1))
        return call.emit(function, call.tensor(0), [a % max(call.rank, 1) for a in axes], keep)

    return apply


RULES |= {
    f"Reduce{name}": _reduction(function)
    for name, function in {
        "Mean": aten.mean.dim, "Sum": total, "Max": aten.amax.default, "Min": aten.amin.default, "Prod": product_over,
        "L1": absolute, "L2": length, "LogSum": log_sum, "LogSumExp": aten.logsumexp.default, "SumSquare": squares,
    }.items()
}  # fmt: skip


@rule("Softmax", "LogSoftmax")
def _softmax(call: Call) -> fx.Node:
    function = aten.softmax.int if call.node.op_type == "Softmax" else aten.log_softmax.int
    return call.emit(function, call.tensor(0), call.axis(-1))


def place(x: Tensor, axis: int, keep: bool, last: bool, least: bool) -> Tensor:
    """Where the greatest or the least number is, the first or the last of equals."""
    x = x.flip(axis) if last else x
    index = (torch.argmin if least else torch.argmax)(x, axis, keep)
    return x.shape[axis] - 1 - index if last else index


@rule("ArgMax", "ArgMin")
def _place(call: Call) -> fx.Node:
    keep, last = bool(call.attribute("keepdims", 1)), bool(call.attribute("select_last_index", 0))
    return call.emit(place, call.tensor(0), call.axis(), keep, last, call.node.op_type == "ArgMin")


def hardmax(x: Tensor, axis: int) -> Tensor:
    """One where the greatest number is, zero elsewhere."""
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1)


RULES["Hardmax"] = plain(hardmax, axis=-1)


@rule("TopK")
def _top(call: Call) -> Sequence[fx.Node]:
    arguments = call.number(1), call.axis(-1), bool(call.attribute("largest", 1)), True
    return call.several(call.emit(torch.topk, call.tensor(0), *arguments), 2)


def running_sum(x: Tensor, axis: int, exclusive: int, reverse: int) -> Tensor:
    """Of all numbers up to each, or before each."""
    x = x.flip(axis) if reverse else x
    sums = x.cumsum(axis, dtype=x.dtype)
    sums = sums - x if exclusive else sums
    return sums.flip(axis) if reverse else sums


@rule("CumSum")
def _running_sum(call: Call) -> fx.Node:
    turns = call.attribute("exclusive", 0), call.attribute("reverse", 0)
    return call.emit(running_sum, call.tensor(0), call.number(1), *turns)
