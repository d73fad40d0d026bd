"""Rewrites of an exported ONNX graph into the forms that runtimes fuse into integer kernels.

Frameworks carry their rounding into ONNX as one private operator, ``slimline::FakeQuantize`` (`schema`), so that no
constant folding can touch it. The passes here turn them into standard QuantizeLinear/DequantizeLinear (QDQ) pairs:
weights become int8 initializers, biases int32 ones on the product of the scales of input and weight, and activations
pairs on uint8. Last, everything that is no part of the computation (names, traces, inferred shapes) is dropped.
`rewrite` is what ONNX Runtime fuses; `store_weights` leaves activations to runtimes that have an operator of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from slimline.basics.errors import SlimlineError
from slimline.methods.formats import Blocks, FloatFormat, Format, IntegerGrid, along
from slimline.runtimes.forms.onnx_dynamic import expand, pack_recurrent
from slimline.runtimes.forms.onnx_formats import FLOATS
from slimline.runtimes.forms.onnx_graph import DOMAIN, FAKE_QUANTIZE, FLOAT_ENDS, LAYER, attribute, replace
from slimline.runtimes.forms.onnx_products import add_biases
from slimline.runtimes.forms.onnx_tables import decode_rows
from slimline.runtimes.forms.onnx_weights import INT4_OPSET, pack, raise_opset, upgrade

Array = np.ndarray[Any, np.dtype[Any]]

_MOVES = {
    "MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze",
    "Slice", "Split", "Gather", "Expand", "Pad", "Identity",
}  # fmt: skip
_BIASED = {"Conv", "ConvTranspose", "Gemm"}
WEIGHTED = frozenset({*_BIASED, "MatMul"})
"""Operators that have the weight of a layer as their second operand."""
_INT32 = np.iinfo(np.int32)
HALF_OPSET = 19
"""The first in which pairs may be of float16 or to float8_e4m3fn."""
NO_WEIGHTS: Mapping[str, Format] = MappingProxyType({})


def schema() -> onnx.defs.OpSchema:
    """Of the operator that stands for rounding: ``x``, and ``scales`` where there is one per position of ``axis``;
    ``low`` and ``high`` are the ends of the codes, or those of `FLOAT_ENDS`. Where it is ``dynamic`` the grid is made
    of what is there when the model runs, see `slimline.methods.dynamic`: which of these grids it is the ends tell."""
    parameter, field = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema.Attribute
    kinds = onnx.defs.OpSchema.AttrType
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    return onnx.defs.OpSchema(
        FAKE_QUANTIZE,
        DOMAIN,
        1,
        inputs=[parameter("x", "T"), parameter("scales", "T", param_option=optional)],
        outputs=[parameter("y", "T")],
        type_constraints=[("T", ["tensor(float)"], "")],
        attributes=[
            field("scale", kinds.FLOAT, required=False),
            field("zero_point", kinds.INT, required=False),
            field("axis", kinds.INT, required=False),
            field("dynamic", kinds.INT, required=False),
            field("low", kinds.INT),
            field("high", kinds.INT),
        ],
    )


def serialized(model: ir.Model, passes: Callable[[ir.Model], None]) -> bytes:
    """The bytes of the model after `passes`, checked; the same each time.

    Raises
    ------
    SlimlineError : it is no valid ONNX.
    """
    try:
        passes(model)
        proto = ir.to_proto(model)
        del proto.graph.value_info[:]  # shapes of the weights, which say nothing that the weights do not
        onnx.checker.check_model(proto, full_check=True)
    except SlimlineError:
        raise
    except Exception as error:  # the checker raises many types
        reason = " ".join((str(error).strip().splitlines() or [type(error).__name__])[0].split())[:200].rstrip(".: ")
        raise SlimlineError(
            f"The model cannot be written as ONNX ({reason}): express that part of it by common operators."
        ) from error
    content: bytes = proto.SerializeToString(deterministic=True)
    return content


def rewrite(model: ir.Model, weights: Mapping[str, Format] = NO_WEIGHTS, own: bool = False) -> None:
    """Run all passes on `model`, in place.

    Parameters
    ----------
    weights : formats of the weights that are stored by themselves, see `slimline.runtimes.forms.onnx_weights`.
    own : whether linear layers may be an operator of ONNX Runtime's own, see `slimline.runtimes.forms.onnx_products`.
    """
    graph = model.graph
    _pack(model, weights, ragged=True)
    _pool_means(graph)
    _drop_clamps(graph)
    _carry_grids(graph)
    _Expander(graph).run()
    if own:
        add_biases(model)
    _tidy(model)


def explicit(model: ir.Model, weights: Mapping[str, Format] = NO_WEIGHTS, half: bool = False) -> None:
    """Run the passes for TensorRT, in place: pairs where values are rounded, biases in float. `weights` as in
    `rewrite`; `half` says that the file will be in float16."""
    graph = model.graph
    upgrade(model, weights)
    rounded = [node for node in graph if node.op_type == FAKE_QUANTIZE]
    if (half and rounded) or any(_float_type(node) for node in rounded):
        raise_opset(model, HALF_OPSET)
    name_nodes(graph)
    pack(model, weights, explicit=True)
    _Expander(graph).pairs()
    _tidy(model)


def store_weights(model: ir.Model, weights: Mapping[str, Format] = NO_WEIGHTS) -> None:
    """Name operators and store codes of weights as initializers, in place; activations stay on
    ``slimline::FakeQuantize``. `weights` as in `rewrite`."""
    graph = model.graph
    _pack(model, weights, ragged=False)
    _Expander(graph).weights()
    _tidy(model)
    model.opset_imports[DOMAIN] = 1


def _pack(model: ir.Model, weights: Mapping[str, Format], ragged: bool) -> None:
    """Name operators, and store weights that are stored by themselves."""
    upgrade(model, weights)
    if any(node.op_type == FAKE_QUANTIZE and _is_weight(node) and grid_of(node).bits <= 4 for node in model.graph):
        raise_opset(model, INT4_OPSET)
    name_nodes(model.graph)
    expand(model.graph)
    pack_recurrent(model, weights)
    pack(model, weights, ragged)


def _tidy(model: ir.Model) -> None:
    _drop_unused(model.graph)
    _strip(model)


def name_nodes(graph: ir.Graph) -> None:
    """Name every operator by the user's layer: plainly those with weights, the others with their operator."""
    taken: set[str] = set()
    for node in graph:
        layer, weighted = node.metadata_props.get(LAYER, ""), False
        if node.op_type in WEIGHTED and node.inputs[1] is not None:
            weight: ir.Value | None = node.inputs[1]
            while weight is not None and (source := weight.producer()) is not None:
                weight = source.inputs[0] if source.op_type in (FAKE_QUANTIZE, "Transpose") else None
            if weight is not None and weight.name in graph.initializers:
                layer, weighted = layer or str(weight.name).rpartition(".")[0], True
        if not layer:
            scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
            parts = [part.strip(" '\"") for part in scopes.strip("[]").split(",")]
            layer = parts[-2] if len(parts) > 1 else ""
        name = layer if weighted and layer else f"{layer}/{node.op_type}".lstrip("/")
        unique, count = name, 1
        while unique in taken:
            count += 1
            unique = f"{name}_{count}"
        taken.add(unique)
        node.name = unique


