"""From a float model to one whose weights lie on the numbers of their formats.

The rounded weights take the place of the float ones, so the model computes what the artifact will, and encoding them
again gives the same codes. Nothing is rounded when the model runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from slimline.basics.errors import SlimlineError
from slimline.data.splits import first
from slimline.evidence.grams import collect
from slimline.evidence.propagation import layer_by_layer
from slimline.graph.edits import FoldNorms, PutTensors
from slimline.graph.ir import IDLE, Node
from slimline.graph.matrix import LayerMatrix, matrices
from slimline.graph.quantization import Quantization
from slimline.methods.formats import Array, Blocks, Scaled
from slimline.methods.gram import Gram
from slimline.methods.levels import fitted, levels
from slimline.methods.scales import fitting_blocks, widest
from slimline.model import Model
from slimline.model.lowering import check_marks, check_stored
from slimline.recipe.layers import first_match, refuse_unmatched, selected
from slimline.runtimes.base import Runtime, runtime
from slimline.steps.base import Context, StepResult
from slimline.steps.weight_quantization.awq import scaled_by_salience
from slimline.steps.weight_quantization.rotation import rotatable, rotated
from slimline.steps.weight_quantization.step import WeightQuantization, WeightType
from slimline.steps.weight_rounding import MEASURED, WeightRounding

_log = logging.getLogger(__name__)

_FLOATS = {"fp16": "float16", "bf16": "bfloat16", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
_READERS = ("conv", "linear", "einsum", "embedding")


@dataclass(frozen=True)
class _Weight:
    """A stored tensor that is rounded: the first operator that reads it, and that layer's matrix where it has one."""

    layer: str
    node: Node
    matrix: LayerMatrix | None


def chosen(model: Model, step: WeightQuantization) -> tuple[dict[str, _Weight], list[dict[str, str]]]:
    """By name the weights to round, and layers that cannot have it, with the reason.

    Raises
    ------
    SlimlineError : a quantized model, a pattern that fits no layer, or no weight at all.
    """
    if model.quantization is not None:
        raise SlimlineError("This model is quantized already: apply WeightQuantization to the float model instead.")
    if step.rotation is not None:
        rotatable(model)
    refuse_revival([step.dtype, *(own.dtype for own in step.overrides.values())], bool(model.masks))
    graph = model.graph
    layers = {node.name: node.layer or node.name for node in graph.nodes}
    for field in ("layers", "keep", "overrides"):
        refuse_unmatched(f"layer for {field}", getattr(step, field), layers.values(), graph.types)
    of_node = {matrix.node: matrix for matrix in matrices(graph)}
    weights: dict[str, _Weight] = {}
    refused = []
    for node in graph.nodes:
        layer = layers[node.name]
        if not selected((layer,), step.layers, step.keep, graph.types):
            continue
        if node.kind == "recurrent":
            refused.append({"what": layer, "reason": "weights of recurrent layers have no other storage yet"})
        name = node.inputs[1] if node.kind in _READERS and len(node.inputs) > 1 else None
        if name not in graph.trainable or name in weights:
            continue
        if node.name in graph.idle:
            refused.append({"what": layer, "reason": IDLE})
            continue
        if graph.values[name].dtype != "float32":
            refused.append({"what": layer, "reason": f"its weight is stored as {graph.values[name].dtype} already"})
            continue
        weights[name] = _Weight(layer, node, of_node.get(node.name))
    if not weights:
        raise SlimlineError(
            f"WeightQuantization finds no weight: layers={list(step.layers)} and keep={list(step.keep)} leave no "
            "convolution, linear layer or embedding with stored float32 weights."
        )
    return weights, refused


def refuse_revival(dtypes: Iterable[Any], masked: bool) -> None:
    """Refuse levels without a zero for weights of which some have to stay zero."""
    units = [levels(dtype) for dtype in dtypes if dtype is not None]
    if masked and any(unit is not None and 0 not in unit.codebook for unit in units):
        raise SlimlineError("Levels without a zero would revive what was pruned: choose ternary instead of binary.")


def check_target(step: WeightQuantization, target: str, model: Model) -> None:
    """Refuse a target that does not store the types of `step`, or does not for models like `model`."""
    for pattern in (None, *step.overrides):
        dtype, size = step.storage(pattern)
        group = min(size or 1, 64)
        blocks = (1, None) if size is None else (1, group)
        check_stored(runtime(target), _start(np.ones((1, 2 * group), np.float32), dtype, blocks, step))
    check_marks(runtime(target), model)


def quantize(model: Model, step: WeightQuantization, context: Context) -> StepResult:
    """The model with rounded weights, and what was done to each."""
    chosen(model, step)
    folded = Model(model.adapter, model.edit(FoldNorms()), model.example, masks=model.masks)
    weights, refused = chosen(folded, step)
    target = runtime(context.target)
    if step.rotation is not None:
        folded = rotated(folded)
    starts = {name: partial(_format, of=weight, step=step, model=folded) for name, weight in weights.items()}
    batches = _batches(weights, step, context)
    grams, exponents = dict[str, Gram](), dict[str, float]()
    if batches and (step.scaling is not None or not step.propagate):
        grams = collect(folded, _matrices(weights), batches)
    if step.scaling is not None:
        folded, grams, exponents = scaled_by_salience(folded, grams, starts)
    job = _Rounded(step, folded.parameters(), weights, starts, model.masks, exponents)
    if batches and step.propagate:
        alone = [layer for layer in _matrices(weights) if len(folded.graph.consumers()[layer.weight]) == 1]
        for name in [name for name in weights if name not in {layer.weight for layer in alone}]:
            job.round(name, None)
        layer_by_layer(folded, alone, batches, job.tensors, job.change)
    else:
        for name, weight in weights.items():
            job.round(name, grams.get(weight.node.name))
    formats = {name: job.formats[name] for name in weights}
    layers = {weight.layer: job.layers[weight.layer] for weight in weights.values()}
    quantization = Quantization(weights=formats, stored=True)
    record: dict[str, Any] = step.model_dump(mode="json")
    native = folded.edit(PutTensors(job.tensors))
    changed = model.then(native, {**record, "target": context.target}, quantization)
    record |= {"refused": refused, "formats": quantization.summary(), "layers": layers}
    record["notes"] = _notes(formats, target)
    return StepResult(changed, record)


