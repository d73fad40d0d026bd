"""The neutral operators: how axes pass through each, as an equation.

An adapter calls one constructor per native operator and stores the result as `Node.attributes`, with the constructor's
name as `Node.kind`; what an equation says stands in `slimline.graph.equation`.

Six kinds move positions instead (`concat`, `split`, `slice`, `select`, `pad`, `take`); their attributes are plain
numbers and `slimline.graph.axes` does their arithmetic. `unknown` freezes what it touches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from slimline.graph.equation import Window, parse

Attributes = dict[str, Any]


def _axes(rank: int, skip: Sequence[int] = ()) -> list[str]:
    """Names a0, a1, … for `rank` dimensions."""
    return [f"a{i}" for i in range(rank) if i not in skip]


def conv(
    spatial: int,
    groups: int = 1,
    transposed: bool = False,
    channels_last: bool = False,
    depthwise: bool = False,
    window: Window | None = None,
    pointwise: bool = False,
) -> Attributes:
    """Convolution of any stride, padding and dilation; inputs ``(x, weight, bias or None)``.

    `window` says where it looks; a transposed one, whose weight sees one position at a time, needs none. A `pointwise`
    one looks at every position alone, as a linear layer does: its spatial axes pass.

    Kernels are ``(out, in / groups, *k)`` and transposed ``(in, out / groups, *k)``; with `channels_last`
    ``(*k, in / groups, out)``, transposed ``(*k, out, in)``, and with `depthwise` ``(*k, in, multiplier)``.
    """
    dots = " ".join(f"s{d}" if pointwise else "." for d in range(spatial))
    kernel = " ".join(["1" if pointwise else "."] * spatial)
    if depthwise:
        i, weight, o = "g", "g o", "(g o)"
    elif groups > 1:
        i, o = "(g i)", "(g o)"
        weight = ("(g i) o" if transposed else "(g o) i") if not channels_last else "i (g o)"
    else:
        i, o = "i", "o"
        weight = "i o" if transposed else "o i"
        if channels_last:
            weight = weight[::-1]
    if channels_last:
        text = f"b {dots} {i}, {kernel} {weight}, {o} -> b {dots} {o}"
    else:
        text = f"b {i} {dots}, {weight} {kernel}, {o} -> b {o} {dots}"
    sizes = {"g": groups} if groups > 1 and not depthwise else {}
    return {"equation": parse(text, sizes), "transposed": transposed, "window": window}


def linear(rank: int, layout: str = "o i") -> Attributes:
    """``y = x W + b`` on the last of `rank` dimensions; inputs ``(x, weight, bias or None)``.

    `layout` is the weight's: ``"o i"``, outputs by inputs, or ``"i o"``.
    """
    lead = " ".join(_axes(rank - 1))
    return {"equation": parse(f"{lead} i, {layout}, o -> {lead} o")}


def batch_norm(rank: int, axis: int = 1, stored: int = 4, tracked: bool = True) -> Attributes:
    """Batch normalisation; inputs ``(x, *stored vectors)``, each vector of the channel axis or None.

    One that has not `tracked` any statistics always normalises by those of its input.
    """
    names = _axes(rank)
    x = " ".join(names)
    vectors = ", ".join([names[axis]] * stored)
    statistics = [] if tracked else [n for d, n in enumerate(names) if d != axis]
    return {"equation": parse(f"{x}, {vectors} -> {x}", statistics=statistics), "axis": axis}


def layer_norm(rank: int, axes: Sequence[int], stored: int = 2, kind: str = "layer") -> Attributes:
    """Layer or RMS normalisation (`kind`) over `axes`; inputs ``(x, scale or None, shift or None)``."""
    names = _axes(rank)
    x = " ".join(names)
    normalised = [names[a] for a in axes]
    vectors = ", ".join([" ".join(normalised)] * stored)
    return {"equation": parse(f"{x}, {vectors} -> {x}", statistics=normalised), "norm": kind}


def group_norm(rank: int, groups: int, axis: int = 1) -> Attributes:
    """Group (or instance) normalisation; inputs ``(x, scale or None, shift or None)``."""
    names = _axes(rank)
    names[axis] = "(g c)"
    x = " ".join(names)
    return {"equation": parse(f"{x}, (g c), (g c) -> {x}", {"g": groups}, statistics=("c",))}


def embedding(rank: int) -> Attributes:
    """Rows of a table, looked up by an index tensor of `rank` dimensions; inputs ``(indices, table)``."""
    names = " ".join(_axes(rank))
    fixed = {"v": "rows are chosen by the model's input"}
    return {"equation": parse(f"{names}, v e -> {names} e", fixed=fixed)}


def elementwise(shapes: Sequence[Sequence[int]], function: str) -> Attributes:
    """Any function of one or more tensors applied element by element, with broadcasting.

    `function` is its plain name (``relu``, ``add``, ``mul``, ``identity`` …), for quantization.
    """
    rank = max(len(s) for s in shapes)
    out = [max((s[len(s) - rank + d] for s in shapes if len(s) - rank + d >= 0), default=1) for d in range(rank)]

    def dims(shape: Sequence[int]) -> str:
        offset = rank - len(shape)
        return " ".join("1" if n == 1 and out[d + offset] != 1 else f"a{d + offset}" for d, n in enumerate(shape))

    text = f"{', '.join(map(dims, shapes))} -> {dims(out)}"
    return {"equation": parse(text), "function": function}


def expand(before: Sequence[int], after: Sequence[int]) -> Attributes:
    """Broadcast dimensions of size 1 to the shape `after`."""
    offset = len(after) - len(before)
    ins = ["1" if n == 1 and after[d + offset] != 1 else f"a{d + offset}" for d, n in enumerate(before)]
    outs = [f"a{d}" if d >= offset and ins[d - offset] != "1" else "*" for d in range(len(after))]
    return {"equation": parse(f"{' '.join(ins)} -> {' '.join(outs)}")}


def reduce(rank: int, axes: Sequence[int], keepdims: bool, function: str, outputs: int = 1) -> Attributes:
    """``mean``, ``sum``, ``max``, ``norm``, ``var`` … over `axes`, all `outputs` alike."""
    names = _axes(rank)
    remaining = [("1" if i in axes else n) for i, n in enumerate(names) if keepdims or i not in axes]
    text = f"{' '.join(names)} -> {', '.join([' '.join(remaining)] * outputs)}"
    return {"equation": parse(text, statistics=[names[a] for a in axes]), "function": function, "axes": tuple(axes)}


def softmax(rank: int, *axes: int) -> Attributes:
    """Softmax, log-softmax and other functions that normalise over `axes`, mostly one."""
    names = _axes(rank)
    x = " ".join(names)
    return {"equation": parse(f"{x} -> {x}", statistics=[names[a] for a in axes]), "axes": axes}


def normalize(rank: int, axes: Sequence[int]) -> Attributes:
    """Division by the length over `axes`."""
    names = _axes(rank)
    x = " ".join(names)
    return {"equation": parse(f"{x} -> {x}", statistics=[names[a % rank] for a in axes])}


def pool(rank: int, axes: Sequence[int], function: str, inputs: int = 1, outputs: int = 1) -> Attributes:
    """Pooling (``max``, ``mean``) or resizing (``resize``) of the dimensions `axes`, the others untouched."""
    x = " ".join("." if i in axes else f"a{i}" for i in range(rank))
    return {"equation": parse(f"{', '.join([x] * inputs)} -> {', '.join([x] * outputs)}"), "function": function}


def permute(order: Sequence[int]) -> Attributes:
    """Transposition: output dimension ``d`` is input dimension ``order[d]``."""
    names = _axes(len(order))
    return {"equation": parse(f"{' '.join(names)} -> {' '.join(names[i] for i in order)}")}


def matmul(left: Sequence[int], right: Sequence[int]) -> Attributes:
    """Batched product of two activations with broadcasting: matrices, or vectors of rank 1."""
    if len(left) == 1 or len(right) == 1:
        rows = " ".join(_axes(max(len(left), len(right)) - 1))
        after = f"{' '.join(_axes(len(right) - 2))} n" if len(right) > 1 else rows
        first = "k" if len(left) == 1 else f"{rows} k"
        second = "k" if len(right) == 1 else f"{' '.join(_axes(len(right) - 2))} k n"
        return {"equation": parse(f"{first}, {second} -> {after}", statistics=("k",))}
    rank = max(len(left), len(right))

    def lead(shape: Sequence[int], other: Sequence[int]) -> list[str]:
        names = []
        for d in range(len(shape) - 2):
            axis = d + rank - len(shape)
            opposite = axis - (rank - len(other))
            bigger = 0 <= opposite < len(other) - 2 and other[opposite] != 1
            names.append("1" if shape[d] == 1 and bigger else f"a{axis}")
        return names

    a, b = lead(left, right), lead(right, left)
    both = []
    for axis in range(rank - 2):
        present = {n for n in (*a, *b) if n == f"a{axis}"}
        both.append(f"a{axis}" if present else "1")
    text = f"{' '.join([*a, 'm', 'k'])}, {' '.join([*b, 'k', 'n'])} -> {' '.join([*both, 'm', 'n'])}"
    return {"equation": parse(text, statistics=("k",))}


def einsum(text: str, weights: bool = False) -> Attributes:
    """An einsum such as ``"bnd,dhk->bnhk"``; with `weights` the second operand (and a third, the bias,
    which carries a suffix of the output) is stored, as in a projection to heads."""
    left, right = text.replace(" ", "").split("->")
    operands = left.split(",")
    spaced = f"{', '.join(' '.join(o) for o in operands)} -> {' '.join(right)}"
    reduced = sorted(set("".join(operands)) - set(right))
    return {"equation": parse(spaced, statistics=() if weights else reduced), "weighted": weights}


def attention(rank: int, mask_shape: Sequence[int] | None = None, shared: Sequence[int] = ()) -> Attributes:
    """Scaled dot-product attention; inputs ``(query, key, value, mask or None)``, all ``(…, length, width)``.

    Of the dimensions `shared` keys and values have one position, which all queries use.
    """
    lead = " ".join(_axes(rank - 2))
    one = " ".join("1" if d in shared else f"a{d}" for d in range(rank - 2))
    mask = ""
    if mask_shape is not None:
        names = [*_axes(rank - 2), "l", "s"][rank - len(mask_shape) :]
        mask = ", " + " ".join("1" if n == 1 else a for n, a in zip(mask_shape, names, strict=True))
    text = f"{lead} l d, {one} s d, {one} s e{mask} -> {lead} l e"
    return {"equation": parse(text, statistics=("d", "s"))}


def reshape(before: Sequence[int], after: Sequence[int]) -> Attributes:
    """View, flatten, squeeze, unsqueeze: the same numbers in row-major order.

    Every dimension is split into the factors that both shapes share. Where neither boundary divides
    the other (``(3, 4) -> (2, 6)``), the run of dimensions is taken whole.
    """
    counter = 0

    def fresh() -> str:
        nonlocal counter
        counter += 1
        return f"r{counter}"

    ins: list[list[str]] = [[] for _ in before]
    outs: list[list[str]] = [[] for _ in after]
    sizes: dict[str, int] = {}
    i = j = 0
    while True:
        while i < len(before) and before[i] == 1:
            ins[i] = ["1"]
            i += 1
        while j < len(after) and after[j] == 1:
            outs[j] = ["1"]
            j += 1
        if i >= len(before) or j >= len(after):
            break
        # One run: from here to where both shapes have covered the same number of elements.
        run_in, run_out = [i], [j]
        a, b = before[i], after[j]
        factors: list[tuple[int, int, int]] | None = []
        left, right = before[i], after[j]
        while True:
            step = math.gcd(left, right) if left % right and right % left else min(left, right)
            if step != min(left, right):
                factors = None
            elif factors is not None:
                factors.append((step, i, j))
            if factors is not None:
                left, right = left // step, right // step
                if left == 1 and right == 1:
                    break
                if left == 1:
                    i += 1
                    run_in.append(i)
                    left, a = before[i], a * before[i]
                if right == 1:
                    j += 1
                    run_out.append(j)
                    right, b = after[j], b * after[j]
            else:
                if a == b:
                    break
                if a < b:
                    i += 1
                    run_in.append(i)
                    a *= before[i]
                else:
                    j += 1
                    run_out.append(j)
                    b *= after[j]
        if factors is None:
            for d in run_in:
                ins[d] = ["."]
            for d in run_out:
                outs[d] = ["."]
        else:
            for step, p, q in factors:
                if step == 1:
                    continue
                name = fresh()
                sizes[name] = step
                ins[p].append(name)
                outs[q].append(name)
        i, j = i + 1, j + 1

    def text(dims: list[list[str]]) -> str:
        return " ".join(d[0] if len(d) == 1 else f"({' '.join(d)})" for d in (d or ["1"] for d in dims))

    return {"equation": parse(f"{text(ins)} -> {text(outs)}", sizes)}


def concat(axis: int) -> Attributes:
    """Inputs one after the other along `axis`."""
    return {"axis": axis}


def split(axis: int, sizes: Sequence[int]) -> Attributes:
    """Outputs of `sizes` along `axis`: split, chunk, tensor_split; unbind is followed by `reshape`."""
    return {"axis": axis, "sizes": tuple(sizes)}


def slice_(axis: int, start: int, stop: int, step: int = 1) -> Attributes:
    """Positions ``start:stop:step`` of `axis` (kind ``slice``); `start` and `stop` are non-negative."""
    return {"axis": axis, "start": start, "stop": stop, "step": step}


def select(axis: int, index: int) -> Attributes:
    """Position `index` (non-negative) of `axis`, which disappears."""
    return {"axis": axis, "index": index}


def pad(widths: Sequence[tuple[int, int]]) -> Attributes:
    """Constant zeros before and after each dimension (negative widths crop)."""
    return {"widths": tuple((int(a), int(b)) for a, b in widths)}


def take(axis: int, indices: Sequence[int]) -> Attributes:
    """Constant positions of one axis: index_select, roll, flip, a shuffle written by indices."""
    return {"axis": axis, "indices": tuple(int(i) for i in indices)}


def make(rank: int) -> Attributes:
    """A tensor full of one number, made from nothing but its shape (zeros, ones, full …)."""
    return {"equation": parse(f"-> {' '.join('*' * rank)}")}


def shape() -> Attributes:
    """An operator on sizes, not on tensors; nothing passes through."""
    return {}


def unknown(reason: str = "slimline has no rule for it") -> Attributes:
    """An operator without a rule: every axis it touches is frozen, with the reason."""
    return {"reason": reason}
