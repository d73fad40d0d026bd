"""Rules of the operators that only move numbers: shapes, positions, and tensors made from nothing."""

from __future__ import annotations

import numpy as np

from slimline.frameworks.onnx.call import Call
from slimline.frameworks.onnx.operators import affine, measured
from slimline.frameworks.onnx.registry import rule, unknown, whole
from slimline.graph import ops
from slimline.graph.equation import parse


def _told(call: Call, index: int) -> bool:
    """Whether sizes are stored, or counted from the batch."""
    return affine(call.node.inputs[index]) is not None


@rule("Flatten")
def _flatten(call: Call) -> None:
    call.emit("reshape", call.tensors(0), ops.reshape(call.input, call.output))


@rule("Reshape")
def _reshape(call: Call) -> None:
    if not _told(call, 1):
        return unknown(call, "its sizes are computed from numbers")
    return call.emit("reshape", call.tensors(0), ops.reshape(call.input, call.output))


@rule("Squeeze", "Unsqueeze")
def _squeeze(call: Call) -> None:
    if call.value(1) is not None and not call.is_stored(1):
        return unknown(call, "its axes are computed")
    return call.emit("reshape", call.tensors(0), ops.reshape(call.input, call.output))


@rule("Transpose")
def _transpose(call: Call) -> None:
    call.emit("permute", call.tensors(0), ops.permute(call.attribute("perm") or list(range(call.rank))[::-1]))


@rule("Expand")
def _expand(call: Call) -> None:
    if not _told(call, 1):
        return unknown(call, "its sizes are computed from numbers")
    return call.emit("expand", call.tensors(0), ops.expand(call.input, call.output))


@rule("Tile")
def _tile(call: Call) -> None:
    """Copies around a dimension."""
    if not call.is_stored(1):
        return whole("other", lambda c: [d for d in range(c.rank) if c.input[d] != c.output[d]])(call)
    ins, outs, sizes = [], [], {}
    for d, (old, new) in enumerate(zip(call.input, call.output, strict=True)):
        copies = new // max(old, 1)
        ins.append("1" if old == 1 and copies > 1 else f"a{d}")
        if copies == 1:
            outs.append(f"a{d}")
        elif old == 1:
            outs.append("*")
        else:
            sizes[f"n{d}"] = copies
            outs.append(f"(n{d} a{d})")
    return call.emit("expand", call.tensors(0), {"equation": parse(f"{' '.join(ins)} -> {' '.join(outs)}", sizes)})


@rule("DepthToSpace", "SpaceToDepth")
def _depth(call: Call) -> None:
    if call.rank != 4:
        return unknown(call)
    n = int(call.attribute("blocksize"))
    deep = "b (c p q) h w" if call.attribute("mode", "DCR") == "CRD" else "b (p q c) h w"
    wide = "b c (h p) (w q)"
    text = f"{deep} -> {wide}" if call.node.op_type == "DepthToSpace" else f"{wide} -> {deep}"
    fixed = dict.fromkeys("pq", "pixels are made of it")
    return call.emit("reshape", call.tensors(0), {"equation": parse(text, {"p": n, "q": n}, fixed=fixed)})


@rule("Resize", "Upsample")
def _resize(call: Call) -> None:
    if len(call.node.inputs) > 3 and call.value(3) is not None and not _told(call, 3):
        return unknown(call, "its sizes are computed from numbers")
    moved = [d for d, (old, new) in enumerate(zip(call.input, call.output, strict=True)) if old != new]
    # A crop, and a cubic kernel, may look at neighbours where the size stays.
    moved += [d for d in range(2, call.rank) if d not in moved]
    return call.emit("pool", call.tensors(0), ops.pool(call.rank, moved, "resize"))


# -- positions ----------------------------------------------------------------------------


@rule("Concat")
def _concat(call: Call) -> None:
    rank = len(call.output)
    call.emit("concat", call.tensors(), ops.concat(call.axis(rank=rank)))


@rule("Split")
def _split(call: Call) -> None:
    if call.value(1) is not None and not call.is_stored(1):
        return whole("other", lambda c: [c.axis()])(call)
    axis = call.axis()
    sizes = [call.shape(name)[axis] for name in call.outputs]
    if len(call.outputs) != len(call.node.outputs):
        return unknown(call, "not all of its parts are read")
    return call.emit("split", call.tensors(0), ops.split(axis, sizes))


