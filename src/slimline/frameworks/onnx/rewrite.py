"""Surgery on a native model: stored tensors are sliced, and every number that counts a pruned axis is rewritten."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from slimline.basics.errors import SlimlineError
from slimline.frameworks.base import Array
from slimline.frameworks.onnx.native import Editor, Native
from slimline.frameworks.onnx.operators import affine, is_number, named, standard, stored
from slimline.graph.ir import Node
from slimline.graph.removal import Removal, take

Edit = Callable[["Surgery", ir.Node, Node], None]


def replace(native: Native, tensors: Mapping[str, Array]) -> Native:
    """A copy with these tensors, by name and of the same shapes, in place of its own."""
    editor = Editor(native)
    for name, array in tensors.items():
        if name not in native.tensors:
            raise SlimlineError(f"The model has no tensor {name!r}: take the names from its parameters().")
        if native.tensors[name].shape != np.shape(array):
            raise SlimlineError(
                f"{name} has shape {native.tensors[name].shape}, not {np.shape(array)}: replace keeps shapes."
            )
        editor.put(name, array)
    return editor.done()


def apply(native: Native, plan: Removal, example: tuple[Array, ...]) -> Native:
    """A copy from which the plan's positions are removed; it is run once on `example` to prove that it runs."""
    editor = Editor(native)
    surgery = Surgery(editor, plan)
    for name, array in native.tensors.items():
        retained = plan.retained(name)
        if any(index is not None for index in retained):
            surgery.unshare(name)
            editor.put(name, take(array, retained))
    neutral = {node.name: node for node in plan.graph.nodes}
    for node in list(editor.graph):
        edit = EDITS.get(node.op_type) if standard(node) else None
        name = named(node)
        if edit is not None and name in neutral and neutral[name].kind != "unknown":
            edit(surgery, node, neutral[name])
    result = editor.done()
    try:
        result.session(example)
    except SlimlineError as reason:
        raise SlimlineError(f"The model does not run once it is pruned ({reason}) report it to slimline.") from reason
    return result


class Surgery:
    """What an edit needs: the plan, and the graph under the knife."""

    def __init__(self, editor: Editor, plan: Removal) -> None:
        self.editor, self.plan = editor, plan

    def unshare(self, name: str) -> None:
        """Numbers that happen to be a weight, too, stay what they are."""
        value = self.editor.values[name]
        for user, index in list(value.uses()):
            if is_number(user, index):
                content = stored(value)
                assert content is not None
                self.editor.numbers(user, index, content)

    def old(self, value: str | None) -> tuple[int, ...]:
        """Shape of a value before."""
        return self.plan.graph.values[value or ""].shape

    def new(self, value: str | None) -> tuple[int, ...]:
        """Shape of a value after."""
        return self.plan.shape(value or "")

    def rows(self, neutral: Node, picked: Array) -> Array | None:
        """Where the positions `picked` of the input, as far as the output keeps them, are now; None if unchanged."""
        axis = neutral.attributes["axis"]
        retained = self.plan.retained(neutral.inputs[0] or "")[axis]
        if retained is None:
            return None
        left = self.plan.retained(neutral.outputs[0])[axis]
        positions = picked if left is None else picked[left]
        now = np.searchsorted(retained, positions)
        if len(now) and (now.max() >= len(retained) or not np.array_equal(retained[now], positions)):
            raise AssertionError(f"{neutral.label} reads positions that the plan removes")
        return now


def _groups(name: str) -> Edit:
    def edit(surgery: Surgery, node: ir.Node, neutral: Node) -> None:
        if "g" in neutral.attributes["equation"].sizes:
            after = surgery.plan.axis_size(neutral.name, "g")
            node.attributes[name] = ir.AttrInt64(name, after)

    return edit


def _width(surgery: Surgery, node: ir.Node, neutral: Node) -> None:
    if "hidden_size" in node.attributes:
        node.attributes["hidden_size"] = ir.AttrInt64("hidden_size", surgery.plan.axis_size(neutral.name, "h"))


def _sizes(index: int) -> Edit:
    """Sizes of the output; those of a resize may be of some dimensions only."""

    def edit(surgery: Surgery, node: ir.Node, neutral: Node) -> None:
        if index >= len(node.inputs) or node.inputs[index] is None:
            return
        old, new = surgery.old(neutral.outputs[0]), surgery.new(neutral.outputs[0])
        axes = node.attributes.get("axes")
        if axes is not None:
            old, new = (tuple(shape[a] for a in axes.value) for shape in (old, new))
        line = affine(node.inputs[index])
        if old == new or line is None:
            return
        slope, start, divisor = (np.array(part, np.int64) for part in line[:3])
        first = len(old) - len(start)  # an expansion may name the last dimensions only
        source = surgery.new(neutral.inputs[0]) if neutral.inputs else ()
        for k in range(len(start)):
            before, after = old[first + k], new[first + k]
            if before == after or start[k] == -1:
                continue
            if slope[k]:
                common = math.gcd(int(slope[k]) * after, int(divisor[k]) * before)
                slope[k], divisor[k] = slope[k] * after // common, divisor[k] * before // common
            elif start[k] == 0 and node.op_type == "Reshape":
                start[k] = 0 if k < len(source) and source[k] == after else after
            elif start[k] != 1 or node.op_type != "Expand":
                start[k] = after
        if not slope.any() or line.factor is None:
            surgery.editor.numbers(node, index, start)
            return
        editor = surgery.editor
        name = str(node.outputs[0].name)
        value = editor.insert(
            node, "Mul", [line.factor, editor.constant(slope, f"{name}_slope")], name=f"{name}_scaled"
        )
        if (divisor != 1).any():
            value = editor.insert(node, "Div", [value, editor.constant(divisor, f"{name}_divisor")])
        if start.any():
            value = editor.insert(node, "Add", [value, editor.constant(start, f"{name}_start")], name=f"{name}_sizes")
        node.replace_input_with(index, value)

    return edit


