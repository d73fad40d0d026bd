"""The formats that quantization-aware training starts from and ends with, and where in a network they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from slimline.basics.errors import SlimlineError
from slimline.graph.edits import FoldNorms, PutTensors, Round
from slimline.graph.placement import Placement
from slimline.graph.quantization import Quantization
from slimline.methods.formats import Blocks, Format, IntegerGrid, Levels, Scaled, along
from slimline.methods.levels import TTQ, fitted, levels, skewed
from slimline.methods.ranges import symmetric_grid
from slimline.methods.scales import least_squares, per_block
from slimline.model import Model
from slimline.model.lowering import check_marks, check_stored, check_written
from slimline.recipe.layers import first_match, refuse_unmatched
from slimline.runtimes.base import runtime
from slimline.steps.quantization.calibration import placed
from slimline.steps.quantization.weights import with_room
from slimline.steps.quantization_aware.signs import signed
from slimline.steps.quantization_aware.step import QuantizationAwareTraining, WeightType
from slimline.steps.weight_quantization.quantize import blocks_of, chosen, refuse_revival
from slimline.steps.weight_quantization.step import WeightQuantization

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Site:
    """A network without rounding, and where it is to be rounded.

    Attributes
    ----------
    placement : of activations and weights; None where activations stay in float.
    blocks : by weight, how scales lie over it.
    layers : by weight, the user's name of the layer that reads it.
    signs : activations of which the layers that read them see no more than the sign.
    """

    model: Model
    placement: Placement | None
    blocks: Mapping[str, Blocks]
    layers: Mapping[str, str]
    signs: frozenset[str] = frozenset()

    @property
    def activations(self) -> tuple[str, ...]:
        """Names of those that are rounded."""
        return () if self.placement is None else self.placement.activations


def site(step: QuantizationAwareTraining, model: Model, target: str, exclude: Mapping[str, str], fold: bool) -> Site:
    """Where a model that rounds nothing is to be rounded.

    Parameters
    ----------
    exclude : layers that stay in float, with the reason.
    fold : whether batch norms are folded first.

    Raises
    ------
    SlimlineError : a pattern that fits no layer, or nothing to round.
    """
    if step.activations == "float32":
        prepared = replace(model, native=model.edit(FoldNorms()) if fold else model.native)
        floating = tuple(name for name, own in step.overrides.items() if own.weights == "float32")
        weights, _ = chosen(prepared, WeightQuantization(layers=step.layers, keep=(*step.keep, *floating)))
        shapes = {name: prepared.graph.values[name].shape for name in weights}
        blocks = {name: blocks_of(shapes[name], each.node, None) for name, each in weights.items()}
        return Site(prepared, None, blocks, {name: each.layer for name, each in weights.items()})
    prepared, placement = placed(model, step.static, target, exclude, fold)
    prepared = replace(model, native=prepared.native)
    readers, values = prepared.graph.consumers(), prepared.graph.values
    blocks = {
        name: () if axis is None else along(axis, len(values[name].shape)) for name, axis in placement.weights.items()
    }
    layers = {name: readers[name][0].layer for name in placement.weights}
    signs = frozenset(each.input for each in signed(step, prepared, placement.weights))
    return Site(prepared, placement, blocks, layers, signs)


def absorbs(before: Site, after: Site, formats: Callable[[str], Scaled]) -> bool:
    """Whether scales can take in what folding the norms of one site, which gives the other, does to the weights.

    They can where each output has its own, and codes may change their sign.
    """
    if len(before.activations) != len(after.activations) or before.blocks != after.blocks:
        return False
    old, new = before.model.parameters(), after.model.parameters()
    changed = [name for name in before.blocks if not np.array_equal(old[name], new[name])]
    return all(before.blocks[name] and _symmetric(formats(name)) for name in changed)


def _symmetric(each: Format) -> bool:
    if isinstance(each, Levels):
        return np.array_equal(each.codebook, -each.codebook[::-1])
    return isinstance(each, IntegerGrid) and each.low == -each.high and not np.any(each.zero)


def carried(formats: Quantization, before: Site, after: Site) -> Quantization:
    """The formats once the norms of `before` are folded, which gives `after`: scales take the factors in."""
    old, new = before.model.parameters(), after.model.parameters()
    weights: dict[str, Format] = {}
    for name, each in formats.weights.items():
        assert isinstance(each, Scaled)
        sizes = [per_block(np.add, np.abs(x[name]).astype(np.float64), each.blocks) for x in (old, new)]
        usable = (sizes[0] > 0) & (sizes[1] > 0)
        factor = np.where(usable, sizes[1] / np.where(usable, sizes[0], 1), 1)
        weights[name] = replace(each, scale=(each.scale * factor).astype(np.float32))
    names = dict(zip(before.activations, after.activations, strict=True))
    moved = {names[name]: each for name, each in formats.activations.items()}
    return replace(formats, activations=moved, weights=weights)


def weight_format(weight: Array, dtype: WeightType, blocks: Blocks, bits: int = 8) -> Scaled:
    """That which a weight starts training with: of least squared error, of 7 and 8 bits the widest.

    Parameters
    ----------
    bits : of integers at most.
    """
    if (unit := levels(dtype)) is not None:
        return fitted(weight, unit, blocks)
    bits = min(int(str(dtype).removeprefix("int")), bits)
    axis = next((d for d, block in enumerate(blocks) if block == 1), None)
    grid = symmetric_grid(weight, axis, bits)
    if bits == 2:
        grid = replace(grid, narrow=False)
    return grid if bits > 6 else least_squares(weight, grid)


def dtype_of(step: QuantizationAwareTraining, site: Site, weight: str) -> WeightType:
    """The type of a weight."""
    return step.weights_of(first_match((site.layers[weight],), step.overrides, site.model.graph.types))


def skews(step: QuantizationAwareTraining, site: Site) -> frozenset[str]:
    """The weights whose levels below zero learn apart."""
    if step.scales == "calibrated":
        return frozenset()
    return frozenset(name for name in site.blocks if dtype_of(step, site, name) == TTQ)


def check(step: QuantizationAwareTraining, model: Model, masked: bool = False) -> None:
    """Refuse a model whose framework cannot train formats, and levels that cannot hold its zeros.

    Parameters
    ----------
    masked : whether there will be zeros that have to stay, beside those of the model's masks.
    """
    if not model.adapter.learns_formats:
        raise SlimlineError(
            "Models of this framework cannot be trained while they are rounded: use StaticQuantization or "
            "WeightQuantization, or train the model that this one was exported from."
        )
    layers = dict.fromkeys(node.layer for node in model.graph.nodes if node.layer)
    refuse_unmatched("layer for overrides", step.overrides, layers, model.graph.types)
    refuse_revival([step.weights, *(own.weights for own in step.overrides.values())], masked or bool(model.masks))


def check_target(step: QuantizationAwareTraining, target: str, model: Model) -> None:
    """Refuse a target that could not hold a model like `model` once it is trained."""
    served = runtime(target)
    rules = served.policy
    own = [own.weights for own in step.overrides.values() if own.weights not in (None, "float32")]
    for dtype in (step.weights, *own):
        unit = weight_format(np.eye(4, dtype=np.float32), dtype, along(0, 2))  # type: ignore[arg-type]
        if dtype == TTQ and isinstance(unit, Levels):
            unit = skewed(unit, 0.7)  # as any that is learned, no whole multiples of one number
        if step.activations == "float32":
            check_stored(served, unit)
        else:
            check_written(served, in_integers(unit), stored=True)
    if step.activations == "float32":
        check_marks(served, model)
        return
    if step.has_signs:
        check_written(served, Levels.binary(np.ones((), np.float32)), stored=False)
    bits, signed_codes = activation_type(step, target)
    grid = IntegerGrid(np.ones((), np.float32), (), bits, signed_codes, zero_point=np.zeros((), np.int32))
    check_written(served, replace(grid, zero_point=None) if rules.symmetric else grid, stored=False)


def activation_type(step: QuantizationAwareTraining, target: str) -> tuple[int, bool]:
    """Bits of activations, and whether they are signed.

    Raises
    ------
    SlimlineError : the target needs signed ones.
    """
    rules = runtime(target).policy
    name = step.grid_type or rules.activations
    signed = name.startswith("int")
    if rules.symmetric and not signed:
        raise SlimlineError(f"{target} takes int8 activations without a zero point: leave activations out.")
    return int(name.removeprefix("u").removeprefix("int")), signed


def in_integers(each: Scaled) -> Scaled:
    """The integer grid that holds a format's numbers, for layers that multiply in integers; itself where none does."""
    return (each.grid or each) if isinstance(each, Levels) else each


