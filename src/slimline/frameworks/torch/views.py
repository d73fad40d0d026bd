"""Views of a tensor: which operators make one, what part of it they show, and how a new view is put back.

`put_back` is the inverse of a view (Hu et al., functionalization in functorch): given what the viewed tensor held and
what the view holds now, the tensor that holds both. It is written with slices and concatenations, reshapes and
transpositions only, so that axes pass through a write as they pass through a read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor, fx

from slimline.frameworks.torch.operators import argument, aten, packet

LAST = 2**63 - 1
"""The end of a slice that goes to the end."""

Emit = Callable[..., fx.Node]
"""``emit(operator, *arguments)`` adds an operator to the graph and answers its node."""

_RESHAPES = [
    "view",
    "reshape",
    "flatten",
    "unflatten",
    "squeeze",
    "unsqueeze",
    "_unsafe_view",
    "ravel",
    "view_as",
    "reshape_as",
]
_PERMUTES = [
    "permute",
    "movedim",
    "moveaxis",
    "transpose",
    "swapaxes",
    "swapdims",
    "t",
    "numpy_T",
    "mT",
    "mH",
    "matrix_H",
    "adjoint",
]
_EXPANDS = ["expand", "expand_as", "broadcast_to"]
_LISTS = [
    "split",
    "split_with_sizes",
    "chunk",
    "tensor_split",
    "unsafe_chunk",
    "unsafe_split",
    "unbind",
    "hsplit",
    "vsplit",
    "dsplit",
]


class View:
    """A tensor that shares memory with others.

    Attributes
    ----------
    maker : the operator that made it, or the placeholder or attribute that it is.
    parent : what it is a view of; None of a tensor that owns its memory.
    value : its shape, strides and place in the memory, without numbers.
    content : the node that holds what is in it, as of the write number `version`; `contents` all that ever did.
    parts : the tensors of the list that it was taken from.
    writes : the views through which its memory was written to, in order, if it owns it.
    """

    def __init__(self, maker: fx.Node, parent: View | None, value: Tensor) -> None:
        self.maker, self.parent, self.value = maker, parent, value
        self.content, self.version = maker, 0
        self.contents = {maker}
        self.root: View = self if parent is None else parent.root
        self.writes: list[View] = []
        self.parts: list[Tensor] = []

    def hold(self, content: fx.Node) -> None:
        """Let it hold what a node gives."""
        self.content = content
        self.contents.add(content)

    def ancestors(self) -> list[View]:
        """It, what it is a view of, and so on up to the tensor that owns the memory."""
        return [self] if self.parent is None else [self, *self.parent.ancestors()]

    @property
    def kind(self) -> str:
        """Name of the operator that makes it of its parent; that of a list where it is taken from one."""
        node = self.maker.args[0] if packet(self.maker) == "getitem" else self.maker
        assert isinstance(node, fx.Node)
        return packet(node).removeprefix("aten.").rstrip("_")

    def box(self) -> tuple[int, Any, bool] | None:
        """Dimension and positions of the parent that it shows, and whether the dimension disappears; None for other
        views. Positions are a range where the dimension has a fixed size, else the slice as it was written, or None
        where that is a number which the graph computes."""
        assert self.parent is not None
        before = self.parent.value.shape
        if self.kind in _LISTS:
            return self._part(before)
        if self.kind == "select":
            dim, index = int(argument(self.maker, "dim")) % len(before), argument(self.maker, "index")
            if isinstance(index, fx.Node):
                return dim, None, True
            fixed = isinstance(before[dim], int)
            return dim, range(before[dim])[index:][:1] if fixed else slice(index, index + 1), True
        if self.kind in ("slice", "narrow"):
            dim = int(argument(self.maker, "dim")) % len(before)
            start = argument(self.maker, "start")
            if self.kind == "slice":
                end, step = argument(self.maker, "end"), argument(self.maker, "step")
            else:
                length, step = argument(self.maker, "length"), 1
                end = start + length if isinstance(start, int) and isinstance(length, int) else None
                if end is None or (start < 0 and end == 0):
                    return (dim, None, False) if end is None else (dim, slice(start, None), False)
            if any(isinstance(x, fx.Node) for x in (start, end, step)):
                return dim, None, False
            fixed = isinstance(before[dim], int)
            return dim, range(before[dim])[start:end:step] if fixed else slice(start, end, step), False
        return None

    def _part(self, before: Sequence[Any]) -> tuple[int, Any, bool] | None:
        """Which positions one of the tensors of a list shows."""
        source, index = self.maker.args
        assert isinstance(source, fx.Node) and isinstance(index, int)
        if self.kind == "unbind":
            dim = int(argument(source, "dim")) % len(before)
            return dim, range(index, index + 1), True
        fixed = [d for d, n in enumerate(before) if isinstance(n, int) and n != self.parts[0].shape[d]]
        if not fixed:  # one part that is all, or parts of a size that is free
            return None if len(self.parts) > 1 else (0, slice(None), False)
        start = sum(int(p.shape[fixed[0]]) for p in self.parts[:index])
        return fixed[0], range(start, start + int(self.parts[index].shape[fixed[0]])), False

    def region(self, ancestor: View) -> dict[int, range]:
        """Of dimensions of an ancestor, the positions that it lies within; as far as they can be told."""
        chain = self.ancestors()
        places: list[int] = list(range(ancestor.value.dim()))
        ranges: dict[int, range] = {}
        for view in reversed(chain[: chain.index(ancestor)]):
            box = None if view.alike else view.box()
            if box is None:
                if view.alike:
                    continue
                break
            dim, span, gone = box
            place = places[dim]
            if isinstance(span, range):
                ranges[place] = ranges[place][span.start : span.stop : span.step] if place in ranges else span
            if gone:
                places.pop(dim)
        return ranges

    def apart(self, other: View) -> bool:
        """Whether the two surely share no position, in any batch."""
        mine, others = self.ancestors(), other.ancestors()
        ancestor = next(view for view in mine if view in others)
        left, right = self.region(ancestor), other.region(ancestor)
        return any(not set(left[d]) & set(right[d]) for d in left.keys() & right.keys())

    @property
    def alike(self) -> bool:
        """Whether it shows all of its parent, in the same layout."""
        assert self.parent is not None
        if self.kind in ("select", "narrow", *_LISTS):
            return False
        if self.kind == "slice":
            start, end, step = (argument(self.maker, name) for name in ("start", "end", "step"))
            return start in (None, 0) and end in (None, LAST) and step == 1
        return same(self.value, self.parent.value)


def same(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors show the same part of one memory in the same layout."""
    alike = left.dim() == right.dim() and left.dtype == right.dtype and left.is_conj() == right.is_conj()
    pairs: list[tuple[object, object]] = [
        *zip(left.shape, right.shape, strict=False),
        *zip(left.stride(), right.stride(), strict=False),
    ]
    pairs.append((left.storage_offset(), right.storage_offset()))
    return alike and all(str(a) == str(b) for a, b in pairs) and shared(left) == shared(right)


