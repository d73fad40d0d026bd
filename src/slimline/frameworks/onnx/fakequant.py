"""Batch norms folded into layers, rounding as QuantizeLinear and DequantizeLinear, and the exchange form.

The pairs round a float tensor to its integer grid and back, so that the float model computes what the integer artifact
will (Jacob et al. 2018, arXiv:1712.05877).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from slimline.basics.errors import SlimlineError
from slimline.frameworks.base import Array
from slimline.frameworks.edit import refuse_unread
from slimline.frameworks.onnx.native import Editor, Native, is_standard
from slimline.frameworks.onnx.operators import OWN, WEIGHTED, attribute, layer, root, stored
from slimline.frameworks.onnx.rounding import LIMITS, round_rows, row_source
from slimline.frameworks.onnx.run import outline
from slimline.graph.quantization import Quantization
from slimline.methods.dynamic import GRIDS, HIGH, LEVELS, LOW, DynamicGrid, read_together
from slimline.methods.formats import FloatFormat, Format, IntegerGrid
from slimline.runtimes.forms.onnx_formats import FLOATS
from slimline.runtimes.forms.onnx_graph import DOMAIN, FAKE_QUANTIZE, FLOAT_ENDS, MARK, rounding_ends
from slimline.runtimes.forms.onnx_weights import raise_opset

_FLOAT_OPSET, _WIDE_OPSET = 19, 21
_BYTE = 8
_DYNAMIC = "0 255"
"""The note `OWN` on a DynamicQuantizeLinear."""


def fold(native: Native) -> Native:
    """A copy in which every batch norm that alone reads a convolution or linear layer is folded into it.

    Weights keep their names; a layer that had no bias gains one; the batch norm's tensors disappear.
    """
    editor = Editor(native)
    for node in list(editor.graph):
        source = node.inputs[0].producer() if is_standard(node, "BatchNormalization") and node.inputs[0] else None
        if source is not None and _foldable(node, source):
            _fold_one(editor, node, source)
    return editor.done()


def _foldable(norm: ir.Node, source: ir.Node) -> bool:
    value = source.outputs[0]
    alone = len(value.uses()) == 1 and not value.is_graph_output()
    if not alone or not is_standard(source, "Conv", "ConvTranspose", "Gemm") or attribute(norm, "training_mode", 0):
        return False
    if source.op_type == "Gemm" and (attribute(source, "alpha", 1.0), attribute(source, "beta", 1.0)) != (1.0, 1.0):
        return False
    held = [v for v in (*source.inputs[1:], *norm.inputs[1:]) if v is not None]
    bias = stored(source.inputs[2]) if len(source.inputs) > 2 else None
    fits = bias is None or bias.shape == np.asarray(stored(norm.inputs[1])).shape
    own = all(stored(v) is not None and len(v.uses()) == 1 and not v.is_graph_output() for v in held)
    return own and fits and not any(o.uses() for o in norm.outputs[1:])


def _fold_one(editor: Editor, norm: ir.Node, source: ir.Node) -> None:
    scale, shift, mean, variance = (np.asarray(stored(v), np.float64) for v in norm.inputs[1:5])
    held = source.inputs[1]
    assert held is not None
    weight = stored(held)
    assert weight is not None
    factor = scale / np.sqrt(variance + attribute(norm, "epsilon", 1e-5))
    before = source.inputs[2] if len(source.inputs) > 2 else None
    bias = (0.0 if before is None else np.asarray(stored(before), np.float64)) - mean
    bias = bias * factor + shift
    if source.op_type == "ConvTranspose":
        groups = len(factor) // weight.shape[1]
        spread = factor.reshape(groups, 1, -1, *[1] * (weight.ndim - 2))
        scaled = (weight.astype(np.float64).reshape(groups, -1, *weight.shape[1:]) * spread).reshape(weight.shape)
    elif source.op_type == "Gemm" and not attribute(source, "transB", 0):
        scaled = weight.astype(np.float64) * factor
    else:
        scaled = weight.astype(np.float64) * factor.reshape(-1, *[1] * (weight.ndim - 1))
    editor.put(str(held.name), scaled)
    if before is not None:
        editor.put(str(before.name), bias)
    else:
        if len(source.inputs) < 3:
            source.resize_inputs(3)
        source.replace_input_with(2, editor.constant(bias.astype(weight.dtype), f"{layer(source)}.bias"))
    editor.redirect(norm.outputs[0], source.outputs[0])


def quantize(native: Native, quantization: Quantization) -> Native:
    """A copy that rounds the named activations after they are computed and the named weights where they are read.

    Stored tensors keep their names, and their float values up to the ends of their grids; scales and zero points are
    new numbers.

    Raises
    ------
    SlimlineError : a format that QuantizeLinear does not round to, or an opset that has none such and cannot be raised.
    """
    grids = {name: _grid(name, each, _BYTE) for name, each in quantization.weights.items()}
    for name, each in quantization.activations.items():
        grids[name] = grid = _grid(name, each, 2 * _BYTE)
        if isinstance(grid, IntegerGrid) and grid != _wide(grid):
            raise _no_pair(name, each)
    editor = Editor(_raised(native, max((_opset(each) for each in grids.values()), default=0)))
    values = editor.named([*quantization.activations, *quantization.weights])
    for name in quantization.weights:
        if isinstance(grid := grids[name], IntegerGrid):
            _limit(editor, name, native.tensors[name], grid)
    for name, grid in grids.items():
        value = values[name]
        source = value.producer()
        numbers = _numbers(editor, name, grid)
        at = editor.first() if source is None else source
        place = editor.insert if source is None else editor.append
        axis = {} if grid.axis is None else {"axis": grid.axis}
        rounded = place(at, "QuantizeLinear", [value, *numbers], axis, f"{name}_integers")
        own = rounded.producer()
        assert own is not None
        own.metadata_props[OWN] = _limits(grid)
        real = editor.append(own, "DequantizeLinear", [rounded, *numbers], axis, f"{name}_rounded")
        editor.redirect(value, real, keep=[own])
    _round_inputs(editor, quantization.dynamic, quantization.dynamic_grid)
    return editor.done()


def _opset(each: IntegerGrid | FloatFormat) -> int:
    """The first in which QuantizeLinear rounds to a format."""
    return _FLOAT_OPSET if isinstance(each, FloatFormat) else _WIDE_OPSET if each.bits > _BYTE else 0


def _raised(native: Native, opset: int) -> Native:
    """The same model, at least of an opset."""
    if native.opset >= opset:
        return native
    editor = Editor(native)
    raise_opset(editor.model, opset)
    return editor.done()


def _round_inputs(editor: Editor, weights: Collection[str], grid: DynamicGrid) -> None:
    """Let products with these weights read what they multiply rounded to the grid of its own range."""
    rounded: dict[tuple[ir.Value, tuple[int, ...]], ir.Value] = {}
    products = _products(editor.model, weights)
    refuse_unread(products)
    for product in [each for users in products.values() for each in users]:
        x, axes = product.inputs[0], () if grid == GRIDS[0] else _axes(product)
        assert x is not None
        if (x, axes) not in rounded:
            rounded[x, axes] = round_rows(editor, x, axes) if axes else _round_whole(editor, x)
        product.replace_input_with(0, rounded[x, axes])


def _round_whole(editor: Editor, x: ir.Value) -> ir.Value:
    """New operators that round to the grid ``uint8_per_tensor``; the value they end in."""
    source = x.producer()
    at, place = (editor.first(), editor.insert) if source is None else (source, editor.append)
    own = place(at, "DynamicQuantizeLinear", [x], None, f"{x.name}_integers").producer()
    assert own is not None
    own.metadata_props[OWN] = _DYNAMIC
    own.resize_outputs(3)
    for output, what in zip(own.outputs[1:], ("scale", "zero_point"), strict=True):
        output.name = editor.unique(f"{x.name}_{what}")
        editor.values[output.name] = output
    return editor.append(own, "DequantizeLinear", own.outputs, {}, f"{x.name}_rounded")


def _multiplied(product: ir.Node) -> ir.Value | None:
    """What is multiplied by a stored weight."""
    x, weight = product.inputs[:2]
    return x if weight is not None and weight.is_initializer() else None


def _axes(product: ir.Node) -> tuple[int, ...]:
    """The dimensions over which what a product reads shares a grid ``int8_per_row``; the last is -1, whatever the
    rank."""
    weight = product.inputs[1]
    if product.op_type != "Conv":
        return (-1,)
    assert weight is not None and weight.shape is not None
    kernel = [int(n) for n in weight.shape[2:]]  # type: ignore[arg-type]
    return read_together(len(weight.shape), 1, kernel, attribute(product, "strides", ()))


def _products(model: ir.Model, weights: Collection[str]) -> dict[str, list[ir.Node]]:
    """By weight, the products of something computed with it."""
    users: dict[str, list[ir.Node]] = {name: [] for name in weights}
    for node in model.graph:
        weight = node.inputs[1] if is_standard(node, "MatMul", "Gemm", "Conv") else None
        if weight is not None and weight.name in users and root(node.inputs[0]) is None:
            users[str(weight.name)].append(node)
    return users


def _dynamic_source(value: ir.Value | None) -> ir.Node | None:
    """The operator that rounds what `value` is, if that is `_round_inputs`' own."""
    real = None if value is None else value.producer()
    codes = real.inputs[0] if real is not None and real.op_type == "DequantizeLinear" else None
    own = None if codes is None else codes.producer()
    if own is None or real is None or own.metadata_props.get(OWN) != _DYNAMIC:
        return None
    pair = own.op_type == "DynamicQuantizeLinear" and tuple(real.inputs) == tuple(own.outputs)
    return own if pair else None


