"""Static quantization: from calibration batches to a model on grids of few codes, in any framework."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from slimline.basics.errors import SlimlineError
from slimline.graph.edits import FoldNorms, PutTensors, Round
from slimline.graph.placement import Placement, Policy, place
from slimline.graph.quantization import Quantization
from slimline.methods.formats import IntegerGrid, Scaled
from slimline.methods.gram import Gram
from slimline.methods.ranges import (
    GridMaker,
    MovingAverage,
    Observer,
    affine_grid,
    centred_grid,
    float_format,
    observer,
)
from slimline.model import Model
from slimline.model.lowering import road
from slimline.model.portions import portion, portions
from slimline.recipe.layers import first_match
from slimline.runtimes.base import names, runtime
from slimline.steps.quantization.choices import Choices
from slimline.steps.quantization.preparation import equalized
from slimline.steps.quantization.step import StaticQuantization
from slimline.steps.quantization.weights import (
    QuantizedWeights,
    in_order,
    layer_grams,
    layer_means,
    short_weights,
    table_grids,
)

_log = logging.getLogger(__name__)
Array = np.ndarray[Any, np.dtype[Any]]
Ranges = dict[frozenset[str], tuple[float, float]]
"""By the values that share a grid, their range."""


def calibrate(
    model: Model,
    step: StaticQuantization,
    batches: Iterable[tuple[Array, ...]],
    policy: str,
    exclude: Mapping[str, str] | None = None,
    known: Ranges | None = None,
    bits: int | None = None,
    grams: dict[str, Gram] | None = None,
) -> Model:
    """A model that simulates the integer artifact of the runtime `policy`; `model` stays as it is.

    Parameters
    ----------
    batches : inputs of the model, each ``(batch, …)``; run through once.
    policy : the runtime whose integer operators decide what is rounded, see `slimline.graph.placement`.
    exclude : layers that must stay in float, with the reason that the report gives.
    known : ranges of the same model, step and batches from earlier calls, which are not observed again; new ones
        are added.
    bits : of the int8 weights; None takes what the runtime's kernels bear on this processor (`Runtime.weight_bits`).
    grams : by operator, Gram matrices of inputs from earlier calls, as with `known`; where rounding asks for them,
        `batches` are run through a second time.

    Raises
    ------
    SlimlineError : for a model that is quantized already, no layer to quantize, no batches, or NaN.
    """
    exclude = dict(exclude or {})
    batches = batches if isinstance(batches, Sequence) else list(batches)
    folded, placement = placed(model, step, policy, exclude)
    rules = rules_of(step, policy, model)
    makers = grid_makers(step, policy)
    observed = makers[0] if step.other_activations else affine_grid
    ranges = observe_ranges(folded, placement, step, batches, {} if known is None else known, observed)
    activations = activation_grids(placement, ranges, *makers)
    held = layer_grams(folded, placement, step, batches, {} if grams is None else grams)
    means = layer_means(model, folded, placement, step, held)
    own_bits = bits or runtime(policy).weight_bits
    weights = QuantizedWeights(folded, placement, step, activations, own_bits, model.masks)
    if in_order(step):
        weights.round_in_order(folded, batches, means)
    else:
        weights.round_all(held, means)
    quantization = Quantization(
        activations=activations,
        weights={**weights.grids, **table_grids(folded, placement)},
        layers=placement.layers,
        float_layers={**placement.refused, **exclude},
    )
    _log.info("quantize %d layers, %d activations", len(placement.layers), len(activations))
    if weights.tensors:
        folded = replace(folded, native=folded.edit(PutTensors(weights.tensors)))
    native = folded.edit(Round(quantization, rules.composed))
    record = {**step.model_dump(mode="json"), "target": policy, "float_layers": dict(quantization.float_layers)}
    return model.then(native, record, quantization)


def rules_of(step: StaticQuantization, policy: str, model: Model) -> Policy:
    """What the target `policy` runs of a model with activations of the type of `step`.

    Raises
    ------
    SlimlineError : it has no such activations, or cannot be told of them by the model's framework.
    """
    served, kind = runtime(policy), step.other_activations
    if kind is None:
        return served.policy
    if kind not in served.policies:
        others = " or ".join(name for name in names() if kind in runtime(name).policies)
        raise SlimlineError(
            f"{policy} computes with no {kind} activations: leave that type out, or choose the target {others}."
        )
    rules = served.policies[kind]
    if rules.form is not None and rules.form not in road(model.forms, served):
        raise SlimlineError(
            f"{policy} takes {kind} activations of models that go there as ONNX: export the float model for "
            "onnxruntime and quantize that file."
        )
    return rules


def grid_makers(step: StaticQuantization, policy: str) -> tuple[GridMaker, GridMaker]:
    """What makes the formats of activations, and of those whose range the target prescribes.

    Raises
    ------
    SlimlineError : the target takes no zero points, and activations have some.
    """
    if step.other_activations == "fp8_e4m3":
        return float_format, float_format
    if step.other_activations == "int16":
        wide, _ = integer_grids(16, signed=True, symmetric=True)
        return wide, wide
    rules = runtime(policy).policy
    signed = (step.activations or rules.activations) == "int8"
    if rules.symmetric and not signed:
        raise SlimlineError(f"{policy} takes int8 activations without a zero point: leave activations out.")
    return integer_grids(8, signed, rules.symmetric or step.symmetric)


def integer_grids(bits: int, signed: bool, symmetric: bool) -> tuple[GridMaker, GridMaker]:
    """As `grid_makers`, of integers; `symmetric` ones have their zero in the middle."""
    affine = partial(affine_grid, bits=bits, signed=signed)
    return (partial(centred_grid, bits=bits, signed=signed) if symmetric else affine), affine


def activation_grids(
    placement: Placement, ranges: Mapping[str, tuple[float, float]], grid: GridMaker, prescribed: GridMaker
) -> dict[str, Scaled]:
    """Of the activations, by the ranges of their groups or those that the target prescribes."""

    def of(name: str, group: str) -> Scaled:
        if name in placement.ranges:
            return prescribed(*placement.ranges[name])
        each = grid(*ranges[group])
        if name in placement.centred and isinstance(each, IntegerGrid):
            return centred_grid(*ranges[group], each.bits, each.signed)
        return each

    return {name: of(name, group) for name, group in placement.groups.items()}


def placed(
    model: Model,
    step: StaticQuantization,
    policy: str,
    exclude: Mapping[str, str] | None = None,
    fold: bool = True,
) -> tuple[Model, Placement]:
    """`model` with its norms folded, unless `fold` is False, and its channels equalised, and where the grids go in it;
    the other parameters are those of `calibrate`.

    Raises
    ------
    SlimlineError : a model that is quantized already, no layer to quantize, or a pattern of overrides that fits none.
    """
    exclude = exclude or {}
    rules = rules_of(step, policy, model)
    if model.quantization is not None:
        raise SlimlineError("This model is quantized already: apply StaticQuantization to the float model instead.")
    rounded = model.adapter.format_mismatches(model.native, Quantization())
    if rounded:
        raise SlimlineError(f"The network rounds {rounded[0]} by itself: load it as it was before it was quantized.")
    folded = Model(model.adapter, model.edit(FoldNorms()) if fold else model.native, model.example)
    if step.equalize:
        folded, _ = equalized(folded)
    choices = Choices.of(step, folded.graph)
    floating = [name for name in choices.layers if choices.of_layers((name,)).type == "float32"]
    keep = (*step.keep, *map(literal, (*floating, *exclude)))
    placement = place(folded.graph, rules, step.layers, keep)
    if not placement.layers:
        if exclude:
            raise SlimlineError(f"No layer is left to quantize: all were put back to float ({_reasons(exclude)}).")
        raise SlimlineError(
            f"StaticQuantization finds no layer to quantize: layers={list(step.layers)} and keep={list(step.keep)} "
            "leave no convolution or linear layer with a stored weight."
        )
    placement = replace(placement, weights=_scaled_axes(folded, placement, choices, policy))
    for layer in short_weights(folded.graph, placement, choices):
        check_short(policy, layer)
    return folded, placement


def _scaled_axes(model: Model, placement: Placement, choices: Choices, policy: str) -> Mapping[str, int | None]:
    """By weight, the dimension that has one scale per position; None for one scale in all."""
    axes = dict(placement.weights)
    readers = model.graph.consumers()
    for name, axis in placement.weights.items():
        layers = [node.layer for node in readers[name]]
        choice = choices.of_layers(layers)
        if choice.granularity == "channel" and axis is None:
            where = "" if choice.pattern is None else f" of the override of {choice.pattern!r}"
            raise SlimlineError(
                f"{policy} takes one scale for the weights of layer {layers[0]}: leave granularity out{where}."
            )
        if choice.granularity == "tensor":
            axes[name] = None
    return axes


def check_short(policy: str, layer: str) -> None:
    """Refuse a target whose integer layers take no weights of fewer than 8 bits."""
    if not runtime(policy).short_weights:
        others = " or ".join(name for name in names() if runtime(name).short_weights)
        raise SlimlineError(
            f"{policy} computes with no int4 weights beside integer activations (layer {layer}): choose weights: int8, "
            f"or the target {others}."
        )


def observe_ranges(
    model: Model,
    placement: Placement,
    step: StaticQuantization,
    batches: Iterable[tuple[Array, ...]],
    known: Ranges,
    grid: GridMaker,
) -> dict[str, tuple[float, float]]:
    """The calibrated range of every group of values that share what `grid` makes, in one pass over `batches`.

    Groups whose range is `known` are not observed; the others' are added to it.
    """
    members: dict[str, set[str]] = {}
    for name, group in placement.groups.items():
        members.setdefault(group, set()).add(name)
    keys = {group: frozenset(names) for group, names in members.items()}

    def observer_of(group: str) -> Observer:
        makers = [layer for name in placement.groups if name in members[group] for layer in placement.makers[name]]
        pattern = first_match(makers, step.overrides, model.graph.types)
        value = f"value {group!r} of layer {placement.owners[group]!r}"
        return observer(*step.observation(pattern), value, grid, step.symmetric or step.other_activations is not None)

    observers = {group: observer_of(group) for group, key in keys.items() if key not in known}
    seen = 0

    def counted() -> Iterator[tuple[Array, ...]]:
        nonlocal seen
        for batch in batches:
            seen += 1
            yield batch

    def see(name: str, array: Array) -> None:
        observers[placement.groups[name]].see(array)

    if observers:
        watched = [name for name in placement.activations if placement.groups[name] in observers]
        # A moving average is of batches as they are; other observers answer the same of any portions.
        whole = any(isinstance(each, MovingAverage) for each in observers.values())
        rows = None if whole else portion(model, watched)
        model.adapter.observe(model.native, portions(counted(), rows), watched, see)
        if seen == 0:
            raise SlimlineError("There is no calibration batch: give calibration samples to StaticQuantization.")
    known.update({keys[group]: estimator.range() for group, estimator in observers.items()})
    return {group: known[key] for group, key in keys.items()}


def literal(name: str) -> str:
    """A glob that matches `name` alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _reasons(exclude: Mapping[str, str]) -> str:
    return "; ".join(f"{layer}: {reason}" for layer, reason in list(exclude.items())[:3])
