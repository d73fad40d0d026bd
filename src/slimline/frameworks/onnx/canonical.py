"""The canonical form in which every model is held, whichever exporter wrote it.

- The operators are those of one version of ONNX, 13 or newer; functions are written out; all constants are
  initializers.
- Of the sizes of the inputs the batch may be free, the first dimension, and the others that the file leaves so and the
  network takes (`slimline.frameworks.onnx.sizes`); the rest are those of the example.
- What sizes and stored tensors alone decide is computed here: it becomes a constant, or, where it counts the batch, a
  multiple of it and a constant (``batch * a + b``). What follows other sizes is computed as the file does, of those
  dimensions alone that they change; of sizes for a tensor the numbers that they do not change are apart
  (``sizes * a + b``). So the numbers of a graph stay when layers become narrower.
- An If whose condition sizes and stored tensors decide is the branch that is taken.
- A slice takes positions of one dimension. Padding is told in numbers. Operators have names, and values names without
  slashes.

What comes out is run and compared with what came in.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes

from slimline.basics.arrays import Example, in_order
from slimline.basics.errors import NoExample, SlimlineError
from slimline.frameworks.base import Array
from slimline.frameworks.onnx import follow, sizes
from slimline.frameworks.onnx.follow import Following
from slimline.frameworks.onnx.native import Editor, Native, is_standard
from slimline.frameworks.onnx.operators import (
    BATCH,
    QUANTIZED,
    SIZES,
    Affine,
    affine,
    attribute,
    counts,
    float_array,
    is_number,
    measured,
    nested,
    standard,
    stored,
)
from slimline.frameworks.onnx.run import Part, Session, apart, evaluate, outlines, read_names, reason_of, typed, whole
from slimline.frameworks.onnx.sizes import BATCH as SYMBOL
from slimline.frameworks.onnx.sizes import Symbols

log = logging.getLogger(__name__)

OLDEST = 13
"""The version of operators that models of older ones are converted to."""
FOLDED = 2**22
"""Most numbers of a constant that is stored instead of computed, unless what it is computed from is as large."""
MEMORY = 2**28
"""Most numbers that an input may have for which there is no example."""
FREE_BYTES, RATIO = 256 << 20, 256
"""What any tensor that is computed of the example may take, and all together that are computed of stored tensors alone:
so many bytes, or so many times those of weights and example if that is more."""
_PIECE = 2**20
"""Numbers that are compared at a time."""
PATIENCE = 120.0
"""Seconds that the example may take in a model with loops, which could have no end."""
_SIZED = frozenset({("Reshape", 1), ("Expand", 1), ("ConstantOfShape", 0), ("Resize", 3)})
"""Operators, and which of their inputs are the sizes of what they make."""
_RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
)


def canonical(proto: onnx.ModelProto, example: Example | None) -> tuple[Native, tuple[Array, ...]]:
    """The native model of a checked message, and its example inputs: of two rows where the batch is free.

    Raises
    ------
    NoExample : a size that only an example can tell.
    SlimlineError : a model that does not run, or that another opset would change.
    """
    source = apart(proto) if _opset(proto) >= OLDEST else Part(proto, {})
    original = Session(source, optimized=False)
    with _consistent():
        model = ir.from_proto(_modern(proto))
        _unpacked(model, source.weights)
        passes.RemoveInitializersFromInputsPass()(model)
        if model.functions:
            passes.InlinePass()(model)
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        passes.RemoveUnusedNodesPass()(model)
        _unpacked(model, {})
        if not list(model.graph):
            raise SlimlineError("The ONNX model computes nothing of its inputs: export it anew.")
        arrays = _example(model.graph, example)
        _bounded(model, arrays)
        if any(node.op_type in ("Loop", "Scan") for node in model.graph.all_nodes()):
            _ends(source, arrays)
        return _resolved(original, model, arrays)


def _unpacked(model: ir.Model, weights: Mapping[str, Array]) -> None:
    """Let the model hold its numbers as arrays, some of which are `weights` already: out of a message every reader
    would get a copy of its own."""
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.dtype != ir.DataType.STRING:
            array = weights[name] if name in weights else tensor.numpy()
            value.const_value = ir.tensor(array, name=name, dtype=tensor.dtype)


@contextmanager
def _consistent() -> Iterator[None]:
    """What onnx-ir raises of a model that contradicts itself, in a sentence: it raises all kinds."""
    try:
        yield
    except (SlimlineError, MemoryError):
        raise
    except Exception as reason:
        what = f"{type(reason).__name__}: {reason_of(reason)}" if str(reason) else type(reason).__name__
        raise SlimlineError(f"The ONNX model cannot be put together ({what}): export it anew.") from reason


def _opset(proto: onnx.ModelProto) -> int:
    return int(next(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")))


def _modern(proto: onnx.ModelProto) -> onnx.ModelProto:
    opset = _opset(proto)
    if opset >= OLDEST:
        return proto
    try:
        return onnx.version_converter.convert_version(proto, OLDEST)
    except Exception as reason:  # the converter raises many types
        raise SlimlineError(
            f"The ONNX model is of operators version {opset} and cannot be brought to version {OLDEST} "
            f"({reason_of(reason)}): export it anew with a newer opset."
        ) from reason


def _example(graph: ir.Graph, inputs: Example | None) -> tuple[Array, ...]:
    """Example inputs that fit what the graph says of its own; the batch is 2 where it is free."""
    names = [str(value.name) for value in graph.inputs]
    arrays = None if inputs is None else in_order(inputs, names, "The example")
    if arrays is not None and len(arrays) != len(names):
        raise SlimlineError(
            f"The model takes {len(names)} inputs ({', '.join(names)}), not {len(arrays)}: give one each."
        )
    rng = np.random.default_rng(0)
    examples = []
    for k, value in enumerate(graph.inputs):
        if not isinstance(value.type, ir.TensorType) or value.dtype is None or value.dtype == ir.DataType.STRING:
            raise SlimlineError(f"The input {value.name} is no tensor of numbers: give a model whose inputs are.")
        kind = np.dtype(value.dtype.numpy())
        if arrays is not None:
            array = typed(arrays[k], kind.name)
            _fits(value, array)
            examples.append(array)
            continue
        if value.shape is None:
            raise NoExample(f"The input {value.name} has no shape: pass example_inputs to load.")
        shape = [n if isinstance(n, int) else 2 if d == 0 else None for d, n in enumerate(value.shape)]
        if None in shape:
            raise NoExample(f"The input {value.name} has free sizes besides the batch: pass example_inputs to load.")
        sizes = [n for n in shape if n is not None]
        if np.prod(sizes, dtype=float) > MEMORY:
            raise SlimlineError(f"The input {value.name} of shape {tuple(sizes)} is too large: give a smaller one.")
        if kind.kind == "f" or kind.name == "bfloat16":
            examples.append(rng.normal(size=sizes).astype(kind))
        else:
            examples.append(np.ones(sizes, kind))
    return tuple(examples)


def _fits(value: ir.Value, array: Array) -> None:
    assert value.dtype is not None
    shape = value.shape
    same = shape is None or (
        len(shape) == array.ndim
        and all(n == m for d, (n, m) in enumerate(zip(shape, array.shape, strict=True)) if isinstance(n, int) and d)
    )
    if array.dtype != value.dtype.numpy() or not same or (array.ndim and len(array) == 0):
        shape_text = "any shape" if shape is None else f"({', '.join(map(str, shape))})"
        raise SlimlineError(
            f"The example of the input {value.name} is {array.dtype}{array.shape}, and the model takes "
            f"{np.dtype(value.dtype.numpy()).name} of {shape_text}: give that."
        )


def _ends(source: Part, example: Sequence[Array]) -> None:
    """Refuse a model with loops that do not come to an end."""
    try:
        Session(source, optimized=False, patience=PATIENCE)(example)
    except SlimlineError as reason:
        if "terminate" not in str(reason):
            raise
        raise SlimlineError(
            f"The ONNX model does not compute its example within {PATIENCE:g} seconds: let its loops end sooner, or "
            "export it without them."
        ) from reason


def _bounded(model: ir.Model, example: Sequence[Array]) -> None:
    """Refuse a model that would compute an absurdly large tensor of its example, as far as shapes tell."""
    proto = whole(model).proto
    for value, array in zip(proto.graph.input, example, strict=True):
        del value.type.tensor_type.shape.dim[:]
        for n in array.shape:
            value.type.tensor_type.shape.dim.add().dim_value = n
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph.value_info
    except Exception as reason:  # it raises many types, of what ONNX Runtime says better
        log.info("no shapes: %s", reason_of(reason))
        return
    held = sum(tensor.nbytes for v in model.graph.initializers.values() if (tensor := v.const_value) is not None)
    limit = max(FREE_BYTES, RATIO * (held + sum(array.nbytes for array in example)))
    following = {str(value.name) for value in model.graph.inputs}
    for node in proto.graph.node:
        if not following.isdisjoint(read_names(node)):
            following.update(node.output)
    together = 0
    for value in inferred:
        size = _bytes(value.type.tensor_type)
        together += 0 if value.name in following else size
        if max(size, together) > limit:
            raise SlimlineError(
                f"The model computes {value.name[:60]!r}, of {size:,} bytes, which is too large for its weights and "
                "inputs: export it with smaller inputs."
            )


def _bytes(kind: onnx.TypeProto.Tensor) -> int:
    """Of a tensor, as far as its sizes are known."""
    sizes = [d.dim_value for d in kind.shape.dim if d.HasField("dim_value")]
    wide = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize if kind.elem_type else 1
    return int(math.prod(max(n, 0) for n in sizes) * wide)


def _resolved(original: Session, model: ir.Model, example: tuple[Array, ...]) -> tuple[Native, tuple[Array, ...]]:
    """Sizes fixed, numbers folded, names given; with all sizes free that the file leaves so, else the batch, else none:
    the first of these with which the model runs and computes what it did."""
    symbols = sizes.named(model.graph, example)
    if sizes.is_wide(symbols):
        symbols, probes = sizes.probes(symbols, example, original.takes)
        if sizes.is_wide(symbols):
            try:
                return _checked(original, _folded(model.clone(), probes, symbols), probes)
            except SlimlineError as reason:
                log.warning("The sizes of the inputs are those of the example but for the batch: %s", reason)
    symbols = sizes.batch_only(symbols)
    if rows := sizes.size_of(SYMBOL, symbols, example):
        probes = [sizes.resized(example, symbols, {SYMBOL: n}) for n in sizes.BATCHES[:2]]
        probes += [sizes.blank(example, symbols, {SYMBOL: n}) for n in sizes.BATCHES[2:]]
        try:
            return _checked(original, _folded(model.clone(), probes, symbols), probes[:2])
        except SlimlineError as reason:
            log.info("no free batch: %s", reason)
    fixed = [sizes.resized(example, symbols, {SYMBOL: max(rows, 1)})]
    return _checked(original, _folded(model, fixed, tuple((None,) * x.ndim for x in example)), fixed)


def _folded(model: ir.Model, probes: Sequence[tuple[Array, ...]], symbols: Symbols) -> Native:
    for value, array, names in zip(model.graph.inputs, probes[0], symbols, strict=True):
        value.shape = ir.Shape([n if name is None else name for n, name in zip(array.shape, names, strict=True)])
    for value in model.graph.outputs:
        value.shape = None  # told anew at the end
    native = Native(model, probes[0])
    while True:
        _name(native.model.graph)
        editor = Editor(native)
        _Folder(editor, probes, symbols).run()
        inlined = _inlined(editor)
        native = editor.done()
        if not inlined:
            break
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(native.model)
    shapes = _shapes(native, probes[:2])
    editor = Editor(native)
    for node in list(editor.graph):
        if is_standard(node, "Slice"):
            _one_by_one(editor, node, shapes[0])
        elif is_standard(node, "Conv"):
            _padding(node, shapes)
        elif is_standard(node, "Identity", "Dropout") and not any(o.uses() for o in node.outputs[1:]):
            _skip(editor, node)
    for output in editor.graph.outputs:
        both = [sizes_by_name.get(str(output.name), ()) for sizes_by_name in (shapes[0], shapes[-1])]
        output.shape = ir.Shape([n if n == m else _called(n, m, symbols, probes) for n, m in zip(*both, strict=True)])
    for value in editor.values.values():
        if value.producer() is not None and not value.is_graph_output():
            value.shape = value.type = None
    return editor.done()


def _called(first: int, second: int, symbols: Symbols, probes: Sequence[tuple[Array, ...]]) -> str | None:
    """The symbol of these sizes at the first two of the inputs; None where there is none, or several."""
    ends = probes[0], probes[min(1, len(probes) - 1)]
    names = [
        name
        for name in (*sizes.others(symbols), SYMBOL)
        if [sizes.size_of(name, symbols, inputs) for inputs in ends] == [first, second]
    ]
    return names[0] if len(names) == 1 else None


def _shapes(native: Native, batches: Sequence[tuple[Array, ...]]) -> list[dict[str, tuple[int, ...]]]:
    """Of each of the inputs and all that is computed of them."""
    names = [str(value.name) for value in native.model.graph.inputs]
    ends = [{name: x.shape for name, x in zip(names, inputs, strict=True)} for inputs in batches]
    return [{**own, **computed} for own, computed in zip(ends, outlines(native.model, batches), strict=True)]


def _name(graph: ir.Graph) -> None:
    """Give every operator a name of its own, and every computed value one without slashes."""
    taken: set[str] = set()
    ends = {id(v) for v in (*graph.inputs, *graph.outputs)}
    values = {str(v.name) for v in (*graph.inputs, *graph.outputs, *graph.initializers.values())}
    for number, node in enumerate(graph):
        name = node.name or f"{node.op_type}_{number}"
        while name in taken:
            name = f"{name}_{number}"
        node.name = name
        taken.add(name)
        node.doc_string = None
        for output in node.outputs:
            own = output.name in (SIZES, BATCH) and any(counts(v) for v in (output, *_read_by(output)))
            if output.name and id(output) not in ends and not own:
                plain = re.sub(r"/+", ".", str(output.name)).strip(".") or f"value_{number}"
                while plain in values or plain in (SIZES, BATCH):
                    plain = f"{plain}_{number}"
                values.add(plain)
                output.name = plain


def _read_by(value: ir.Value) -> list[ir.Value]:
    return [output for user, _ in value.uses() for output in user.outputs]


class _Folder:
    """Computes what sizes and stored tensors alone decide, at several sizes, and puts it in its place."""

    def __init__(self, editor: Editor, probes: Sequence[tuple[Array, ...]], symbols: Symbols) -> None:
        self.editor, self.graph, self.probes, self.symbols = editor, editor.graph, probes, symbols
        self.rows = [sizes.size_of(SYMBOL, symbols, inputs) for inputs in probes]
        self.wide = sizes.is_wide(symbols)
        held = editor.values.get(BATCH)
        self.sizes: ir.Value | None = held if counts(held) else None

    def run(self) -> None:
        """See the class."""
        decided = self._decided()
        sized, alike = (
            [str(o.name) for node, own in decided.items() for o in node.outputs if o.name and own == which]
            for which in (True, False)
        )
        (same,) = evaluate(self.editor.model, self.probes[:1], alike)
        results = [same | own for own in evaluate(self.editor.model, self.probes, sized)]
        following = follow.follow(decided, results, follow.PLACES if self.wide else follow.LIMITS)
        for node in decided:
            for output in node.outputs:
                read = any(user not in decided or is_number(user, index) for user, index in output.uses())
                # What is made of sizes shall know the batch alone; that itself is asked of an input once.
                read = read or (node.op_type in ("Shape", "Size") and not any(map(counts, _read_by(output))))
                if output.name and (read or output.is_graph_output()):
                    self._put(node, output, [result[str(output.name)] for result in results], following.get(output))
        for node in list(self.graph):
            if is_standard(node, "Reshape"):
                self._target(node)
        passes.RemoveUnusedNodesPass()(self.editor.model)

    def _decided(self) -> dict[ir.Node, bool]:
        """Operators on nothing but sizes and stored tensors, in their order, and whether on sizes at all."""
        known = set(self.graph.initializers.values())
        decided: dict[ir.Node, bool] = {}
        for node in self.graph:
            plain = standard(node) and node.op_type not in _RANDOM | QUANTIZED and not any(True for _ in nested(node))
            if plain and (node.op_type in ("Shape", "Size") or all(v is None or v in known for v in node.inputs)):
                behind = any(decided.get(maker, False) for v in node.inputs if v and (maker := v.producer()))
                decided[node] = node.op_type in ("Shape", "Size") or behind
                known.update(node.outputs)
        return decided

    def _put(self, node: ir.Node, value: ir.Value, results: Sequence[Any], following: Following | None) -> None:
        first = results[0]
        if not isinstance(first, np.ndarray):
            return
        doubt = following is not None and bool(following.doubted.any())
        same = all(
            r is first or (r.shape == first.shape and np.array_equal(r, first, equal_nan=first.dtype.kind == "f"))
            for r in results
        )
        if same and not doubt:
            sources = [stored(v) for v in node.inputs]
            if first.size <= max(FOLDED, *(0 if s is None else 2 * s.size for s in sources)):
                self._become(node, value, first)
            return
        told = affine(value)
        if told is not None and told.slope.any() and (counts(told.factor) or _tells(told, following)):
            return
        whole = first.dtype.kind == "i" and first.ndim <= 1
        if whole and not doubt and (line := self._line(results)) is not None:
            slope, start = line
            self.editor.redirect(value, self._affine(node, str(value.name), slope, start, first))
        elif whole and following is not None and (self.wide or doubt) and following.fixed.shape == first.shape != ():
            fixed, dims = following.fixed, measured(node)
            apart = dims is not None and not fixed[[d for d in dims if d < len(fixed)]].any()
            sized = any((user.op_type, index) in _SIZED for user, index in value.uses() if standard(user))
            if first.dtype == np.int64 and (sized or (node.op_type == "Shape" and not apart)):
                self._apart(node, value, fixed, first)

    def _apart(self, node: ir.Node, value: ir.Value, fixed: Array, first: Array) -> None:
        """The numbers that no size changes as constants, beside those that are computed."""
        name = str(value.name)
        scaled = self.editor.append(
            node,
            "Mul",
            [value, self.editor.constant((~fixed).astype(np.int64), f"{name}_slope")],
            name=f"{name}_scaled",
        )
        first_user = scaled.producer()
        assert first_user is not None
        result = scaled
        if fixed.any():
            start = self.editor.constant(np.where(fixed, first, 0), f"{name}_start")
            result = self.editor.append(first_user, "Add", [scaled, start], name=f"{name}_sizes")
        self.editor.redirect(value, result, keep=[first_user])

    def _become(self, node: ir.Node, value: ir.Value, content: Array) -> None:
        """A constant, in the name of the tensor that it is made of where it is only turned or cast."""
        name = str(value.name)
        source = node.inputs[0] if node.inputs else None
        turned = node.op_type in ("Transpose", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten")
        owned = source is not None and source.is_initializer() and len(source.uses()) == 1 and len(node.outputs) == 1
        if turned and owned and source is not None and not value.is_graph_output():
            name = str(source.name)
            self.editor.rename(name, f"{name}_before")
        elif not value.is_graph_output():
            self.editor.rename(name, f"{name}_computed")
        self.editor.redirect(value, self.editor.constant(content, name))

    def _line(self, results: Sequence[Array]) -> tuple[Array, Array] | None:
        """Slope and start of numbers that grow with the batch on a line."""
        if any(r.shape != results[0].shape for r in results) or not self.rows[0]:
            return None
        rows = self.rows
        rise = results[1].astype(np.int64) - results[0]
        slope = rise // (rows[1] - rows[0])
        start = results[0] - slope * rows[0]
        fits = all(np.array_equal(r, slope * n + start) for r, n in zip(results, rows, strict=True))
        return (slope, start) if fits else None

    def _affine(self, node: ir.Node, name: str, slope: Array, start: Array, like: Array) -> ir.Value:
        """``batch * slope + start``."""
        editor = self.editor

        def behind(value: ir.Value, operator: str, more: ir.Value | None, ending: str, **attributes: int) -> ir.Value:
            source = value.producer()
            assert source is not None
            inputs = [value] if more is None else [value, more]
            return editor.append(source, operator, inputs, dict(attributes), f"{name}_{ending}")

        if self.sizes is None:
            index = next(k for k, names in enumerate(self.symbols) if names[:1] == (SYMBOL,))
            shape = editor.insert(editor.first(), "Shape", [self.graph.inputs[index]], name=SIZES)
            source = shape.producer()
            assert source is not None
            first = editor.constant(np.zeros(1, np.int64), "slimline_first")
            self.sizes = editor.append(source, "Gather", [shape, first], {"axis": 0}, BATCH)
        value = behind(self.sizes, "Mul", editor.constant(slope.reshape(-1), f"{name}_slope"), "scaled")
        if start.any():
            value = behind(value, "Add", editor.constant(start.reshape(-1), f"{name}_start"), "sizes")
        if like.ndim == 0:
            value = behind(value, "Reshape", editor.constant(np.zeros(0, np.int64), f"{name}_scalar"), "number")
        if like.dtype != np.int64:
            value = behind(value, "Cast", None, "cast", to=ir.DataType.from_numpy(like.dtype).value)
        return value

    def _target(self, node: ir.Node) -> None:
        """A reshape whose target counts the batch once takes -1 for it."""
        line = affine(node.inputs[1])
        if line is None:
            return
        start, counted = line.start, line.slope != 0
        if counted.sum() == 1 and not np.isin(start[~counted], (-1, 0)).any():
            self.editor.numbers(node, 1, np.where(counted, -1, start))


def _tells(told: Affine, following: Following | None) -> bool:
    """Whether the numbers that no size changes stand apart already."""
    fixed = None if following is None else following.fixed
    return fixed is not None and fixed.shape == told.slope.shape and not told.slope[fixed].any()


def _inlined(editor: Editor) -> bool:
    """Put the branch that is taken in the place of every If whose condition is stored; whether there was one."""
    inlined = False
    for node in list(editor.graph):
        condition = stored(node.inputs[0]) if is_standard(node, "If") else None
        if condition is None:
            continue
        inlined = True
        branch = node.attributes["then_branch" if condition.all() else "else_branch"].value
        results = list(branch.outputs)
        branch.outputs.clear()
        for name, held in list(branch.initializers.items()):
            content = stored(held)
            assert content is not None
            instead = editor.constant(content, name)
            for user, index in list(held.uses()):
                user.replace_input_with(index, instead)
            results = [instead if value is held else value for value in results]
        inner = list(branch)
        branch.remove(inner)
        for step in inner:
            for output in step.outputs:
                if output.name:
                    output.name = editor.unique(output.name)
                    editor.values[output.name] = output
            editor.graph.insert_before(node, step)
        for output, value in zip(node.outputs, results, strict=True):
            editor.redirect(output, value)
    return inlined


def _one_by_one(editor: Editor, node: ir.Node, sizes: Mapping[str, tuple[int, ...]]) -> None:
    """Slices of several dimensions, one behind the other."""
    value, (starts, ends) = node.inputs[0], (stored(v) for v in node.inputs[1:3])
    if value is None or starts is None or ends is None or (len(starts) == 1 and len(node.inputs) == 5):
        return
    content, (axes, steps) = stored(value), (stored(v) for v in [*node.inputs[3:], None, None][:2])
    rank = len(sizes.get(str(value.name), ())) if content is None else content.ndim
    axes = np.arange(len(starts)) if axes is None else axes % max(rank, 1)
    steps = np.ones_like(starts) if steps is None else steps
    for k in range(len(starts)):
        numbers = [np.array([int(n)], np.int64) for n in (starts[k], ends[k], axes[k], steps[k])]
        inputs = [value, *(editor.constant(n, f"{node.outputs[0].name}_{k}_{j}") for j, n in enumerate(numbers))]
        if k == len(starts) - 1:
            node.resize_inputs(5)
            for j, held in enumerate(inputs):
                node.replace_input_with(j, held)
        else:
            value = editor.insert(node, "Slice", inputs, name=f"{node.outputs[0].name}_{k}")


def _padding(node: ir.Node, shapes: Sequence[Mapping[str, tuple[int, ...]]]) -> None:
    """``auto_pad`` as numbers, where these are the same at all sizes."""
    auto = attribute(node, "auto_pad", "NOTSET")
    if auto == "NOTSET":
        return
    del node.attributes["auto_pad"]
    if auto == "VALID":
        node.attributes.pop("pads", None)
        return
    name = str(node.inputs[0].name) if node.inputs[0] else ""
    x, weight = shapes[0].get(name), node.inputs[1]
    free = x is not None and any(s.get(name, ())[2:] != x[2:] for s in shapes)
    if x is None or weight is None or weight.shape is None or (free and set(attribute(node, "strides", [1])) != {1}):
        node.attributes["auto_pad"] = ir.AttrString("auto_pad", auto)
        return
    kernel = list(weight.shape.numpy()[2:])
    strides = attribute(node, "strides", [1] * len(kernel))
    dilations = attribute(node, "dilations", [1] * len(kernel))
    pairs = []
    for n, k, s, d in zip(x[2:], kernel, strides, dilations, strict=True):
        total = max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
        less, more = total // 2, total - total // 2
        pairs.append((less, more) if auto == "SAME_UPPER" else (more, less))
    node.attributes["pads"] = ir.AttrInt64s("pads", [*(a for a, _ in pairs), *(b for _, b in pairs)])


def _skip(editor: Editor, node: ir.Node) -> None:
    """Readers of what passes unchanged read what goes in, unless it is an output of the model."""
    value = node.inputs[0]
    if value is None or node.outputs[0].is_graph_output() or (len(node.inputs) > 2 and _training(node)):
        return
    editor.redirect(node.outputs[0], value)


def _training(node: ir.Node) -> bool:
    mode = stored(node.inputs[2])
    return node.inputs[2] is not None and (mode is None or bool(mode))


def _checked(
    original: Session, native: Native, probes: Sequence[tuple[Array, ...]]
) -> tuple[Native, tuple[Array, ...]]:
    """A canonical form and its example; refuses one that computes something else at any of the sizes."""
    own = Session(whole(native.model), optimized=False)
    for inputs in probes:
        if not all(map(_alike, original(inputs), own(inputs))):
            raise SlimlineError(
                "The ONNX model cannot be brought into slimline's form without a change of what it computes: "
                "leave out operators that draw random numbers, or report this model to slimline."
            )
    return native, probes[0]


def _alike(left: Any, right: Any) -> bool:
    if not isinstance(left, np.ndarray) or left.shape != right.shape or left.dtype != right.dtype:
        return False
    if not float_array(left):
        return bool(np.array_equal(left, right))
    # In pieces: the logits of a language model are great next to its weights.
    cuts = range(_PIECE, left.size, _PIECE)
    pieces = [np.split(each.reshape(-1), cuts) for each in (left, right)]
    largest = max(float(np.abs(a[np.isfinite(a)]).max(initial=0)) for a in pieces[0])
    return all(
        np.allclose(a.astype(np.float64), b.astype(np.float64), rtol=1e-3, atol=1e-4 * largest, equal_nan=True)
        for a, b in zip(*pieces, strict=True)
    )