def format_mismatches(native: Native, quantization: Quantization) -> list[str]:
    """The values and tensors that `native` rounds otherwise than `quantization` says."""
    formats = {**quantization.activations, **quantization.weights}
    alike: dict[str, bool] = {}
    for node in native.model.graph:
        if node.op_type != "QuantizeLinear" or OWN not in node.metadata_props:
            continue
        value, readers = node.inputs[0], [user for user, _ in node.outputs[0].uses()]
        assert value is not None
        # A rounded output of the model has the name, and what it is rounded from another.
        ends = [o for user in readers for o in user.outputs]
        ends += [o for end in ends for user, _ in end.uses() if user.op_type == "Identity" for o in user.outputs]
        name = next((str(v.name) for v in (*ends, value) if str(v.name) in formats), str(value.name))
        both = [node, *readers]
        others = [user for user, _ in value.uses() if user is not node and user.op_type != "Shape"]
        pair = not others and len(readers) == 1 and readers[0].op_type == "DequantizeLinear"
        same = pair and all(_rounds_to(formats.get(name), each, node.metadata_props[OWN]) for each in both)
        alike[name] = same and alike.get(name, True)
    different = [name for name in dict.fromkeys((*alike, *formats)) if not alike.get(name, False)]
    products = _products(native.model, quantization.dynamic)
    whole = quantization.dynamic_grid == GRIDS[0]
    sources = {
        name: [_dynamic_source(n.inputs[0]) if whole else row_source(n.inputs[0], _axes(n)) for n in users]
        for name, users in products.items()
    }
    known = {node for users in products.values() for node in users}
    strangers = [
        str(node.inputs[0].name)
        for node in native.model.graph
        if node.inputs and node.inputs[0] is not None and (end := _dynamic_end(node)) and not end <= known
    ]
    unrounded = [name for name, users in sources.items() if not users or None in users]
    return list(dict.fromkeys((*different, *unrounded, *strangers)))