def _pool_means(graph: ir.Graph) -> None:
    """Write a mean over all spatial dimensions as GlobalAveragePool, which has an integer kernel."""
    for node in list(graph):
        if node.op_type != "ReduceMean" or len(node.inputs) < 2:
            continue
        x, axes = node.inputs[0], _constant(node.inputs[1])
        if x is None or x.shape is None or axes is None or len(x.shape) < 3:
            continue
        rank = len(x.shape)
        if sorted(int(a) % rank for a in axes.ravel()) != list(range(2, rank)):
            continue
        mean = node.outputs[0]
        pool = ir.node("GlobalAveragePool", [x], name=node.name)
        replacement = [pool]
        if not attribute(node, "keepdims", 1):
            rounding = sole_rounding(mean)
            if rounding is not None:  # round before the reshape too, so that the pool itself is integer
                replacement.append(_rounding_like(rounding, replacement[-1].outputs[0]))
            replacement.append(
                ir.node("Flatten", [replacement[-1].outputs[0]], {"axis": 1}, name=f"{node.name}/Flatten")
            )
        replace(graph, node, replacement)


def _drop_clamps(graph: ir.Graph) -> None:
    """Remove Relu and Clip where the integer range that follows clamps as much."""
    for node in list(graph):
        if node.op_type not in ("Relu", "Clip"):
            continue
        rounding = sole_rounding(node.outputs[0])
        if rounding is None or node.inputs[0] is None:
            continue
        grid = grid_of(rounding)
        scale, zero = float(grid.scale), int(grid.zero)
        bottom, top = (grid.low - zero) * scale, (grid.high - zero) * scale
        low, high = 0.0, np.inf
        if node.op_type == "Clip":
            limits = [None if v is None else _constant(v) for v in node.inputs[1:]]
            if any(v is not None and c is None for v, c in zip(node.inputs[1:], limits, strict=True)):
                continue
            low = -np.inf if not limits or limits[0] is None else float(limits[0])
            high = np.inf if len(limits) < 2 or limits[1] is None else float(limits[1])
        # Less than half a step beyond the limit rounds onto the same level as the limit does.
        if bottom > low - scale / 2 and top < high + scale / 2:
            replace(graph, node, [], node.inputs[0])


