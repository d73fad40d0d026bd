"""Static quantization: from calibration batches to a model on integer grids, in any framework."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from slimline.basics.errors import SlimlineError
from slimline.graph.edits import FoldNorms, Round
from slimline.graph.placement import Placement, place
from slimline.graph.quantization import Quantization
from slimline.methods.formats import IntegerGrid
from slimline.methods.ranges import Observer, affine_grid, observer, symmetric_grid
from slimline.model import Model
from slimline.recipe.layers import first_match, refuse_unmatched
from slimline.runtimes.base import runtime
from slimline.steps.quantization.step import StaticQuantization

_log = logging.getLogger(__name__)
Array = np.ndarray[Any, np.dtype[Any]]
Ranges = dict[frozenset[str], tuple[float, float]]
"""By the values that share a grid, their range."""
_BIAS_STEPS = 2**30  # of the product of both scales that a bias may take: half of what int32 holds


def calibrate(
    model: Model,
    step: StaticQuantization,
    batches: Iterable[tuple[Array, ...]],
    policy: str,
    exclude: Mapping[str, str] | None = None,
    known: Ranges | None = None,
    bits: int | None = None,
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

    Raises
    ------
    SlimlineError : for a model that is quantized already, no layer to quantize, no batches, or NaN.
    """
    exclude = dict(exclude or {})
    folded, placement = placed(model, step, policy, exclude)
    ranges = observe_ranges(folded, placement, step, batches, {} if known is None else known)
    rules = runtime(policy).policy
    signed = (step.activations or rules.activations) == "int8"
    if rules.symmetric and not signed:
        raise SlimlineError(f"{policy} takes int8 activations without a zero point: leave activations out.")
    activations = activation_grids(placement, ranges, signed, rules.symmetric)
    quantization = Quantization(
        activations=activations,
        weights=weight_grids(folded.parameters(), placement, activations, bits or runtime(policy).weight_bits),
        layers=placement.layers,
        float_layers={**placement.refused, **exclude},
    )
    _log.info("quantize %d layers, %d activations", len(placement.layers), len(activations))
    native = folded.edit(Round(quantization, rules.composed))
    record = {**step.model_dump(mode="json"), "target": policy, "float_layers": dict(quantization.float_layers)}
    return model.then(native, record, quantization)


def activation_grids(
    placement: Placement, ranges: Mapping[str, tuple[float, float]], signed: bool, symmetric: bool, bits: int = 8
) -> dict[str, IntegerGrid]:
    """Of the activations, by the ranges of their groups."""
    return {
        name: _grid(placement.ranges.get(name, ranges[group]), signed, symmetric, bits)
        for name, group in placement.groups.items()
    }


def _grid(limits: tuple[float, float], signed: bool, symmetric: bool, bits: int) -> IntegerGrid:
    """Of an activation with these limits."""
    if not symmetric:
        return affine_grid(*limits, bits, signed)
    return replace(symmetric_grid(np.asarray(limits, np.float64), None, bits), narrow=False)


def placed(
    model: Model,
    step: StaticQuantization,
    policy: str,
    exclude: Mapping[str, str] | None = None,
    fold: bool = True,
) -> tuple[Model, Placement]:
    """`model` with its norms folded, unless `fold` is False, and where the grids go in it; the other parameters are
    those of `calibrate`.

    Raises
    ------
    SlimlineError : a model that is quantized already, no layer to quantize, or a pattern of overrides that fits none.
    """
    exclude = exclude or {}
    if model.quantization is not None:
        raise SlimlineError("This model is quantized already: apply StaticQuantization to the float model instead.")
    rounded = model.adapter.format_mismatches(model.native, Quantization())
    if rounded:
        raise SlimlineError(f"The network rounds {rounded[0]} by itself: load it as it was before it was quantized.")
    folded = Model(model.adapter, model.edit(FoldNorms()) if fold else model.native, model.example)
    named = dict.fromkeys(node.layer for node in folded.graph.nodes if node.layer)
    refuse_unmatched("layer for overrides", step.overrides, named, folded.graph.types)
    own = {name: first_match((name,), step.overrides, folded.graph.types) for name in named}
    floating = [name for name, pattern in own.items() if pattern and step.overrides[pattern].weights == "float32"]
    keep = (*step.keep, *map(_literal, (*floating, *exclude)))
    placement = place(folded.graph, runtime(policy).policy, step.layers, keep)
    if not placement.layers:
        if exclude:
            raise SlimlineError(f"No layer is left to quantize: all were put back to float ({_reasons(exclude)}).")
        raise SlimlineError(
            f"StaticQuantization finds no layer to quantize: layers={list(step.layers)} and keep={list(step.keep)} "
            "leave no convolution or linear layer with a stored weight."
        )
    return folded, replace(placement, weights=_scaled_axes(folded, placement, step, policy))