def _dynamic_end(node: ir.Node) -> set[ir.Node]:
    """The readers of what an operator rounds to a grid that is made when the model runs; of others none."""
    if node.op_type == "DynamicQuantizeLinear":
        return {user for real, _ in node.outputs[0].uses() for user, _ in real.outputs[0].uses()}
    rows = node.op_type == "Mul" and node.metadata_props.get(OWN) == LIMITS
    return {user for user, _ in node.outputs[0].uses()} if rows else set()


def _rounds_to(each: Format | None, node: ir.Node, limits: str) -> bool:
    """Whether one of a pair of operators, with these limits, has the numbers of a format."""
    if not isinstance(each, IntegerGrid | FloatFormat) or limits != _limits(each):
        return False
    numbers = [stored(value) for value in node.inputs[1:3]]
    axis = None if numbers[0] is None or not numbers[0].ndim else attribute(node, "axis", 1)
    return axis == each.axis and all(
        array is not None and array.dtype == own.dtype and np.array_equal(array, own)
        for array, own in zip(numbers, _arrays(each), strict=False)
    )


def _grid(name: str, each: Format, bits: int) -> IntegerGrid | FloatFormat:
    """The format of a value, if a pair can round to it and it has at most so many bits."""
    rounds = isinstance(each, IntegerGrid | FloatFormat) and rounding_ends(each) is not None and each.code_bits <= bits
    if isinstance(each, IntegerGrid | FloatFormat) and rounds and (each.per_tensor or each.axis is not None):
        return each
    raise _no_pair(name, each)