def finished(site: Site, formats: Quantization, target: str) -> tuple[Any, Quantization]:
    """The native model that computes as the artifact will, and its formats, of a site whose norms are folded."""
    model, stored = site.model, site.model.parameters()
    rounded = {name: each.round(stored[name]) for name, each in formats.weights.items()}
    if site.placement is None:
        return model.edit(PutTensors(rounded)), replace(formats, stored=True)
    held: dict[str, IntegerGrid] = {}
    tensors: dict[str, Array] = {}
    for name, each in formats.weights.items():
        grid = in_integers(each)  # type: ignore[arg-type]
        if not isinstance(grid, IntegerGrid):
            raise SlimlineError(
                f"The levels of {site.layers[name]} are no whole multiples of one number, so nothing multiplies them "
                "in integers: leave activations in float32."
            )
        held[name] = grid
        if isinstance(each, Levels):
            tensors[name] = rounded[name]
    placement = site.placement
    activations = cast(
        "Mapping[str, IntegerGrid]",
        {name: in_integers(each) for name, each in formats.activations.items()},  # type: ignore[arg-type]
    )
    weights = {
        name: grid
        if name in tensors
        else with_room(grid, name, placement.weights[name], stored, placement, activations)
        for name, grid in held.items()
    }
    for name, (read, bias) in placement.biases.items():
        tensors[bias] = _whole(stored[bias], activations[read], weights[name])
    final = replace(formats, weights=weights)
    return model.edit(PutTensors(tensors), Round(final, runtime(target).policy.composed)), final


def _whole(bias: Array, read: Any, weight: IntegerGrid) -> Array:
    """The nearest bias that is whole steps of the products: in few bits these are wide, and a difference counts."""
    step = np.asarray(read.scale, np.float64) * weight.scale.astype(np.float64).ravel()
    if step.size not in (1, bias.size):
        return bias
    return (np.rint(bias.ravel() / step) * step).reshape(bias.shape).astype(bias.dtype)