def _carry_grids(graph: ir.Graph) -> None:
    """Round again after operators that only move numbers, so that they run on integers."""
    for node in list(graph):
        source = node.inputs[0].producer() if node.op_type in _MOVES and node.inputs and node.inputs[0] else None
        if source is None or source.op_type != FAKE_QUANTIZE or _is_weight(source):
            continue
        for moved in node.outputs:
            users = list(moved.uses())
            if sole_rounding(moved) is not None or moved.is_graph_output() or not users:
                continue
            rounding = _rounding_like(source, moved)
            graph.insert_after(node, rounding)
            for user, index in users:
                user.replace_input_with(index, rounding.outputs[0])


@dataclass
class _Expander:
    """Turns rounding operators into integer initializers and QDQ pairs."""

    graph: ir.Graph

    def __post_init__(self) -> None:
        self.shared: dict[tuple[str, bytes], ir.Value] = {}
        self.scales: dict[ir.Value, Array] = {}
        self.count = 0

    def run(self) -> None:
        """Expand all of them, weights and activations first, biases last."""
        self.pairs()
        for node in list(self.graph):
            if node.op_type in _BIASED and node.inputs[0] in self.scales:
                if node.inputs[1] in self.scales:
                    self._bias(node)
                else:
                    self._keep_float(node)

    def pairs(self) -> None:
        """Expand weights and activations."""
        for node in [n for n in self.graph if n.op_type == FAKE_QUANTIZE and n.domain == DOMAIN]:
            if _is_weight(node):
                self._weight(node)
            else:
                self._activation(node)

    def weights(self) -> None:
        """Expand those of weights alone."""
        for node in [n for n in self.graph if n.op_type == FAKE_QUANTIZE and n.domain == DOMAIN]:
            if _is_weight(node):
                self._weight(node)

    def _activation(self, node: ir.Node) -> None:
        grid = _format_of(node)
        if isinstance(grid, FloatFormat):
            ends = [self._store(grid.scale), self._store(np.zeros((), FLOATS[grid.dtype]))]
            self._pair(node, ends, [ir.node("QuantizeLinear", [node.inputs[0], *ends], name="")], grid.scale)
            return
        scale, kind = grid.scale, np.int8 if grid.signed else np.uint8
        first = 0
        if grid.bits < 8:  # always from 0 on: what lies between limits is not taken from signed to unsigned later
            first, kind = grid.low, np.uint8
        ends = [self._store(scale), self._store((grid.zero - first).astype(kind))]
        nodes = [ir.node("QuantizeLinear", [node.inputs[0], *ends], name="")]
        if grid.bits < 8:  # the type would hold more
            limits = [self._store(np.asarray(end - first, kind)) for end in (grid.low, grid.high)]
            nodes.append(ir.node("Clip", [nodes[0].outputs[0], *limits], name=""))
        self._pair(node, ends, nodes, scale)

    def _pair(self, node: ir.Node, ends: list[ir.Value], nodes: list[ir.Node], scale: Array) -> None:
        """What makes codes, and behind it what makes numbers of them, in the place of an operator."""
        real = ir.node("DequantizeLinear", [nodes[-1].outputs[0], *ends], name="")
        replace(self.graph, node, [*nodes, real])
        self.scales[real.outputs[0]] = scale

    def _weight(self, node: ir.Node) -> None:
        grid, value = _format_of(node), node.inputs[0]
        weight = _constant(value)
        assert value is not None and weight is not None
        codes, kind, axis = grid.encode(weight), np.dtype(np.int8), grid.axis
        if isinstance(grid, FloatFormat):
            kind = np.dtype(FLOATS[grid.dtype])
            codes = codes.view(kind)
        elif decode_rows(self.graph, node, grid, codes, self._store) is not None:
            return
        scales = grid.scale if axis is None else grid.scale.ravel()
        users = [user for user, _ in node.outputs[0].uses()]
        turned = None
        if len(users) == 1 and users[0].op_type == "Transpose":  # a linear layer written as a product
            turned = users[0]
            order = attribute(turned, "perm", list(range(weight.ndim))[::-1])
            codes = np.ascontiguousarray(np.transpose(codes, order))
            axis = None if axis is None else list(order).index(axis)
        zeros = self._store(np.zeros(scales.shape, kind))  # QGemm and QLinearMatMul want them written out
        short = grid.code_bits <= 4
        stored = self._initializer(codes.astype(ml_dtypes.int4) if short else codes, f"{value.name}_quantized")
        if short:  # a constant that ONNX Runtime computes at load; it fuses no DequantizeLinear of int4
            widened = ir.node("Cast", [stored], {"to": ir.DataType.INT8}, name="")
            self.graph.insert_before(node, widened)
            stored = widened.outputs[0]
        attributes = {} if axis is None else {"axis": axis}
        real = ir.node("DequantizeLinear", [stored, self._store(scales), zeros], attributes, name="")
        if turned is not None:
            replace(self.graph, turned, [], node.outputs[0])
        replace(self.graph, node, [real])
        self.scales[real.outputs[0]] = scales

    def _keep_float(self, node: ir.Node) -> None:
        """Let a layer that is meant to be float read its input through a DequantizeLinear with a scale per channel.

        ONNX Runtime (its WeightBiasQuantization pass) rounds the float weights of a layer between QDQ pairs,
        unasked and per tensor, if the scale of its input is a single number.
        """
        real = node.inputs[0]
        weight = _constant(node.inputs[1])
        source = None if real is None else real.producer()
        if source is None or weight is None:
            return
        if node.op_type == "Conv":
            channels = weight.shape[1] * attribute(node, "group", 1)
        else:
            channels = weight.shape[1 if attribute(node, "transB", 0) else 0]
        ends = [_constant(value) for value in source.inputs[1:]]
        spread = [self._store(np.full(channels, end, end.dtype)) for end in ends if end is not None]
        apart = ir.node("DequantizeLinear", [source.inputs[0], *spread], {"axis": 1}, name="")
        self.graph.insert_before(node, apart)
        node.replace_input_with(0, apart.outputs[0])

    def _bias(self, node: ir.Node) -> None:
        x, weight = node.inputs[:2]
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        real = _constant(bias)
        if x is None or weight is None or bias is None or real is None:
            return
        if node.op_type == "Gemm" and (attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0)) != (1.0, 1.0):
            return
        # ONNX Runtime takes the bias to be on exactly this grid.
        scale = (self.scales[x] * self.scales[weight]).astype(np.float32)
        steps = np.rint(real.astype(np.float64) / scale.astype(np.float64))
        integers = np.clip(steps, _INT32.min, _INT32.max).astype(np.int32)
        if scale.ndim == 0:
            attributes = {}
        else:
            scale, attributes = np.broadcast_to(scale, integers.shape), {"axis": 0}
        stored = self._initializer(integers, f"{bias.name}_quantized")
        back = ir.node("DequantizeLinear", [stored, self._store(np.ascontiguousarray(scale))], attributes, name="")
        self.graph.insert_before(node, back)
        node.replace_input_with(2, back.outputs[0])

    def _store(self, array: Array) -> ir.Value:
        """An initializer with this content, shared by all that need the same."""
        key = (f"{array.dtype}{array.shape}", array.tobytes())
        if key not in self.shared:
            self.count += 1
            self.shared[key] = self._initializer(array, f"slimline_constant_{self.count}")
        return self.shared[key]

    def _initializer(self, array: Array, name: str) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value