def _no_pair(name: str, each: Format) -> SlimlineError:
    return SlimlineError(
        f"An ONNX model cannot round {name} to {each.describe()}: choose an integer grid of 8 or 16 bits (of at most 8 "
        f"for weights) or {' or '.join(FLOAT_ENDS)} with one scale per tensor or per position of an axis, or quantize "
        "the network in the framework that trained it."
    )


def _wide(grid: IntegerGrid) -> IntegerGrid:
    """The grid with all codes of the type that QuantizeLinear rounds to."""
    return replace(grid, bits=_width(grid), narrow=False)


def _width(grid: IntegerGrid) -> int:
    return _BYTE if grid.bits <= _BYTE else 2 * _BYTE


def _limit(editor: Editor, name: str, weight: Array, grid: IntegerGrid) -> None:
    """Take back what lies beyond the grid and not beyond the byte, as QuantizeLinear ends only there."""
    rounded = grid.round(weight)
    beyond = _wide(grid).round(weight) != rounded
    if beyond.any():
        editor.put(name, np.where(beyond, rounded, weight))


def _limits(grid: IntegerGrid | FloatFormat) -> str:
    return " ".join(map(str, rounding_ends(grid) or ()))


def _arrays(grid: IntegerGrid | FloatFormat) -> tuple[Array, Array]:
    """Scale and zero point as operators hold them."""
    shape = () if grid.axis is None else (-1,)
    if isinstance(grid, FloatFormat):
        scale = grid.scale.reshape(shape)
        return scale, np.zeros(scale.shape, FLOATS[grid.dtype])
    kind = f"{'' if grid.signed else 'u'}int{_width(grid)}"
    return grid.scale.reshape(shape), grid.zero.reshape(shape).astype(kind)


def _numbers(editor: Editor, name: str, grid: IntegerGrid | FloatFormat) -> list[ir.Value]:
    """Scale and zero point."""
    scale, zero = _arrays(grid)
    return [editor.constant(scale, f"{name}_scale"), editor.constant(zero, f"{name}_zero_point")]