@rule("Slice")
def _slice(call: Call) -> None:
    numbers = [call.constant(index) for index in (1, 2, 3, 4)]
    if any(n is None or n.size != 1 for n in numbers):
        return whole("other", lambda c: [d for d in range(c.rank) if numbers[2] is None or d in numbers[2] % c.rank])(
            call
        )
    start, stop, axis, step = (int(n.ravel()[0]) for n in numbers if n is not None)
    axis %= call.rank
    span = range(call.input[axis])[slice(start, stop, step)]
    if step < 0:
        return call.emit("take", call.tensors(0), ops.take(axis, list(span)))
    return call.emit("slice", call.tensors(0), ops.slice_(axis, span.start, max(span.stop, span.start), span.step))


@rule("Pad")
def _pad(call: Call) -> None:
    pads, axes = call.constant(1), call.constant(3)
    if pads is None or (call.value(3) is not None and axes is None):
        return unknown(call, "its widths are computed")
    chosen = list(range(call.rank)) if axes is None else [int(a) % call.rank for a in axes.ravel()]
    widths = [(0, 0)] * call.rank
    for k, d in enumerate(chosen):
        widths[d] = (int(pads[k]), int(pads[len(chosen) + k]))
    filled = call.constant(2)
    zero = call.value(2) is None or (filled is not None and filled.size == 1 and not filled.any())
    if call.attribute("mode", "constant") == "constant" and zero:
        return call.emit("pad", call.tensors(0), ops.pad(widths))
    return whole("other", lambda _: [d for d, w in enumerate(widths) if any(w)])(call)


@rule("Gather")
def _gather(call: Call) -> None:
    """Rows of a table by an index, or constant positions of an activation."""
    axis, index = call.axis(), call.constant(1)
    if index is None:
        if call.is_stored(0) and axis == 0 and call.rank == 2:
            return call.emit("embedding", call.tensors(1, 0), ops.embedding(len(call.shape(call.value(1)))))
        lead = [f"a{d}" for d in range(axis)]
        after = [f"a{d}" for d in range(axis + 1, call.rank)]
        dots = ["."] * len(call.shape(call.value(1)))
        equation = parse(f"{' '.join([*lead, '.', *after])}, {' '.join(dots)} -> {' '.join([*lead, *dots, *after])}")
        return call.emit("pool", call.tensors(0, 1), {"equation": equation, "function": "other"})
    rows = np.where(index < 0, index + call.input[axis], index)
    if index.ndim == 0:
        return call.emit("select", call.tensors(0), ops.select(axis, int(rows)))
    if index.ndim == 1 and len(np.unique(rows)) == len(rows):
        return call.emit("take", call.tensors(0), ops.take(axis, rows.tolist()))
    lead = [f"a{d}" for d in range(axis)]
    after = [f"a{d}" for d in range(axis + 1, call.rank)]
    text = f"{' '.join([*lead, '.', *after])} -> {' '.join([*lead, *['.'] * index.ndim, *after])}"
    return call.emit("pool", call.tensors(0), {"equation": parse(text), "function": "other"})


@rule("GatherND")
def _gather_places(call: Call) -> None:
    """Picks places of the first dimensions; those behind them pass."""
    names, lead = call.tensors(0, 1), int(call.attribute("batch_dims", 0))
    index = call.shape(names[1])
    rest = [f"a{d}" for d in range(lead + index[-1], call.rank)]
    whole = ["."] * (call.rank - len(rest))
    dots = ["."] * (len(index) - 1)
    equation = parse(f"{' '.join([*whole, *rest])}, {' '.join([*dots, '.'])} -> {' '.join([*dots, *rest])}")
    call.emit("pool", names, {"equation": equation, "function": "other"})


@rule("GatherElements")
def _gather_elements(call: Call) -> None:
    """Picks along one dimension; the others pass where the index goes over all of them."""
    names, axis = call.tensors(0, 1), call.axis()
    same = [d != axis and n == m for d, (n, m) in enumerate(zip(*map(call.shape, names), strict=True))]
    dims = " ".join(f"a{d}" if s else "." for d, s in enumerate(same))
    call.emit("pool", names, {"equation": parse(f"{dims}, {dims} -> {dims}"), "function": "other"})


# -- tensors from nothing -------------------------------------------------------------------


@rule("ConstantOfShape")
def _make(call: Call) -> None:
    if not _told(call, 0):
        return unknown(call, "its sizes are computed from numbers")
    return call.emit("make", (), ops.make(len(call.output)))


@rule("Range", "EyeLike")
def _positions(call: Call) -> None:
    call.emit("unknown", (), ops.unknown("its numbers depend on their position"))


@rule("Shape", "Size")
def _measured(call: Call) -> None:
    dims = measured(call.node)
    if dims is None or not call.knows(call.value(0)):
        return unknown(call, "its sizes are computed with")
    names = " ".join("." if d in dims else f"a{d}" for d in range(call.rank))
    return call.emit("pool", call.tensors(0), {"equation": parse(f"{names} -> ."), "function": "other"})