def grid_of(node: ir.Node) -> IntegerGrid:
    """The integer grid that a rounding operator carries."""
    low, high, axis = (attribute(node, name, None) for name in ("low", "high", "axis"))
    scale, blocks = _scales(node)
    zero = None if axis is not None else np.asarray(attribute(node, "zero_point", None), np.int32)
    return IntegerGrid.between(low, high, scale, blocks, zero)


def _format_of(node: ir.Node) -> IntegerGrid | FloatFormat:
    """The format that a rounding operator carries."""
    dtype = _float_type(node)
    return grid_of(node) if dtype is None else FloatFormat(*_scales(node), dtype)


def _float_type(node: ir.Node) -> str | None:
    """The float type to whose numbers an operator rounds; None where it rounds to integers."""
    ends = attribute(node, "low", None), attribute(node, "high", None)
    return next((dtype for dtype, own in FLOAT_ENDS.items() if own == ends), None)


def _scales(node: ir.Node) -> tuple[Array, Blocks]:
    """The scales that a rounding operator carries, and how they lie."""
    axis = attribute(node, "axis", None)
    if axis is None:
        return np.asarray(attribute(node, "scale", None), np.float32), ()
    scales, value = _constant(node.inputs[1]), node.inputs[0]
    assert scales is not None and value is not None and value.shape is not None
    blocks = along(axis, len(value.shape))
    return scales.reshape([1 if b is None else -1 for b in blocks]), blocks