def to_onnx(native: Native, example: tuple[Array, ...], integer: bool, weights: Collection[str] = ()) -> ir.Model:
    """The ONNX model as `slimline.runtimes.forms.onnx` takes it; batch norms are folded unless it is `integer`.

    Parameters
    ----------
    weights : stored tensors that a rounding operator marks; what it rounds to means nothing.
    """
    editor = Editor(native if integer or weights else fold(native))
    for name, value in editor.named(weights).items():
        value.metadata_props[MARK] = name
    for name, outlined in outline(editor.model, example).items():
        if not editor.values[name].is_graph_output():
            editor.values[name].shape = ir.Shape([None] * len(outlined.shape))
            editor.values[name].type = ir.TensorType(ir.DataType.from_numpy(np.dtype(outlined.dtype)))
    for node in list(editor.graph):
        weight = root(node.inputs[1]) if node.op_type in WEIGHTED and len(node.inputs) > 1 else None
        if weight is not None and str(weight.name).rpartition(".")[0] != layer(node):
            editor.rename(str(weight.name), f"{layer(node)}.weight")  # operators are called after their weights
    for node in list(editor.graph):
        if node.op_type == "QuantizeLinear" and OWN in node.metadata_props:
            _fuse(editor, node)
        elif (rounding := _dynamic_source(node.outputs[0])) is not None:
            _fuse_dynamic(editor, rounding, rounding.inputs[0], node, (0, LEVELS))
        elif is_standard(node, "MatMul", "Gemm", "Conv") and (x := _multiplied(node)) is not None:
            end = x.producer()
            source = None if end is None else row_source(x, _axes(node))
            if end is not None and source is not None:
                _fuse_dynamic(editor, end, source, end, (LOW, HIGH))
    for value in list(editor.graph.initializers.values()):
        if MARK in value.metadata_props:
            _mark(editor, value)
    model = editor.done().model
    for value in model.graph.initializers.values():  # the runtime may call them as it likes
        if value.const_value is not None:
            tensor = value.const_value
            value.const_value = ir.tensor(tensor.numpy(), name=value.name, dtype=tensor.dtype)
    if integer or weights:
        model.opset_imports[DOMAIN] = 1
    return model


def _mark(editor: Editor, value: ir.Value) -> None:
    """The operator of rounding behind a stored tensor."""
    attributes: dict[str, int | float] = {"low": -128, "high": 127, "scale": 1.0, "zero_point": 0}
    rounding = ir.node(FAKE_QUANTIZE, [value], attributes, domain=DOMAIN, name=f"{value.name}/mark")
    rounding.outputs[0].shape, rounding.outputs[0].type = value.shape, value.type
    editor.graph.insert_before(editor.first(), rounding)
    editor.redirect(value, rounding.outputs[0], keep=[rounding])


def _fuse_dynamic(editor: Editor, at: ir.Node, x: ir.Value | None, real: ir.Node, ends: tuple[int, int]) -> None:
    """The operators that round to a grid of its own, the last of them `real`, as the one that stands for them."""
    attributes = {"low": ends[0], "high": ends[1], "dynamic": 1}
    rounding = ir.node(FAKE_QUANTIZE, [x], attributes, domain=DOMAIN, name=str(at.name))
    rounding.outputs[0].name = editor.unique(f"{real.outputs[0].name}_fake")
    editor.graph.insert_before(at, rounding)
    editor.values[str(rounding.outputs[0].name)] = rounding.outputs[0]
    editor.redirect(real.outputs[0], rounding.outputs[0])


def _fuse(editor: Editor, node: ir.Node) -> None:
    """The pair that rounds as the one operator that stands for it."""
    readers = [user for user, _ in node.outputs[0].uses()]
    limits = re.fullmatch(r"(-?\d{1,9}) (-?\d{1,9})", node.metadata_props[OWN])
    scale, zero = (stored(v) for v in node.inputs[1:3])
    if len(readers) != 1 or readers[0].op_type != "DequantizeLinear" or not limits or scale is None or zero is None:
        return  # somebody else's
    if scale.ndim and zero.astype(np.float32).any():
        return  # the operator has no zero points per position
    real, (low, high) = readers[0], map(int, limits.groups())
    attributes: dict[str, int | float] = {"low": low, "high": high}
    inputs = [node.inputs[0]]
    if scale.ndim:
        attributes["axis"] = int(attribute(node, "axis", 1))
        inputs.append(node.inputs[1])
    else:
        attributes |= {"scale": float(scale), "zero_point": int(zero)}
    rounding = ir.node(FAKE_QUANTIZE, inputs, attributes, domain=DOMAIN, name=str(node.name))
    rounding.outputs[0].name = editor.unique(f"{real.outputs[0].name}_fake")
    editor.graph.insert_before(node, rounding)
    editor.values[str(rounding.outputs[0].name)] = rounding.outputs[0]
    editor.redirect(real.outputs[0], rounding.outputs[0])
