"""Which layer gets which format, and which layers get float back."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slimline.basics.errors import SlimlineError
from slimline.data import Data
from slimline.evidence.grams import collect
from slimline.measure.accuracy import as_outputs, score
from slimline.methods.factorization import allocate
from slimline.methods.gram import Gram
from slimline.model import Model
from slimline.recipe.layers import first_match
from slimline.runtimes.base import runtime
from slimline.steps.mixed_precision.step import MixedPrecision
from slimline.steps.quantization.calibration import Ranges, calibrate, check_short, literal, placed
from slimline.steps.quantization.choices import Choices
from slimline.steps.quantization.step import QuantizationOverride, StaticQuantization, WeightType
from slimline.steps.quantization.weights import integer_matrices, widest_grid
from slimline.steps.weight_rounding import WeightRounding

Array = np.ndarray[Any, np.dtype[Any]]
_log = logging.getLogger(__name__)
_JUDGED = 128  # calibration samples by which the cost of a layer to the outputs is measured


@dataclass(frozen=True)
class Option:
    """A format of one layer's weight, of so many values: its bytes with scales, and the relative error of the layer's
    output."""

    format: WeightType
    values: int
    bytes: float
    error: float


def options(
    model: Model, step: MixedPrecision, target: str, batches: Sequence[tuple[Array, ...]]
) -> dict[str, list[Option]]:
    """By layer, the formats that it may get; those whose format the step's `quantization` names are left out."""
    base = step.quantization
    folded, placement = placed(model, base, target)
    layers = integer_matrices(folded.graph, placement)
    choices, stored = Choices.of(base, folded.graph), folded.parameters()
    own = {name: choices.of_layers((layer.layer,)) for name, layer in layers.items()}
    free = {name: layer for name, layer in layers.items() if not _named(base, own[name].pattern, layer.layer, choices)}
    if not free:
        raise SlimlineError("MixedPrecision finds no layer whose format is open: let overrides name fewer weights.")
    if "int4" in step.formats:
        check_short(target, next(iter(free.values())).layer)
    grams = collect(folded, list(free.values()), batches)
    bits = runtime(target).weight_bits
    result = {}
    for name, layer in free.items():
        worker = WeightRounding(stored[name], layer, grams[layer.node], model.masks.get(name))
        result[layer.layer] = [_option(worker, placement.weights[name], each, base, bits) for each in step.formats]
    return result


def _named(base: StaticQuantization, pattern: str | None, layer: str, choices: Choices) -> bool:
    """Whether an override or a rule names the weights of a layer."""
    if pattern is not None and base.overrides[pattern].weights is not None:
        return True
    first, last = base.first_layers is not None, base.last_layers is not None
    return (first and layer in choices.first) or (last and layer in choices.last)


def _option(worker: WeightRounding, axis: int | None, kind: WeightType, base: StaticQuantization, bits: int) -> Option:
    weight = worker.weight
    if kind == "float32":
        return Option(kind, weight.size, 4.0 * weight.size, 0.0)
    grid = worker.fitted(widest_grid(weight, axis, kind, bits), base.rounding)
    size = weight.size * (4 if kind == "int4" else 8) / 8 + grid.scale.nbytes
    return Option(kind, weight.size, size, worker.error(worker.rounded(grid, base.rounding)))


def chosen(every: Mapping[str, Sequence[Option]], step: MixedPrecision) -> dict[str, Option]:
    """By layer, its format: the best within `max_size` or `max_error`, else the one of least error.

    Raises
    ------
    SlimlineError : no choice is within the limit; says what is the least.
    """
    if step.max_size is None and step.max_error is None:
        return {layer: min(few, key=lambda option: option.error) for layer, few in every.items()}
    sizes = [[option.bytes for option in few] for few in every.values()]
    errors = [[option.error for option in few] for few in every.values()]
    if step.max_size is not None:
        whole = sum(4 * few[0].values for few in every.values())
        picked = allocate(sizes, errors, step.max_size * whole)
        least = sum(map(min, sizes)) / whole
        what = "max_size", step.max_size, f"{least:.3g} of the float bytes"
    else:
        assert step.max_error is not None
        picked = allocate(errors, sizes, step.max_error)
        what = "max_error", step.max_error, f"a total of {sum(map(min, errors)):.3g}"
    if picked is None:
        field, limit, least_words = what
        raise SlimlineError(
            f"No choice of {', '.join(step.formats)} is within {field}={limit:.3g}: {least_words} is the least; raise "
            "it, or add formats."
        )
    return {layer: few[index] for (layer, few), index in zip(every.items(), picked, strict=True)}