def _notes(formats: Mapping[str, Scaled], target: Runtime) -> list[str]:
    """What the user should know of how the target holds such weights."""
    if not all(target.can_store(each) for each in formats.values()):
        return [f"{target.name} cannot store weights like these; the model simulates them"]
    spare = sorted({(each.code_bits, target.container(each)) for each in formats.values()})
    odd = [f"codes of {bits} bits take {held} in the file" for bits, held in spare if bits != held]
    return [*([target.storage] if target.storage else []), *odd]


class _Rounded:
    """Weights that are rounded one by one.

    Attributes
    ----------
    formats, tensors : by weight, what it is on and its numbers.
    layers : by layer, what the record says of it.
    """

    def __init__(
        self,
        step: WeightQuantization,
        stored: Mapping[str, Array],
        weights: Mapping[str, _Weight],
        starts: Mapping[str, Callable[[Array], Scaled]],
        masks: Mapping[str, Array],
        exponents: Mapping[str, float],
    ) -> None:
        self.step, self.stored, self.weights, self.starts, self.masks = step, stored, weights, starts, masks
        self.exponents = exponents
        self.formats: dict[str, Scaled] = {}
        self.tensors: dict[str, Array] = {}
        self.layers: dict[str, dict[str, Any]] = {}

    def round(self, name: str, gram: Gram | None) -> Array:
        """Round one weight; `gram` is that of what its layer reads, see `WeightRounding`."""
        weight, rounding = self.weights[name], self.step.rounding
        worker = WeightRounding(self.stored[name], weight.matrix, gram, self.masks.get(name), self.step.damping)
        each = self.formats[name] = worker.fitted(self.starts[name](worker.visible), rounding)
        rounded = self.tensors[name] = worker.rounded(each, rounding)
        self.layers[weight.layer] = {
            "format": each.describe(),
            "bits": round(each.bits_per_value(rounded.shape), 3),
            "error": float(f"{worker.error(rounded):.4g}"),
            **({"exponent": round(self.exponents[name], 2)} if name in self.exponents else {}),
        }
        _log.info("%s: %s", weight.layer, self.layers[weight.layer])
        return rounded

    def change(self, layer: LayerMatrix, gram: Gram) -> dict[str, Array]:
        """As `layer_by_layer` asks for it."""
        return {layer.weight: self.round(layer.weight, gram)}


def _matrices(weights: Mapping[str, _Weight]) -> list[LayerMatrix]:
    return [weight.matrix for weight in weights.values() if weight.matrix is not None]


def _batches(weights: Mapping[str, _Weight], step: WeightQuantization, context: Context) -> list[tuple[Array, ...]]:
    """Calibration inputs, where rounding asks for them and there are any."""
    if not _matrices(weights) or (step.rounding not in MEASURED and step.scaling is None):
        return []
    data = context.data
    if data is None or not data.has("calibration"):
        if step.needs:
            raise SlimlineError(
                f"WeightQuantization with {step.scaling or step.rounding} needs data: pass slimline.Data with "
                "calibration or training samples, or choose the rounding hqq alone."
            )
        return []
    return first(data.split("calibration"), step.samples, step.batch_size)


def _format(weight: Array, of: _Weight, step: WeightQuantization, model: Model) -> Scaled:
    """The format that a weight's rounding starts from."""
    dtype, size = step.storage(first_match((of.layer,), step.overrides, model.graph.types))
    try:
        return _start(weight, dtype, blocks_of(weight.shape, of.node, size), step)
    except SlimlineError as reason:
        raise SlimlineError(f"{of.layer}: {reason}") from reason


def _start(weight: Array, dtype: WeightType, blocks: Blocks, step: WeightQuantization) -> Scaled:
    """The format that holds the whole range of a weight, or levels of least squared error."""
    if (unit := levels(dtype)) is not None:
        return fitted(weight, unit, blocks)
    name = str(dtype)
    return widest(weight, _FLOATS.get(name, name), blocks, step.symmetric)


def blocks_of(shape: Sequence[int], node: Node, size: int | None) -> Blocks:
    """How scales lie over the weight that an operator reads."""
    equation = node.attributes["equation"]
    dims = equation.inputs[1]
    if node.kind == "embedding":
        return fitting_blocks(shape, (0,), (1,), (), size)
    read = {axis for dim in equation.inputs[0] for axis in dim}
    written = {axis for dim in equation.outputs[0] for axis in dim}
    kernel = [d for d, dim in enumerate(dims) if dim == (".",)]
    plain = [d for d, dim in enumerate(dims) if d not in kernel and dim != ("1",)]
    outputs = [d for d in plain if all(axis in written for axis in dims[d])]
    inputs = [d for d in plain if all(axis in read and axis not in written for axis in dims[d])]
    return fitting_blocks(shape, outputs, inputs, kernel, size)