def _scaled_axes(model: Model, placement: Placement, step: StaticQuantization, policy: str) -> Mapping[str, int | None]:
    """By weight, the dimension that has one scale per position, by the step's overrides; None for one scale in all."""
    axes = dict(placement.weights)
    readers = model.graph.consumers()
    for name, axis in placement.weights.items():
        layers = [node.layer for node in readers[name]]
        pattern = first_match(layers, step.overrides, model.graph.types)
        granularity = None if pattern is None else step.overrides[pattern].granularity
        if granularity == "channel" and axis is None:
            raise SlimlineError(
                f"{policy} takes one scale for the weights of layer {layers[0]}: leave granularity out of the override "
                f"of {pattern!r}."
            )
        if granularity == "tensor":
            axes[name] = None
    return axes


def observe_ranges(
    model: Model,
    placement: Placement,
    step: StaticQuantization,
    batches: Iterable[tuple[Array, ...]],
    known: Ranges,
    bits: int = 8,
) -> dict[str, tuple[float, float]]:
    """The calibrated range of every group of values that share a grid of `bits`, in one pass over `batches`.

    Groups whose range is `known` are not observed; the others' are added to it.
    """
    members: dict[str, set[str]] = {}
    for name, group in placement.groups.items():
        members.setdefault(group, set()).add(name)
    keys = {group: frozenset(names) for group, names in members.items()}

    def observer_of(group: str) -> Observer:
        makers = [layer for name in placement.groups if name in members[group] for layer in placement.makers[name]]
        pattern = first_match(makers, step.overrides, model.graph.types)
        return observer(*step.observation(pattern), f"value {group!r} of layer {placement.owners[group]!r}", bits)

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
        model.adapter.observe(model.native, counted(), watched, see)
        if seen == 0:
            raise SlimlineError("There is no calibration batch: give calibration samples to StaticQuantization.")
    known.update({keys[group]: estimator.range() for group, estimator in observers.items()})
    return {group: known[key] for group, key in keys.items()}


def weight_grids(
    parameters: Mapping[str, Array], placement: Placement, activations: Mapping[str, IntegerGrid], bits: int = 8
) -> dict[str, IntegerGrid]:
    """Symmetric grids of the weights, wide enough that every bias fits int32 steps of input times weight scale.

    `bits` are those of `Runtime.weight_bits`. Folded batch norm can leave a channel with next to no weight and an
    ordinary bias; on the grid of that weight alone the bias would overflow.
    """
    grids = {name: symmetric_grid(parameters[name], axis, bits) for name, axis in placement.weights.items()}
    return with_room_for_biases(grids, parameters, placement, activations)


def with_room_for_biases(
    grids: Mapping[str, IntegerGrid],
    parameters: Mapping[str, Array],
    placement: Placement,
    activations: Mapping[str, IntegerGrid],
) -> dict[str, IntegerGrid]:
    """The grids of the weights, wider where a bias would not fit int32 steps of input times weight scale."""
    wide = dict(grids)
    for name, (read, bias) in placement.biases.items():
        grid = grids[name]
        size = np.abs(np.asarray(parameters[bias], np.float64)).ravel()
        step = float(activations[read].scale) * _BIAS_STEPS
        own = size if not grid.per_tensor and size.size == grid.scale.size else size.max(keepdims=True)
        scale = np.maximum(grid.scale.ravel(), own / step).astype(np.float32)
        wide[name] = replace(grid, scale=scale.reshape(grid.scale.shape))
    return wide


def _literal(name: str) -> str:
    """A glob that matches `name` alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _reasons(exclude: Mapping[str, str]) -> str:
    return "; ".join(f"{layer}: {reason}" for layer, reason in list(exclude.items())[:3])
