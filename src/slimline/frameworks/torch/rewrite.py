"""Surgery on a native model: parameters are sliced, and every number that counts a pruned axis is rewritten."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx

from slimline.basics.errors import SlimlineError, first_line
from slimline.frameworks.base import Array
from slimline.frameworks.torch.native import Native, free_views, set_tensors, tensors, to_tensors
from slimline.frameworks.torch.operators import add_constant, argument, aten, packet, set_argument
from slimline.graph.ir import Node

if TYPE_CHECKING:
    from slimline.graph.removal import Removal

Edit = Callable[["Surgery", fx.Node, Node], None]


def replace(native: Native, parameters: Mapping[str, Array]) -> Native:
    """A copy with these tensors, by state-dict name and of the same shapes, in place of its own."""
    result = copy.deepcopy(native)
    stored = tensors(result)
    replacements = []
    for name, array in parameters.items():
        if name not in stored:
            raise SlimlineError(f"The model has no tensor {name!r}: take the names from its parameters().")
        old = stored[name]
        if tuple(old.shape) != array.shape:
            raise SlimlineError(f"{name} has shape {tuple(old.shape)}, not {array.shape}: replace keeps shapes.")
        replacements.append((name, torch.tensor(array).to(old.dtype)))
    set_tensors(result, replacements)
    return result


def apply(native: Native, plan: Removal, example: tuple[Array, ...]) -> Native:
    """A copy from which the plan's positions are removed; it is run once on `example` to prove that it runs.

    State-dict names and names of activations stay.
    """
    result = copy.deepcopy(native)
    sliced = ((name, take(tensor.detach(), plan.retained(name))) for name, tensor in tensors(result).items())
    set_tensors(result, ((name, tensor) for name, tensor in sliced if tensor is not None))
    surgery = Surgery(result, plan)
    neutral = {node.name: node for node in plan.graph.nodes}
    for node in list(result.graph.nodes):
        for stale in ("val", "tensor_meta"):
            node.meta.pop(stale, None)
        edit = EDITS.get(packet(node).rstrip("_")) if node.op == "call_function" else None
        if edit is not None and node.name in neutral and neutral[node.name].kind != "unknown":
            edit(surgery, node, neutral[node.name])
    result.graph.lint()
    free_views(result)
    try:
        with torch.no_grad():
            result(*to_tensors(example))
    except (RuntimeError, IndexError) as reason:
        raise SlimlineError(
            f"The model does not run once it is pruned ({first_line(reason)}): report it to slimline."
        ) from reason
    return result


def take(tensor: Tensor, retained: tuple[np.ndarray | None, ...]) -> Tensor | None:
    """The positions that stay of every dimension, or None where all do."""
    if all(index is None for index in retained):
        return None
    for dim, index in enumerate(retained):
        if index is not None:
            tensor = tensor.index_select(dim, torch.from_numpy(index))
    return tensor.contiguous()


class Surgery:
    """What an edit needs: the plan, and the graph under the knife."""

    def __init__(self, native: Native, plan: Removal) -> None:
        self.native = native
        self.plan = plan

    def old(self, value: str | None) -> tuple[int, ...]:
        """Shape of a value before."""
        return self.plan.graph.values[value or ""].shape

    def new(self, value: str | None) -> tuple[int, ...]:
        """Shape of a value after."""
        return self.plan.shape(value or "")

    def sizes(self, node: fx.Node, name: str, value: str, first: int = 0) -> None:
        """Rewrite a list of sizes, which counts the dimensions of `value` from `first` on."""
        old, new = self.old(value)[first:], self.new(value)[first:]
        entries = [self.size(node, e, o, n) for e, o, n in zip(argument(node, name), old, new, strict=False)]
        set_argument(node, name, entries)

    def size(self, node: fx.Node, entry: Any, old: int, new: int) -> Any:
        """One size: -1 and what did not change stay; arithmetic on the batch size is scaled."""
        if old == new or (isinstance(entry, int) and entry == -1):
            return entry
        if isinstance(entry, int):
            return new
        with self.native.graph.inserting_before(node):
            scaled = self.native.graph.call_function(operator.mul, (entry, new))
            return self.native.graph.call_function(operator.floordiv, (scaled, old))

    def constant(self, node: fx.Node, positions: np.ndarray) -> fx.Node:
        """An index tensor that `node` can read."""
        name = add_constant(self.native, f"{node.name}_positions", torch.from_numpy(positions.astype(np.int64)))
        with self.native.graph.inserting_before(node):
            return self.native.graph.get_attr(name)

    def rows(self, neutral: Node, picked: np.ndarray) -> np.ndarray | None:
        """Where the positions `picked` of the input, as far as the output keeps them, are now; None if unchanged."""
        axis = neutral.attributes["axis"]
        retained_inputs = self.plan.retained(neutral.inputs[0] or "")[axis]
        if retained_inputs is None:
            return None
        retained_outputs = self.plan.retained(neutral.outputs[0])[axis]
        positions = picked if retained_outputs is None else picked[retained_outputs]
        now = np.searchsorted(retained_inputs, positions)
        if len(now) and (now.max() >= len(retained_inputs) or not np.array_equal(retained_inputs[now], positions)):
            raise AssertionError(f"{neutral.label} reads positions that the plan removes")
        return now


def _groups(name: str) -> Edit:
    def edit(surgery: Surgery, node: fx.Node, neutral: Node) -> None:
        before = neutral.attributes["equation"].sizes.get("g")
        if before is not None:
            after = surgery.plan.axis_size(neutral.name, "g")
            set_argument(node, name, surgery.size(node, argument(node, name), before, after))

    return edit


def _sizes(name: str) -> Edit:
    return lambda surgery, node, neutral: surgery.sizes(node, name, neutral.outputs[0])


def _repeats(surgery: Surgery, node: fx.Node, neutral: Node) -> None:
    """Copies of a dimension of one position are as many as are left of them."""
    name = "dims" if packet(node) == "aten.tile" else "repeats"
    counts, output = list(argument(node, name)), neutral.outputs[0]
    before = (1,) * (len(surgery.old(output)) - len(surgery.old(neutral.inputs[0]))) + surgery.old(neutral.inputs[0])
    first = len(before) - len(counts)
    for d, (one, old, new) in enumerate(zip(before, surgery.old(output), surgery.new(output), strict=True)):
        if one == 1 and d >= first:
            counts[d - first] = surgery.size(node, counts[d - first], old, new)
    set_argument(node, name, counts)


def _unflatten(surgery: Surgery, node: fx.Node, neutral: Node) -> None:
    rank = len(surgery.old(neutral.inputs[0]))
    surgery.sizes(node, "sizes", neutral.outputs[0], argument(node, "dim") % rank)


def _normalized(surgery: Surgery, node: fx.Node, neutral: Node) -> None:
    count = len(argument(node, "normalized_shape"))
    set_argument(node, "normalized_shape", list(surgery.new(neutral.outputs[0])[-count:]))


def _split(surgery: Surgery, node: fx.Node, neutral: Node) -> None:
    axis = neutral.attributes["axis"]
    sizes = [surgery.new(name)[axis] for name in neutral.outputs]
    if sizes != list(neutral.attributes["sizes"]):
        node.target = aten.split_with_sizes.default
        node.args, node.kwargs = (node.args[0], sizes, axis), {}


def _positions(surgery: Surgery, node: fx.Node, neutral: Node) -> None:
    """A slice stays one where the positions that are left follow each other, otherwise they are listed."""
    a = neutral.attributes
    rows = surgery.rows(neutral, np.arange(a["start"], a["stop"], a["step"]))
    if rows is None:
        return
    first = int(rows[0]) if len(rows) else 0
    if np.array_equal(rows, np.arange(first, first + len(rows))):
        node.target = aten.slice.Tensor
        node.args = (node.args[0], a["axis"], first, first + len(rows), 1)
    else:
        node.target = aten.index_select.default
        node.args = (node.args[0], a["axis"], surgery.constant(node, rows))
    node.kwargs = {}


def _select(surgery: Surgery, node: fx.Node, neutral: Node) -> None:
    retained = surgery.plan.retained(neutral.inputs[0] or "")[neutral.attributes["axis"]]
    if retained is not None:
        set_argument(node, "index", int(np.searchsorted(retained, neutral.attributes["index"])))


def _take(surgery: Surgery, node: fx.Node, neutral: Node) -> None:
    if neutral.kind != "take":
        return
    rows = surgery.rows(neutral, np.array(neutral.attributes["indices"]))
    if rows is not None:
        node.target = aten.index_select.default
        node.args, node.kwargs = (node.args[0], neutral.attributes["axis"], surgery.constant(node, rows)), {}


def _pad(surgery: Surgery, node: fx.Node, neutral: Node) -> None:
    if neutral.kind != "pad":
        return
    source, output = neutral.inputs[0] or "", neutral.outputs[0]
    widths = []
    for d, (before, after) in enumerate(neutral.attributes["widths"]):
        size = surgery.old(source)[d]
        inner = surgery.plan.retained(source)[d]
        outer = surgery.plan.retained(output)[d]
        inner = np.arange(size) if inner is None else inner
        outer = np.arange(size + before + after) if outer is None else outer
        front = int((outer < before).sum()) if before > 0 else -int((inner < -before).sum())
        back = int((outer >= before + size).sum()) if after > 0 else -int((inner >= size + after).sum())
        widths.append((front, back))
    count = len(argument(node, "pad")) // 2
    flat = [w for pair in reversed(widths[len(widths) - count :]) for w in pair]
    set_argument(node, "pad", flat)


def _attention(surgery: Surgery, node: fx.Node, neutral: Node) -> None:
    """The scale is the trained one, whatever is left of the width."""
    before, after = (look(neutral.inputs[0])[-1] for look in (surgery.old, surgery.new))
    if before != after and argument(node, "scale") is None:
        set_argument(node, "scale", before**-0.5)


def _contiguous(surgery: Surgery, node: fx.Node, neutral: Node) -> None:
    """A view as complex numbers needs even strides, which a cut may have made odd."""
    with surgery.native.graph.inserting_before(node):
        node.update_arg(0, surgery.native.graph.call_function(aten.contiguous.default, (node.args[0],)))


EDITS: dict[str, Edit] = {
    **{f"aten.conv{k}{n}d": _groups("groups") for n in (1, 2, 3) for k in ("", "_transpose")},
    "aten.convolution": _groups("groups"),
    "aten.group_norm": _groups("num_groups"),
    "aten.channel_shuffle": _groups("groups"),
    "aten.layer_norm": _normalized,
    "aten.rms_norm": _normalized,
    "aten.view": _sizes("size"),
    "aten._unsafe_view": _sizes("size"),
    "aten.reshape": _sizes("shape"),
    "aten.expand": _sizes("size"),
    **{f"aten.{k}{name}": _sizes("size") for name in ("zeros", "ones", "full", "empty") for k in ("", "new_")},
    "aten.repeat": _repeats,
    "aten.tile": _repeats,
    "aten.unflatten": _unflatten,
    **{f"aten.{name}": _split for name in ("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_chunk")},
    "aten.unsafe_split": _split,
    "aten.slice": _positions,
    "aten.narrow": _positions,
    "aten.select": _select,
    "aten.index": _take,
    "aten.index_select": _take,
    "aten.pad": _pad,
    "aten.constant_pad_nd": _pad,
    "aten.scaled_dot_product_attention": _attention,
    "aten.view_as_complex": _contiguous,
}
"""By operator, how its numbers follow a plan. Operators that are not here hold no number that counts an axis."""