def _repeats(surgery: Surgery, node: ir.Node, neutral: Node) -> None:
    """Copies of a dimension of one position are as many as are left of them."""
    counts = stored(node.inputs[1])
    if counts is None or neutral.kind != "expand":
        return
    changed = [
        new if one == 1 else int(n)
        for n, one, new in zip(counts, surgery.old(neutral.inputs[0]), surgery.new(neutral.outputs[0]), strict=True)
    ]
    surgery.editor.numbers(node, 1, np.array(changed))


def _split(surgery: Surgery, node: ir.Node, neutral: Node) -> None:
    if neutral.kind != "split":
        return
    axis = neutral.attributes["axis"]
    sizes = [surgery.new(name)[axis] for name in neutral.outputs]
    if sizes != list(neutral.attributes["sizes"]):
        node.attributes.pop("num_outputs", None)
        surgery.editor.numbers(node, 1, np.array(sizes))


def _positions(surgery: Surgery, node: ir.Node, neutral: Node) -> None:
    """A slice stays one where the positions that are left follow each other, otherwise they are listed."""
    a = neutral.attributes
    if neutral.kind == "slice":
        rows = surgery.rows(neutral, np.arange(a["start"], a["stop"], a["step"]))
    elif neutral.kind == "take":
        rows = surgery.rows(neutral, np.array(a["indices"]))
    else:
        return
    if rows is None:
        return
    first = int(rows[0]) if len(rows) else 0
    if np.array_equal(rows, np.arange(first, first + len(rows))):
        for index, number in ((1, first), (2, first + len(rows)), (4, 1)):
            surgery.editor.numbers(node, index, np.array([number]))
    else:
        places = surgery.editor.constant(rows.astype(np.int64), f"{node.outputs[0].name}_positions")
        chosen = surgery.editor.insert(node, "Gather", [node.inputs[0], places], {"axis": a["axis"]})
        place_of(surgery.editor, node, chosen)


def place_of(editor: Editor, node: ir.Node, value: ir.Value) -> None:
    """What was made takes the place and the name of what an operator makes."""
    old = node.outputs[0]
    name = str(old.name)
    editor.redirect(old, value)
    if old.name == name:  # it was no output of the model
        temporary = str(value.name)
        old.name = editor.unique(f"{name}_before")
        editor.values[str(old.name)] = old
        value.name = name
        editor.values[name] = value
        del editor.values[temporary]


def _gather(surgery: Surgery, node: ir.Node, neutral: Node) -> None:
    if neutral.kind == "select":
        retained = surgery.plan.retained(neutral.inputs[0] or "")[neutral.attributes["axis"]]
        if retained is not None:
            index = np.array(np.searchsorted(retained, neutral.attributes["index"]), np.int64)
            node.replace_input_with(1, surgery.editor.constant(index, f"{neutral.outputs[0]}_position"))
    elif neutral.kind == "take":
        rows = surgery.rows(neutral, np.array(neutral.attributes["indices"]))
        if rows is not None:
            index = rows.astype(np.int64)
            node.replace_input_with(1, surgery.editor.constant(index, f"{neutral.outputs[0]}_positions"))


def _pad(surgery: Surgery, node: ir.Node, neutral: Node) -> None:
    if neutral.kind != "pad":
        return
    source, output = neutral.inputs[0] or "", neutral.outputs[0]
    widths = []
    for d, (before, after) in enumerate(neutral.attributes["widths"]):
        size = surgery.old(source)[d]
        inner, outer = surgery.plan.retained(source)[d], surgery.plan.retained(output)[d]
        inner = np.arange(size) if inner is None else inner
        outer = np.arange(size + before + after) if outer is None else outer
        front = int((outer < before).sum()) if before > 0 else -int((inner < -before).sum())
        back = int((outer >= before + size).sum()) if after > 0 else -int((inner >= size + after).sum())
        widths.append((front, back))
    if widths == [tuple(w) for w in neutral.attributes["widths"]]:
        return
    axes = stored(node.inputs[3]) if len(node.inputs) > 3 else None
    chosen = range(len(widths)) if axes is None else [int(a) % len(widths) for a in axes.ravel()]
    surgery.editor.numbers(node, 1, np.array([*(widths[d][0] for d in chosen), *(widths[d][1] for d in chosen)]))


EDITS: dict[str, Edit] = {
    "Conv": _groups("group"),
    "ConvTranspose": _groups("group"),
    "GroupNormalization": _groups("num_groups"),
    "LSTM": _width,
    "GRU": _width,
    "RNN": _width,
    "Reshape": _sizes(1),
    "Expand": _sizes(1),
    "ConstantOfShape": _sizes(0),
    "Resize": _sizes(3),
    "Tile": _repeats,
    "Split": _split,
    "Slice": _positions,
    "Gather": _gather,
    "Pad": _pad,
}
"""By operator, how its numbers follow a plan. Operators that are not here hold no number that counts an axis."""