def _is_weight(node: ir.Node) -> bool:
    """Whether a rounding operator rounds a stored tensor."""
    return _constant(node.inputs[0]) is not None


def sole_rounding(value: ir.Value) -> ir.Node | None:
    """The rounding operator that alone reads `value`, if that is so."""
    users = [user for user, _ in value.uses()]
    if len(users) == 1 and users[0].op_type == FAKE_QUANTIZE and not value.is_graph_output():
        return users[0]
    return None


def _rounding_like(node: ir.Node, x: ir.Value) -> ir.Node:
    """Another rounding of `x` to the grid of `node`, an activation's."""
    return ir.Node(DOMAIN, FAKE_QUANTIZE, [x], list(node.attributes.values()), name="")


def _constant(value: ir.Value | None) -> Array | None:
    """The content of an initializer."""
    if value is None or value.const_value is None or value.producer() is not None:
        return None
    content: Array = value.const_value.numpy()
    return content


def _drop_unused(graph: ir.Graph) -> None:
    """Remove operators and initializers that nothing reads."""
    for node in reversed(list(graph)):
        if all(not o.uses() and not o.is_graph_output() for o in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def _strip(model: ir.Model) -> None:
    """Drop all that is no part of the computation and shorten names; inputs, outputs and layers keep theirs."""
    graph = model.graph
    model.producer_name, model.producer_version, model.doc_string = "slimline", None, None
    model.metadata_props.clear()
    model.opset_imports.pop(DOMAIN, None)
    graph.name, graph.doc_string = "g", None
    graph.metadata_props.clear()
    interface = {id(v) for v in (*graph.inputs, *graph.outputs)}
    for number, value in enumerate(list(graph.initializers.values())):
        if id(value) not in interface:
            value.name = f"w{number}"
    number = 0
    for node in graph:
        node.doc_string = None
        node.metadata_props.clear()
        for output in node.outputs:
            output.metadata_props.clear()
            if id(output) not in interface:
                output.name, output.shape, output.type = f"v{number}", None, None
                number += 1
    symbols: dict[str, str] = {}
    for value in (*graph.inputs, *graph.outputs):
        value.metadata_props.clear()
        if value.shape is not None:
            value.shape = ir.Shape([d if isinstance(d, int) else _symbol(str(d.value), symbols) for d in value.shape])


def _symbol(name: str, symbols: dict[str, str]) -> str:
    """Stable names for dynamic sizes; the first one met is the batch."""
    return symbols.setdefault(name, "batch" if not symbols else f"size{len(symbols)}")
