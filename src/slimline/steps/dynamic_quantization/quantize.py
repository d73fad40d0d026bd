"""From a float model to one whose weights lie on integer grids and whose linear layers round what they read.

As with weights that are stored alone, the rounded numbers take the float ones' place, so that encoding them again gives
the same codes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from slimline.basics.errors import SlimlineError
from slimline.data.splits import first
from slimline.graph.edits import FoldNorms, PutTensors, Round
from slimline.graph.ir import IDLE, Graph, Node
from slimline.graph.quantization import Quantization
from slimline.methods.dynamic import GRIDS
from slimline.methods.formats import Array, Blocks, FloatFormat, Scaled
from slimline.methods.scales import least_squares, widest
from slimline.model import Model
from slimline.model.lowering import check_dynamic, check_marks, check_multiplied
from slimline.recipe.layers import refuse_unmatched, selected
from slimline.runtimes.base import Runtime, names, runtime
from slimline.steps.base import Context
from slimline.steps.dynamic_quantization.step import DynamicQuantization
from slimline.steps.quantization.undo import Artifacts

SAMPLES, BATCH = 256, 64
"""Calibration samples that are timed and compared with, and how many at a time."""
_LSTM_GATES = 4
_IMAGES = 4
"""Dimensions of the weight of a convolution over images; those over sequences have fewer."""
_KINDS = {"linear": "linear layer", "conv": "convolution", "lstm": "LSTM", "embedding": "embedding"}
_PARTED = "there is no kernel with ranges found at run time for grouped, depthwise, transposed or 3D convolutions"


@dataclass(frozen=True)
class Weight:
    """A stored tensor on a grid.

    Attributes
    ----------
    layer : the user's name of the layer that reads it.
    kind : ``linear``, ``conv``, ``lstm`` or ``embedding``.
    shape : of the tensor.
    outputs : dimensions that have a scale per position.
    """

    layer: str
    kind: str
    shape: tuple[int, ...]
    outputs: tuple[int, ...]

    def is_short(self, step: DynamicQuantization, target: Runtime) -> bool:
        """Whether it takes int4."""
        inputs = math.prod(n for d, n in enumerate(self.shape) if d not in self.outputs)
        return step.weights == "int4" and self.kind == "linear" and inputs % target.short_multiple == 0

    def blocks(self, group: int | None) -> Blocks:
        """How scales lie over it, where so many inputs of an output share one."""
        return tuple(1 if d in self.outputs else group for d in range(len(self.shape)))


@dataclass
class Selection:
    """By name the weights to put on grids, and by layer why others are left."""

    weights: dict[str, Weight] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


def selection(model: Model, step: DynamicQuantization, target: str | None = None) -> Selection:
    """What the step is about; of all targets together where none is named.

    Raises
    ------
    SlimlineError : a quantized model, a pattern that fits no layer, or no weight at all.
    """
    if model.quantization is not None:
        raise SlimlineError("This model is quantized already: apply DynamicQuantization to the float model instead.")
    graph = model.graph
    layers = [node.layer or node.name for node in graph.nodes]
    for side in ("layers", "keep"):
        refuse_unmatched(f"layer for {side}", getattr(step, side), layers, graph.types)
    dynamic = frozenset[str]().union(*(runtime(each).dynamic for each in (names() if target is None else [target])))
    result = Selection()
    for node, layer in zip(graph.nodes, layers, strict=True):
        if not selected((layer,), step.layers, step.keep, graph.types):
            continue
        kind, weights = _weights(node, graph)
        reason = "" if kind in dynamic and weights else _reason(node, kind, dynamic, target)
        if weights and node.name in graph.idle:
            reason = IDLE
        if reason:
            result.left.setdefault(layer, reason)
            continue
        for name, outputs in weights.items():
            result.weights.setdefault(name, Weight(layer, kind, tuple(graph.values[name].shape), outputs))
    if not result.weights:
        kinds = [words for kind, words in _KINDS.items() if kind in dynamic]
        raise SlimlineError(
            f"DynamicQuantization finds no weight: layers={list(step.layers)} and keep={list(step.keep)} leave no "
            f"{' or '.join(kinds)} with stored float32 weights."
        )
    return result


def _weights(node: Node, graph: Graph) -> tuple[str, dict[str, tuple[int, ...]]]:
    """What kind of layer an operator is, and its stored matrices with the dimensions that are outputs."""

    def stored(index: int) -> str | None:
        name = node.inputs[index] if index < len(node.inputs) else None
        return name if name in graph.trainable and graph.values[name].dtype == "float32" else None

    match node.kind:
        case "embedding" if (table := stored(1)) is not None:
            return "embedding", {table: (0,)}
        case "linear" if (name := stored(1)) is not None and len(graph.values[name].shape) == 2:
            equation = node.attributes["equation"]
            axes = {axis for dim in equation.outputs[0] for axis in dim}
            outputs = tuple(d for d, dim in enumerate(equation.inputs[1]) if all(axis in axes for axis in dim))
            if len(outputs) == 1:
                return "linear", {name: outputs}
        case "conv" if (name := stored(1)) is not None and not node.attributes["transposed"]:
            equation = node.attributes["equation"]
            axes = {axis for dim in equation.outputs[0] for axis in dim if not axis.startswith(".")}
            dims = equation.inputs[1]
            outputs = tuple(d for d, dim in enumerate(dims) if dim and all(axis in axes for axis in dim))
            if len(outputs) == 1 and all(len(dim) < 2 for dim in dims) and len(dims) <= _IMAGES:
                return "conv", {name: outputs}
        case "recurrent":
            equation, kernels = node.attributes["equation"], node.attributes["kernels"]
            gated = {axis for axis, size in equation.sizes.items() if size == _LSTM_GATES}
            matrices: dict[str, tuple[int, ...]] = {}
            for index in kernels:
                rows = [d for d, dim in enumerate(equation.inputs[index]) if len(dim) > 1 and gated & set(dim)]
                name = stored(index)
                if name is None or not rows or rows[0] != len(equation.inputs[index]) - 2:
                    return "recurrent", {}
                matrices[name] = tuple(range(rows[0] + 1))
            return "lstm", matrices
    return node.kind, {}


def _reason(node: Node, kind: str, dynamic: Collection[str], target: str | None) -> str:
    """Why an operator with weights stays in float; '' for others."""
    if node.kind == "conv":
        none = f"{target} has no fast kernel for convolutions with ranges found at run time: use StaticQuantization"
        return _PARTED if "conv" in dynamic else none
    if kind == "embedding":
        return f"{target} does not store tables of embeddings beside such layers"
    if node.kind == "recurrent":
        what = "LSTMs" if kind == "lstm" else "recurrent layers other than plain LSTMs (GRU, RNN, projected)"
        return f"{target or 'no target'} has no integer operator with ranges found at run time for {what}"
    if node.kind == "einsum":
        return "a product written as an einsum has no integer operator: write it as a linear layer"
    return ""


def check(step: DynamicQuantization, model: Model) -> None:
    """Refuse what has nothing to quantize."""
    selection(model, step)


def check_target(step: DynamicQuantization, target: str, model: Model) -> None:
    """Refuse a target that has no such integers, or cannot store such weights, and models that cannot be written so."""
    served = runtime(target)
    check_dynamic(served)
    check_marks(served, model)
    if served.dynamic_grid == GRIDS[0] and not model.adapter.rounds_tensors:
        others = [name for name in names() if runtime(name).dynamic and runtime(name).dynamic_grid != GRIDS[0]]
        raise SlimlineError(
            f"Models of this framework do not round as {target} does when it runs: choose the target "
            f"{' or '.join(others)}, or export the model as ONNX and compress that file."
        )
    for weight in selection(model, step, target).weights.values():
        dtype, group = _dtype(weight, step, 8, served)
        check_multiplied(served, widest(np.ones(weight.shape, np.float32), dtype, weight.blocks(group)))


def quantize(
    model: Model, step: DynamicQuantization, target: str, bits: int, exclude: Mapping[str, str] | None = None
) -> Model:
    """The model that simulates the artifact of a target; `model` stays as it is.

    Parameters
    ----------
    bits : of int8 weights, see `Runtime.weight_bits`.
    exclude : layers that must stay in float, with the reason that the report gives.
    """
    exclude = dict(exclude or {})
    folded = Model(model.adapter, model.edit(FoldNorms()), model.example, masks=model.masks)
    weights = {n: w for n, w in selection(folded, step, target).weights.items() if w.layer not in exclude}
    stored = folded.parameters()
    served = runtime(target)
    formats = {name: _format(stored[name], weight, step, bits, served) for name, weight in weights.items()}
    rounded = {name: each.round(stored[name]) for name, each in formats.items()}
    read_rounded = [name for name, weight in weights.items() if weight.kind in ("linear", "conv")]
    dynamic = tuple(n for n in read_rounded if not (served.rounds_short and weights[n].is_short(step, served)))
    quantization = Quantization(
        weights=formats,
        layers=tuple(dict.fromkeys(w.layer for w in weights.values() if w.kind != "embedding")),
        float_layers=exclude,
        stored=True,
        dynamic=dynamic,
        dynamic_grid=served.dynamic_grid,
    )
    grids = Quantization(dynamic=dynamic, dynamic_grid=served.dynamic_grid)
    native = folded.edit(PutTensors(rounded), Round(grids))
    record = {**step.model_dump(mode="json"), "target": target, "float_layers": exclude}
    return model.then(native, record, quantization)


def _dtype(weight: Weight, step: DynamicQuantization, bits: int, target: Runtime) -> tuple[str, int | None]:
    """The integers of a weight, and how many inputs of an output share a scale; None for all."""
    if weight.is_short(step, target):
        return "int4", target.short_group
    return f"int{8 if weight.kind == 'embedding' else bits}", None


def _format(array: Array, weight: Weight, step: DynamicQuantization, bits: int, target: Runtime) -> Scaled:
    dtype, group = _dtype(weight, step, bits, target)
    try:
        each = widest(array, dtype, weight.blocks(group))
    except SlimlineError as reason:
        raise SlimlineError(f"{weight.layer}: {reason}") from reason
    if dtype != "int4":
        return each
    fitted = least_squares(array, each)
    return replace(fitted, scale=FloatFormat.plain(target.short_scales).round(fitted.scale))


class DynamicArtifacts(Artifacts):
    """Artifacts of the step with different layers in float."""

    def __init__(self, model: Model, step: DynamicQuantization, context: Context) -> None:
        data = context.data
        batches = [model.example]
        if data is not None and data.has("calibration"):
            batches = first(data.split("calibration"), SAMPLES, BATCH)
        super().__init__(model, step, context, batches)
        self._dynamic = step

    @property
    def settings(self) -> tuple[object, ...]:
        return self._dynamic.layers, self._dynamic.keep, self._dynamic.weights, self._dynamic.step

    def quantized(self, back: Mapping[str, str]) -> Model:
        return quantize(self.model, self._dynamic, self.target, self.bits, back)
