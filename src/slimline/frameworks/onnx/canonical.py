"""The canonical form in which every model is held, whichever exporter wrote it.

- The operators are those of one version of ONNX, 13 or newer; functions are written out; all constants are
  initializers.
- Of the sizes of the inputs the batch may be free, the first dimension; all others are those of the example.
- What sizes and stored tensors alone decide is computed here: it becomes a constant, or, where it counts the batch, a
  multiple of it and a constant (``batch * a + b``). So the numbers of a graph do not change when layers become narrower.
- A slice takes positions of one dimension. Padding is told in numbers. Operators have names, and values names without
  slashes.

What comes out is run and compared with what came in.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes

from slimline.basics.errors import NoExample, SlimlineError
from slimline.frameworks.base import Array
from slimline.frameworks.onnx.native import Editor, Native, is_standard
from slimline.frameworks.onnx.operators import BATCH, QUANTIZED, SIZES, affine, attribute, counts, is_number, nested, standard, stored
from slimline.frameworks.onnx.run import Session, evaluate, outline, said, typed

log = logging.getLogger(__name__)

OLDEST = 13
"""The version of operators that models of older ones are converted to."""
FOLDED = 2**22
"""Most numbers of a constant that is stored instead of computed, unless what it is computed from is as large."""
MEMORY = 2**30
"""Most numbers that any tensor of the example may have."""
SYMBOL = "batch"
_RANDOM = frozenset({"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"})


def canonical(proto: onnx.ModelProto, example: tuple[Array, ...] | None) -> tuple[Native, tuple[Array, ...]]:
    """The native model of a checked message, and its example inputs: of two rows where the batch is free.

    Raises
    ------
    NoExample : a size that only an example can tell.
    SlimlineError : a model that does not run, or that another opset would change.
    """
    model = ir.from_proto(_modern(proto))
    passes.RemoveInitializersFromInputsPass()(model)
    if model.functions:
        passes.InlinePass()(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.RemoveUnusedNodesPass()(model)
    if not list(model.graph):
        raise SlimlineError("The ONNX model computes nothing of its inputs: export it anew.")
    example = _example(model.graph, example)
    _bounded(model, example)
    native, example = _settled(model, example)
    _compare(proto, native, example)
    return native, example


def _modern(proto: onnx.ModelProto) -> onnx.ModelProto:
    opset = next(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx"))
    if opset >= OLDEST:
        return proto
    try:
        return onnx.version_converter.convert_version(proto, OLDEST)
    except Exception as reason:  # the converter raises many types
        raise SlimlineError(
            f"The ONNX model is of operators version {opset} and cannot be brought to version {OLDEST} "
            f"({said(reason)}): export it anew with a newer opset."
        ) from reason


def _example(graph: ir.Graph, given: tuple[Array, ...] | None) -> tuple[Array, ...]:
    """Example inputs that fit what the graph says of its own; the batch is 2 where it is free."""
    if given is not None and len(given) != len(graph.inputs):
        names = ", ".join(str(v.name) for v in graph.inputs)
        raise SlimlineError(f"The model takes {len(graph.inputs)} inputs ({names}), not {len(given)}: give one each.")
    rng = np.random.default_rng(0)
    found = []
    for k, value in enumerate(graph.inputs):
        if not isinstance(value.type, ir.TensorType) or value.dtype is None or value.dtype == ir.DataType.STRING:
            raise SlimlineError(f"The input {value.name} is no tensor of numbers: give a model whose inputs are.")
        kind = np.dtype(value.dtype.numpy())
        if given is not None:
            array = typed(given[k], kind.name)
            _fits(value, array)
            found.append(array)
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
            found.append(rng.normal(size=sizes).astype(kind))
        else:
            found.append(np.ones(sizes, kind))
    return tuple(found)


def _fits(value: ir.Value, array: Array) -> None:
    assert value.dtype is not None
    shape = value.shape
    same = shape is None or (
        len(shape) == array.ndim
        and all(n == m for d, (n, m) in enumerate(zip(shape, array.shape, strict=True)) if isinstance(n, int) and d)
    )
    if array.dtype != value.dtype.numpy() or not same or (array.ndim and len(array) == 0):
        told = "any shape" if shape is None else f"({', '.join(map(str, shape))})"
        raise SlimlineError(
            f"The example of the input {value.name} is {array.dtype}{array.shape}, and the model takes "
            f"{np.dtype(value.dtype.numpy()).name} of {told}: give that."
        )


def _bounded(model: ir.Model, example: Sequence[Array]) -> None:
    """Refuse a model that would compute an absurdly large tensor of its example, as far as shapes tell."""
    proto = ir.to_proto(model)
    for value, array in zip(proto.graph.input, example, strict=True):
        del value.type.tensor_type.shape.dim[:]
        for n in array.shape:
            value.type.tensor_type.shape.dim.add().dim_value = n
    del proto.graph.value_info[:]
    for output in proto.graph.output:
        output.ClearField("type")
    try:
        told = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph.value_info
    except Exception as reason:  # it raises many types, of what ONNX Runtime says better
        log.info("no shapes: %s", said(reason))
        return
    for value in told:
        sizes = [d.dim_value for d in value.type.tensor_type.shape.dim if d.HasField("dim_value")]
        if np.prod(sizes, dtype=float) > MEMORY:
            raise SlimlineError(f"The model computes {value.name[:60]!r} of shape {tuple(sizes)}, which is too large.")


def _settled(model: ir.Model, example: tuple[Array, ...]) -> tuple[Native, tuple[Array, ...]]:
    """Sizes fixed, numbers folded, names given; with a free batch if the model runs with another."""
    graph = model.graph
    free = [v.shape is None or (len(v.shape) > 0 and not isinstance(v.shape[0], int)) for v in graph.inputs]
    free = [f and x.ndim > 0 for f, x in zip(free, example, strict=True)]
    rows = next((len(x) for f, x in zip(free, example, strict=True) if f), 0)
    free = [f and len(x) == rows for f, x in zip(free, example, strict=True)]
    if any(free):
        probes = [_resized(example, free, n) for n in (2, 3, 5)]
        try:
            return _folded(model.clone(), probes, free), probes[0]
        except SlimlineError as reason:
            log.info("no free batch: %s", reason)
    fixed = [_resized(example, free, max(rows, 1))]
    return _folded(model, fixed, [False] * len(free)), fixed[0]


def _resized(example: Sequence[Array], free: Sequence[bool], rows: int) -> tuple[Array, ...]:
    return tuple(np.resize(x, (rows, *x.shape[1:])) if f else x for x, f in zip(example, free, strict=True))


def _folded(model: ir.Model, probes: Sequence[tuple[Array, ...]], free: Sequence[bool]) -> Native:
    for value, array, batched in zip(model.graph.inputs, probes[0], free, strict=True):
        value.shape = ir.Shape([SYMBOL if batched and d == 0 else n for d, n in enumerate(array.shape)])
    for value in model.graph.outputs:
        value.shape = None  # said anew below
    _name(model.graph)
    editor = Editor(Native(model))
    _Folder(editor, probes, free).run()
    native = editor.done()
    editor = Editor(native)
    shapes = outline(native.model, probes[0])
    sizes = {**{n: v.shape for n, v in shapes.items()}, **{str(v.name): x.shape for v, x in zip(native.model.graph.inputs, probes[0], strict=True)}}
    for node in list(editor.graph):
        if is_standard(node, "Slice"):
            _one_by_one(editor, node, sizes)
        elif is_standard(node, "Conv"):
            _padding(node, sizes)
        elif is_standard(node, "Dropout") and len(node.outputs) > 0 and not any(o.uses() for o in node.outputs[1:]):
            _skip(editor, node)
        elif is_standard(node, "Identity"):
            _skip(editor, node)
    other = outline(native.model, probes[1]) if len(probes) > 1 else shapes
    for output in editor.graph.outputs:
        name = str(output.name)
        if name in shapes:
            a, b = shapes[name].shape, other[name].shape
            output.shape = ir.Shape([n if n == m else SYMBOL if n == len_of(probes[0], free) else None for n, m in zip(a, b, strict=True)])
    for name in list(editor.values):
        value = editor.values[name]
        if value.producer() is not None and not value.is_graph_output():
            value.shape = value.type = None
    return editor.done()


def len_of(inputs: Sequence[Array], free: Sequence[bool]) -> int:
    """The batch size of inputs."""
    return next((len(x) for x, f in zip(inputs, free, strict=True) if f), 0)


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
    """Computes what sizes and stored tensors alone decide, at several batch sizes, and puts it in its place."""

    def __init__(self, editor: Editor, probes: Sequence[tuple[Array, ...]], free: Sequence[bool]) -> None:
        self.editor, self.graph, self.probes, self.free = editor, editor.graph, probes, free
        self.rows = [len_of(inputs, free) for inputs in probes]
        held = editor.values.get(BATCH)
        self.sizes: ir.Value | None = held if counts(held) else None

    def run(self) -> None:
        """See the class."""
        decided = self._decided()
        computed = [str(o.name) for node in self.graph if node in decided for o in node.outputs if o.name]
        results = [evaluate(self.editor.model, inputs, computed) for inputs in self.probes]
        for node in list(self.graph):
            if node in decided:
                for output in node.outputs:
                    if output.name and any(not decided.get(user) or is_number(user, i) for user, i in output.uses()) or output.is_graph_output():
                        self._put(node, output, [r[str(output.name)] for r in results])
        for node in list(self.graph):
            if is_standard(node, "Reshape"):
                self._target(node)
        passes.RemoveUnusedNodesPass()(self.editor.model)

    def _decided(self) -> dict[ir.Node, bool]:
        """Operators on nothing but sizes and stored tensors."""
        known = {v for v in self.graph.initializers.values()}
        found: dict[ir.Node, bool] = {}
        for node in self.graph:
            plain = standard(node) and node.op_type not in _RANDOM | QUANTIZED and not any(True for _ in nested(node))
            if plain and (node.op_type in ("Shape", "Size") or all(v is None or v in known for v in node.inputs)):
                found[node] = True
                known.update(node.outputs)
        return found

    def _put(self, node: ir.Node, value: ir.Value, results: Sequence[Array]) -> None:
        first = results[0]
        told = affine(value)
        if not isinstance(first, np.ndarray) or (told is not None and told[0].any()):
            return
        if all(r.shape == first.shape and np.array_equal(r, first, equal_nan=first.dtype.kind == "f") for r in results):
            sources = [stored(v) for v in node.inputs]
            if first.size <= max(FOLDED, *(0 if s is None else 2 * s.size for s in sources)):
                self._become(node, value, first)
        elif first.dtype.kind == "i" and first.ndim <= 1 and (line := self._line(results)) is not None:
            slope, start = line
            self._redirect(value, self._affine(node, str(value.name), slope, start, first))

    def _become(self, node: ir.Node, value: ir.Value, content: Array) -> None:
        """A constant, in the name of the tensor that it is made of where it is only turned or cast."""
        name = str(value.name)
        source = node.inputs[0] if node.inputs else None
        turned = node.op_type in ("Transpose", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten")
        owned = source is not None and source.is_initializer() and len(source.uses()) == 1 and len(node.outputs) == 1
        if turned and owned and source is not None and not value.is_graph_output():
            name = str(source.name)
            source.name = f"{name}_before"
            self.editor.values[f"{name}_before"] = self.editor.values.pop(name)
        elif not value.is_graph_output():
            value.name = f"{name}_computed"
            self.editor.values[str(value.name)] = self.editor.values.pop(name)
        self._redirect(value, self.editor.constant(content, name))

    def _redirect(self, old: ir.Value, new: ir.Value) -> None:
        self.editor.redirect(old, new)

    def _line(self, results: Sequence[Array]) -> tuple[Array, Array] | None:
        """Slope and start of numbers that grow with the batch on a line."""
        if any(r.shape != results[0].shape for r in results):
            return None
        rows = self.rows
        rise = results[1].astype(np.int64) - results[0]
        slope = rise // (rows[1] - rows[0])
        start = results[0] - slope * rows[0]
        return (slope, start) if all(np.array_equal(r, slope * n + start) for r, n in zip(results, rows, strict=True)) else None

    def _affine(self, node: ir.Node, name: str, slope: Array, start: Array, like: Array) -> ir.Value:
        """``batch * slope + start``."""
        editor = self.editor
        if self.sizes is None:
            index = next(k for k, f in enumerate(self.free) if f)
            shape = editor.insert(editor.first(), "Shape", [self.graph.inputs[index]], name=SIZES)
            first = editor.constant(np.zeros(1, np.int64), "slimline_first")
            at = shape.producer()
            assert at is not None
            self.sizes = editor.append(at, "Gather", [shape, first], {"axis": 0}, name=BATCH)
        value = self.sizes
        after = value.producer()
        assert after is not None
        if like.ndim == 0:
            slope, start = slope.reshape(1), start.reshape(1)
        value = editor.append(after, "Mul", [value, editor.constant(slope, f"{name}_slope")], name=f"{name}_scaled")
        at = value.producer()
        assert at is not None
        if start.any():
            value = editor.append(at, "Add", [value, editor.constant(start, f"{name}_start")], name=f"{name}_sizes")
            at = value.producer()
            assert at is not None
        if like.ndim == 0:
            none = editor.constant(np.zeros(0, np.int64), f"{name}_scalar")
            value = editor.append(at, "Reshape", [value, none], name=f"{name}_number")
            at = value.producer()
            assert at is not None
        if like.dtype != np.int64:
            value = editor.append(at, "Cast", [value], {"to": ir.DataType.from_numpy(like.dtype).value}, name=f"{name}_cast")
        return value

    def _target(self, node: ir.Node) -> None:
        """A reshape whose target counts the batch once takes -1 for it."""
        line = affine(node.inputs[1])
        if line is None:
            return
        slope, start = line
        if slope.any() and int((slope != 0).sum()) == 1 and not (start == -1).any() and not (start[slope == 0] == 0).any():
            self.editor.numbers(node, 1, np.where(slope != 0, -1, start))


def _one_by_one(editor: Editor, node: ir.Node, sizes: Mapping[str, tuple[int, ...]]) -> None:
    """Slices of several dimensions, one behind the other."""
    starts, ends = (stored(v) for v in node.inputs[1:3])
    if starts is None or ends is None:
        return
    rank = len(sizes.get(str(node.inputs[0].name), ())) if node.inputs[0] is not None else 0
    content = stored(node.inputs[0])
    rank = content.ndim if content is not None else rank
    given = [stored(v) for v in node.inputs[3:]]
    axes = np.arange(len(starts)) if not given or given[0] is None else given[0] % max(rank, 1)
    steps = np.ones_like(starts) if len(given) < 2 or given[1] is None else given[1]
    if len(starts) < 2 and len(node.inputs) == 5:
        return
    value = node.inputs[0]
    for k in range(len(starts)):
        numbers = [np.array([int(n)], np.int64) for n in (starts[k], ends[k], axes[k], steps[k])]
        inputs = [value, *(editor.constant(n, f"{node.outputs[0].name}_{k}_{j}") for j, n in enumerate(numbers))]
        if k == len(starts) - 1:
            node.resize_inputs(5)
            for j, held in enumerate(inputs):
                node.replace_input_with(j, held)
        else:
            value = editor.insert(node, "Slice", inputs, name=f"{node.outputs[0].name}_{k}")


def _padding(node: ir.Node, sizes: Mapping[str, tuple[int, ...]]) -> None:
    """``auto_pad`` as numbers."""
    auto = attribute(node, "auto_pad", "NOTSET")
    if auto == "NOTSET":
        return
    del node.attributes["auto_pad"]
    if auto == "VALID":
        node.attributes.pop("pads", None)
        return
    x, weight = sizes.get(str(node.inputs[0].name)) if node.inputs[0] else None, node.inputs[1]
    if x is None or weight is None or weight.shape is None:
        node.attributes["auto_pad"] = ir.AttrString("auto_pad", auto)
        return
    kernel = [int(n) for n in list(weight.shape)[2:]]
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


def _compare(proto: onnx.ModelProto, native: Native, example: Sequence[Array]) -> None:
    """Refuse a canonical form that computes something else."""
    original = Session(proto, optimized=False)
    batches = [tuple(example)]
    if native.free == "batch":
        free = [not isinstance(v.shape[0], int) if v.shape else False for v in native.model.graph.inputs]
        batches.append(_resized(example, free, len_of(example, free) + 1))
    own = Session(ir.to_proto(native.model), optimized=False)
    for inputs in batches:
        for a, b in zip(original(inputs), own(inputs), strict=True):
            same = isinstance(a, np.ndarray) and a.shape == b.shape and a.dtype == b.dtype
            if not same or not np.allclose(a, b, rtol=1e-3, atol=1e-4 * (1 + float(np.abs(a).max(initial=0)) if a.dtype.kind == "f" else 1), equal_nan=True):
                raise SlimlineError(
                    "The ONNX model cannot be brought into slimline's form without a change of what it computes: "
                    "leave out operators that draw random numbers, or report this model to slimline."
                )