def with_formats(base: StaticQuantization, formats: Mapping[str, WeightType], model: Model) -> StaticQuantization:
    """`base` with these formats of layers, which keep what it says of them otherwise."""
    types = model.graph.types
    own: dict[str, QuantizationOverride] = {}
    for layer, kind in formats.items():
        pattern = first_match((layer,), base.overrides, types)
        known = QuantizationOverride() if pattern is None or kind == "float32" else base.overrides[pattern]
        own[literal(layer)] = known.model_copy(update={"weights": kind})
    others = {pattern: known for pattern, known in base.overrides.items() if pattern not in own}
    return base.model_copy(update={"overrides": {**own, **others}})


class Accuracy:
    """What a quantized model loses on the selection samples, by its simulation."""

    def __init__(self, model: Model, data: Data, size: int) -> None:
        self.model, self.split, self.size = model, data.split("selection"), size
        self.metric, self.declared = data.metric, data.declared
        self.reference = self._answers(model)
        self.before = self._score(self.reference)

    def drop(self, quantized: Model) -> float:
        """The mean score of the float model less that of `quantized`."""
        return self.before - self._score(self._answers(quantized))

    def _answers(self, model: Model) -> Any:
        parts = [model.outputs(*inputs) for inputs, _ in self.split.batches(self.size)]
        return as_outputs([np.concatenate(each) for each in zip(*parts, strict=True)], model.output_names)

    def _score(self, answers: Any) -> float:
        known = {"reference": self.reference, "metric": self.metric, "declared": self.declared}
        return float(score(answers, self.split.labels, **known)[1].mean())


@dataclass
class Control:
    """Float is given back until the drop fits."""

    model: Model
    step: StaticQuantization
    target: str
    batches: Sequence[tuple[Array, ...]]
    accuracy: Accuracy
    max_drop: float

    def __post_init__(self) -> None:
        self._ranges: Ranges = {}
        self._grams: dict[str, Gram] = {}

    def run(self) -> tuple[list[str], float, float]:
        """Layers that get float back, those that cost most first; the drop before and after.

        Raises
        ------
        SlimlineError : the drop does not fit with a single layer in integers.
        """
        whole = self.quantized(())
        before = self.accuracy.drop(whole)
        if before <= self.max_drop:
            return [], before, before
        assert whole.quantization is not None
        ranked = self.ranked(whole.quantization.layers)
        low, high = 0, len(ranked) - 1  # 0 does not fit, and all of them in float would be no quantization
        after = self.accuracy.drop(self.quantized(ranked[:high]))
        if after > self.max_drop:
            raise SlimlineError(
                f"With a single layer in integers the selection samples still show {after:.4g} lost, more than "
                f"max_drop={self.max_drop:.4g}: allow more, or leave quantization out."
            )
        while high - low > 1:
            middle = (low + high) // 2
            drop = self.accuracy.drop(self.quantized(ranked[:middle]))
            if drop <= self.max_drop:
                high, after = middle, drop
            else:
                low = middle
        _log.info("back to float: %s", ", ".join(ranked[:high]))
        return ranked[:high], before, after

    def ranked(self, layers: Sequence[str]) -> list[str]:
        """Layers by how near the outputs come to the float model's when one of them alone is in float again."""
        if len(layers) < 2:
            return list(layers)
        few = [tuple(x[:_JUDGED] for x in batch) for batch in self.batches[:1]]
        truth = [self.model.outputs(*batch) for batch in few]
        errors = {}
        for layer in layers:
            other = self.quantized((layer,))
            answers = [other.outputs(*batch) for batch in few]
            errors[layer] = sum(
                float(
                    np.square(np.asarray(a, np.float64) - b).sum() / max(np.square(b.astype(np.float64)).sum(), 1e-30)
                )
                for one, two in zip(answers, truth, strict=True)
                for a, b in zip(one, two, strict=True)
                if b.dtype.kind == "f"
            )
        return sorted(errors, key=lambda layer: errors[layer])

    def quantized(self, back: Sequence[str]) -> Model:
        exclude = dict.fromkeys(back, "")
        return calibrate(self.model, self.step, self.batches, self.target, exclude, self._ranges, grams=self._grams)
