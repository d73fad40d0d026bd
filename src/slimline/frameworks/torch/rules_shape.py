"""Rules of the operators that only move numbers: shapes, positions, and tensors made from nothing."""

from __future__ import annotations

import numpy as np

from slimline.frameworks.torch.call import Call
from slimline.frameworks.torch.registry import rule, unknown, whole
from slimline.graph import ops
from slimline.graph.equation import parse

# -- shapes ------------------------------------------------------------------------------


@rule("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view", "ravel")
def _reshape(call: Call) -> None:
    call.emit("reshape", call.tensors()[:1], ops.reshape(call.input, call.output))


@rule("reshape_as", "view_as")
def _reshape_as(call: Call) -> None:
    """A reshape to the sizes of another tensor, whose axes it then has."""
    shaped = call.between("reshape", call.tensors("self"), ops.reshape(call.input, call.output), call.output)
    call.emit("elementwise", [shaped, call.tensor("other")], ops.elementwise([call.output] * 2, "identity"))


@rule("permute", "movedim", "transpose", "swapaxes", "swapdims", "t", "numpy_T", "mT", "adjoint")
def _permute(call: Call) -> None:
    rank, name = call.rank, call.target.removeprefix("aten.").rstrip("_")
    order = list(range(rank))
    if name == "permute":
        order = call.axes("dims")
    elif name == "movedim":
        sources, targets = ([x] if isinstance(x, int) else x for x in (call["source"], call["destination"]))
        pairs = sorted((t % rank, s % rank) for s, t in zip(sources, targets, strict=True))
        order = [d for d in order if d not in {s for _, s in pairs}]
        for target, source in pairs:
            order.insert(target, source)
    elif name in ("t", "numpy_T"):
        order.reverse()
    elif rank:
        first, second = {"swapaxes": ("axis0", "axis1")}.get(name, ("dim0", "dim1"))
        a, b = (rank - 2, rank - 1) if name in ("mT", "adjoint") else (call.axis(first), call.axis(second))
        order[a], order[b] = order[b], order[a]
    call.emit("permute", call.tensors()[:1], ops.permute(order))


@rule("expand")
def _expand(call: Call) -> None:
    call.emit("expand", call.tensors("self"), ops.expand(call.input, call.output))


@rule("repeat", "tile", "repeat_interleave")
def _repeat(call: Call) -> None:
    """Copies of a dimension: around it (``repeat``) or of each position (``repeat_interleave``)."""
    name = call.target.removeprefix("aten.")
    if name == "repeat_interleave" and (
        call.tensor("self") is None or call["dim"] is None or call.value(call["repeats"])
    ):
        return unknown(call)
    before, after = call.input, call.output
    offset = len(after) - len(before)
    ins, outs, sizes = [], [], {}
    for d, n in enumerate(after):
        old = before[d - offset] if d >= offset else 1
        copies, axis = n // old, f"a{d}"
        if d >= offset:
            ins.append("1" if old == 1 and copies > 1 else axis)
        if copies == 1:
            outs.append(axis if d >= offset else ".")
        elif old == 1:
            outs.append("." if name == "repeat_interleave" else "*")
        else:
            sizes[f"n{d}"] = copies
            outs.append(f"({axis} n{d})" if name == "repeat_interleave" else f"(n{d} {axis})")
    equation = parse(f"{' '.join(ins)} -> {' '.join(outs)}", sizes)
    return call.emit("expand", call.tensors("self"), {"equation": equation})


@rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle")
def _shuffle(call: Call) -> None:
    name = call.target.removeprefix("aten.")
    lead = " ".join(f"a{d}" for d in range(call.rank - 3))
    if name == "channel_shuffle":
        spatial = " ".join("." for _ in range(call.rank - 2))
        equation = parse(f"b (g c) {spatial} -> b (c g) {spatial}", {"g": call["groups"]})
    else:
        factor = call["upscale_factor" if name == "pixel_shuffle" else "downscale_factor"]
        deep, wide = f"{lead} (c p q) h w", f"{lead} c (h p) (w q)"
        text = f"{deep} -> {wide}" if name == "pixel_shuffle" else f"{wide} -> {deep}"
        fixed = dict.fromkeys("pq", "pixels are made of it")
        equation = parse(text, {"p": factor, "q": factor}, fixed=fixed)
    call.emit("reshape", call.tensors()[:1], {"equation": equation})


# -- positions ----------------------------------------------------------------------------


@rule("cat", "concat", "concatenate")
def _cat(call: Call) -> None:
    names = [call.value(n) for n in call["tensors"]]
    rank = len(call.output)
    names = [n for n in names if len(call.shape(n)) == rank]  # torch skips empty tensors of rank 1
    call.emit("concat", names, ops.concat(call.axis(rank=rank)))