def shared(value: Tensor) -> int:
    """What tells the memory of a tensor from that of others."""
    return int(value.untyped_storage()._cdata)


def put_back(view: View, old: fx.Node, new: fx.Node, written: View, emit: Emit) -> fx.Node | None:
    """What the parent of a view holds once the view holds `new`; None for a view that has no inverse here.

    `old` is what the parent held, and `written` the view of the view that was written to.
    """
    parent, kind = view.parent, view.kind
    assert parent is not None
    if view.alike:
        return new
    box = view.box()
    if box is not None and box[1] is not None:
        return _paste(box, parent.value.shape, old, new, emit)
    if kind == "select":
        return emit(aten.select_scatter.default, old, new, box[0], argument(view.maker, "index"))  # type: ignore[index]
    if kind == "slice":
        ends = (argument(view.maker, name) for name in ("start", "end", "step"))
        return emit(aten.slice_scatter.default, old, new, box[0], *ends)  # type: ignore[index]
    if kind in _RESHAPES:
        sizes = [n if isinstance(n, int) else emit(aten.sym_size.int, old, d) for d, n in enumerate(parent.value.shape)]
        return emit(aten.reshape.default, new, sizes)
    if kind in _PERMUTES:
        order = _order(kind, view.maker, parent.value.dim())
        return emit(aten.permute.default, new, [order.index(d) for d in range(len(order))])
    if kind in _EXPANDS:
        return _shrink(view, new, written, emit)
    if kind == "diagonal":
        return _cross(view, old, new, emit)
    if kind == "view_as_real":
        return emit(aten.view_as_complex.default, emit(aten.contiguous.default, new))
    if kind == "view_as_complex":
        return emit(aten.view_as_real.default, new)
    if kind in ("conj", "_conj"):
        return emit(aten.conj.default, new)
    if kind in ("real", "imag"):
        other = emit(getattr(aten, "imag" if kind == "real" else "real").default, old)
        return emit(aten.complex.default, *((new, other) if kind == "real" else (other, new)))
    return None


def _ends(span: slice) -> tuple[Any, Any, Any]:
    return span.start, span.stop, span.step


def _paste(box: tuple[int, Any, bool], sizes: Sequence[Any], old: fx.Node, new: fx.Node, emit: Emit) -> fx.Node | None:
    """`old` with `new` at the positions of a box: what is before it, it, and what is after."""
    dim, span, gone = box
    if gone:
        new = emit(aten.unsqueeze.default, new, dim)
    if isinstance(span, slice):
        return _paste_free(dim, span, gone, old, new, emit)
    size = int(sizes[dim])
    if not len(span):
        return old
    if span.step > 1 and len(span) > 1:
        where = {position: size + k for k, position in enumerate(span)}
        both = emit(aten.cat.default, [old, new], dim)
        rows = np.array([where.get(k, k) for k in range(size)], np.int64)
        return emit(aten.index_select.default, both, dim, rows)
    parts = [(0, span.start), None, (span.start + len(span), size)]
    pieces = [
        new if part is None else emit(aten.slice.Tensor, old, dim, *part)
        for part in parts
        if part is None or _any(part)
    ]
    return pieces[0] if len(pieces) == 1 else emit(aten.cat.default, pieces, dim)


def _any(part: tuple[int, int]) -> bool:
    return part[0] < part[1]


def _paste_free(dim: int, span: slice, gone: bool, old: fx.Node, new: fx.Node, emit: Emit) -> fx.Node | None:
    """The same where the size of the dimension is free, such as that of the batch."""
    start, end, step = _ends(span)
    last = end in (None, LAST) or (gone and start == -1)
    if step not in (None, 1) or (
        not last and isinstance(start, int) and isinstance(end, int) and (start < 0) != (end < 0)
    ):
        return emit(aten.slice_scatter.default, old, new, dim, *((start, end, step) if not gone else (start, end)))
    before = [] if start in (None, 0) else [emit(aten.slice.Tensor, old, dim, 0, start)]
    after = [] if last else [emit(aten.slice.Tensor, old, dim, end, LAST)]
    return emit(aten.cat.default, [*before, new, *after], dim) if before or after else new


def _order(kind: str, node: fx.Node, rank: int) -> list[int]:
    """Which dimension of what is viewed each dimension of the view is."""
    order = list(range(rank))
    if kind == "permute":
        return [d % rank for d in argument(node, "dims")]
    if kind in ("movedim", "moveaxis"):
        sources, targets = (
            [x] if isinstance(x, int) else x for x in (argument(node, n) for n in ("source", "destination"))
        )
        pairs = sorted((t % rank, s % rank) for s, t in zip(sources, targets, strict=True))
        order = [d for d in order if d not in {s for _, s in pairs}]
        for target, source in pairs:
            order.insert(target, source)
        return order
    if kind in ("t", "numpy_T"):
        return order[::-1]
    if rank < 2:
        return order
    names = {"swapaxes": ("axis0", "axis1"), "transpose": ("dim0", "dim1"), "swapdims": ("dim0", "dim1")}.get(kind)
    a, b = (rank - 2, rank - 1) if names is None else (argument(node, n) % rank for n in names)
    order[a], order[b] = order[b], order[a]
    return order


def _cross(view: View, old: fx.Node, new: fx.Node, emit: Emit) -> fx.Node | None:
    """`old` with `new` on a diagonal, of which there is one number for each row that it passes."""
    assert view.parent is not None
    sizes = view.parent.value.shape
    offset = argument(view.maker, "offset")
    first, second = (argument(view.maker, name) % len(sizes) for name in ("dim1", "dim2"))
    if not (isinstance(sizes[first], int) and isinstance(sizes[second], int)):
        return None
    on = np.eye(sizes[first], sizes[second], offset, dtype=bool)
    if not on.any():
        return old
    place = np.maximum(np.cumsum(on.any(1)) - 1, 0)  # which number of the diagonal a row has
    rows = emit(aten.index_select.default, new, len(sizes) - 2, place)
    low, high = sorted((first, second))
    order = list(range(len(sizes) - 2))
    order.insert(first - (second < first), len(sizes) - 2)
    spread = emit(aten.unsqueeze.default, emit(aten.permute.default, rows, order), second)
    shape = [sizes[d] if d in (low, high) else 1 for d in range(len(sizes))]
    return emit(aten.where.self, (on if first == low else on.T).reshape(shape).copy(), spread, old)


def _shrink(view: View, new: fx.Node, written: View, emit: Emit) -> fx.Node | None:
    """One of the copies of each repeated position, which are one in memory: one of those that were written."""
    assert view.parent is not None
    before, after = view.parent.value.shape, view.value.shape
    region, lead = written.region(view), len(after) - len(before)
    chain = written.ancestors()
    known = all(v.alike or v.box() is not None for v in chain[: chain.index(view)])
    for dim in reversed(range(len(after))):
        if dim >= lead and str(before[dim - lead]) == str(after[dim]):
            continue
        if not known:
            return None
        first = region[dim].start if dim in region else 0
        new = (
            emit(aten.select.int, new, dim, first)
            if dim < lead
            else emit(aten.slice.Tensor, new, dim, first, first + 1)
        )
    return new