@rule("stack")
def _stack(call: Call) -> None:
    axis = call.axis(rank=len(call.output))
    parts = []
    for node in call["tensors"]:
        name = call.value(node)
        before = call.shape(name)
        after = (*before[:axis], 1, *before[axis:])
        parts.append(call.between("reshape", [name], ops.reshape(before, after), after))
    call.emit("concat", parts, ops.concat(axis))


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_chunk", "unsafe_split")
def _split(call: Call) -> None:
    axis = call.axis()
    call.emit("split", call.tensors()[:1], ops.split(axis, [call.shape(n)[axis] for n in call.outputs]))


@rule("unbind")
def _unbind(call: Call) -> None:
    for index, output in enumerate(call.outputs):
        call.emit("select", call.tensors()[:1], ops.select(call.axis(), index), (output,))


@rule("glu")
def _glu(call: Call) -> None:
    axis, half = call.axis(), call.output
    parts = [
        call.between("slice", call.tensors()[:1], ops.slice_(axis, k * half[axis], (k + 1) * half[axis]), half)
        for k in (0, 1)
    ]
    call.emit("elementwise", parts, ops.elementwise([half, half], "glu"))


@rule("slice", "narrow")
def _slice(call: Call) -> None:
    axis = call.axis()
    size = call.input[axis]
    if call.target == "aten.narrow":
        start = int(call["start"]) % size
        span = range(start, start + int(call["length"]))
    else:
        span = range(size)[slice(call["start"], call["end"], call["step"])]
    return call.emit("slice", call.tensors()[:1], ops.slice_(axis, span.start, max(span.stop, span.start), span.step))


@rule("select")
def _select(call: Call) -> None:
    axis = call.axis()
    call.emit("select", call.tensors()[:1], ops.select(axis, int(call["index"]) % call.input[axis]))


@rule("pad", "constant_pad_nd")
def _pad(call: Call) -> None:
    flat = [int(n) for n in call["pad"]]
    pairs = [(flat[i], flat[i + 1]) for i in range(0, len(flat), 2)]
    widths = [(0, 0)] * (call.rank - len(pairs)) + pairs[::-1]
    constant = call.target == "aten.constant_pad_nd" or call["mode"] == "constant"
    if constant and not call["value"]:
        return call.emit("pad", call.tensors()[:1], ops.pad(widths))
    return whole("other", lambda _: [d for d, w in enumerate(widths) if any(w)])(call)


@rule("index", "index_select")
def _index(call: Call) -> None:
    """Index tensors: their common dimensions stand where they pick from, or first if they pick here and there."""
    if call.target == "aten.index":
        indexed = [(d, n) for d, n in enumerate(call["indices"]) if n is not None]
    else:
        indexed = [(call.axis(), call["index"])]
    indices = [call.value(n) for _, n in indexed]
    if any(call.dtype(i) == "bool" for i in indices):
        return unknown(call, "a mask as index")
    axis, node = indexed[0]
    picked = call.constant(node)
    if len(indexed) == 1 and picked is not None and picked.ndim == 1:
        rows = np.where(picked < 0, picked + call.input[axis], picked)
        if len(np.unique(rows)) == len(rows):
            return call.emit("take", call.tensors("self"), ops.take(axis, rows.tolist()))
    taken = [d for d, _ in indexed]
    free = [f"a{d}" for d in range(call.rank) if d not in taken]
    place = axis if taken == list(range(axis, axis + len(taken))) else 0
    after = [*free[:place], *["."] * (len(call.output) - len(free)), *free[place:]]
    before = " ".join("." if d in taken else f"a{d}" for d in range(call.rank))
    dots = [" ".join("." * len(call.shape(i))) for i in indices]
    equation = parse(f"{', '.join([before, *dots])} -> {' '.join(after)}")
    return call.emit("pool", [call.tensor("self"), *indices], {"equation": equation, "function": "other"})


@rule("gather")
def _gather(call: Call) -> None:
    """Picks along one dimension; the others pass where the index goes over all of them."""
    names, axis = call.tensors("self", "index"), call.axis()
    same = [d != axis and n == m for d, (n, m) in enumerate(zip(*map(call.shape, names), strict=True))]
    dims = " ".join(f"a{d}" if s else "." for d, s in enumerate(same))
    call.emit("pool", names, {"equation": parse(f"{dims}, {dims} -> {dims}"), "function": "other"})


# -- tensors from nothing -------------------------------------------------------------------


@rule("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "scalar_tensor")
def _make(call: Call) -> None:
    call.emit("make", (), ops.make(len(call.output)))


@rule("arange", "linspace", "eye", "rand", "randn")
def _positions(call: Call) -> None:
    call.emit("unknown", (), ops.unknown("its numbers depend on their position"))
