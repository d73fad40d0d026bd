"""What layers lose by themselves: a `ChannelPruning` along ``inputs`` or ``kernel``, to a plan of cuts.

Input channels go where the unit cannot: their maker keeps them for other readers, or for the model's inputs. The
positions of a kernel that stay are those of a smaller kernel, dilated where that costs less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from slimline.basics.errors import SlimlineError
from slimline.graph import cost
from slimline.graph.cuts import Cut, Reader, readers
from slimline.graph.matrix import matrices
from slimline.graph.units import Units
from slimline.methods import kernels
from slimline.methods.gram import Gram
from slimline.methods.kernels import Window
from slimline.methods.removal import DAMPING, Consumer, removal_order
from slimline.methods.structured import Scores, select_global, select_local
from slimline.plans import CutPlan
from slimline.recipe.layers import selected
from slimline.steps.channels.criteria import Evidence
from slimline.steps.channels.selection import bisect, check_layers, out_of_reach

if TYPE_CHECKING:
    from slimline.data import Data
    from slimline.model import Model
    from slimline.steps.channels.step import ChannelPruning

Array = np.ndarray

TRIED = 4
"""Of all kernels of a size, those of which ``obs`` solves the least squares: the best by single inputs."""


def plan_cuts(model: Model, step: ChannelPruning, data: Data | None = None, seed: int = 0) -> CutPlan:
    """What `step` takes from single layers of `model`, without taking it.

    Raises
    ------
    SlimlineError : a glob that matches no layer, nothing to cut, a target out of reach, or missing data.
    """
    units = Units(model.graph)
    check_layers(model.graph, step)
    named = [r for r in readers(model.graph) if selected((r.layer.layer,), step.layers, step.keep, model.graph.types)]
    evidence = Evidence(units, model, step, data)
    if step.cut == "kernel":
        return _kernels(model, [r for r in named if len(r.windows) > 1], evidence, seed)
    return _inputs(model, [r for r in named if r.channel is not None and r.channels > 1], evidence, seed)


def _values(evidence: Evidence, among: Sequence[Reader], seed: int) -> list[Array]:
    """Per layer what each of its weights counts by itself: ``(groups, outputs, channels, positions of the kernel)``."""
    step, rng = evidence.step, np.random.default_rng(seed)
    gradients = evidence.gradients(64, step.samples) if step.criterion == "taylor" else {}
    values = []
    for reader in among:
        layer = reader.layer
        weight = layer.matrix(evidence.arrays[layer.weight]).astype(np.float64)
        groups, outputs, _ = weight.shape
        shape = (groups, outputs, reader.channels, -1)
        if step.criterion == "taylor":
            value = np.abs(weight * layer.matrix(gradients[layer.weight]))
        elif step.criterion == "random":  # whole channels and positions, by chance
            sides = (1, 1, reader.channels, 1) if step.cut == "inputs" else (1, 1, 1, math.prod(layer.kernel))
            value = np.broadcast_to(rng.random(sides), weight.reshape(shape).shape)
        else:
            value = np.abs(weight) if step.criterion == "l1" else np.square(weight)
        values.append(value.reshape(shape))
    return values


# -- input channels --------------------------------------------------------------------


def _inputs(model: Model, named: Sequence[Reader], evidence: Evidence, seed: int) -> CutPlan:
    units, step = evidence.units, evidence.step
    makers = {r.layer.node: _maker(units, r) for r in named}
    chosen = [r for r in named if not makers[r.layer.node]]
    notes = [
        f"{r.layer.layer} keeps its input channels: only it reads those of {unit}, so prune the unit {unit} itself"
        for r in named
        if (unit := makers[r.layer.node])
    ]
    if not chosen:
        why = f"{notes[0]}." if notes else "no convolution or linear layer that was named has inputs to select."
        raise SlimlineError(f"There are no inputs to prune: {why}")
    if step.criterion == "obs":
        grams = evidence.grams([r.layer for r in chosen])
        scores = [_removal(evidence, r, grams[r.layer.node]) for r in chosen]
    else:
        scores = [np.asarray(v.sum(axis=(0, 1, 3))) for v in _values(evidence, chosen, seed)]
    multiple = step.round_to
    assert multiple != "auto"

    def select(ratio: float) -> CutPlan:
        fixed = [0] * len(chosen)
        if step.scope == "local":
            gone = select_local(scores, fixed, ratio, multiple)
        else:
            gone = select_global(scores, fixed, ratio, multiple, relative=step.criterion != "obs")
        cuts = [
            Cut(reader, channels=tuple(np.setdiff1d(np.arange(reader.channels), lost).tolist()))
            for reader, lost in zip(chosen, gone, strict=True)
            if lost
        ]
        return CutPlan(model.graph, cuts, notes)

    return select(step.ratio) if step.ratio is not None else bisect(select, model.graph, step)


def _maker(units: Units, reader: Reader) -> str:
    """The unit that is all of a layer's input channels and that no other layer reads: it serves better than a cut."""
    (letter,) = (name for name, _ in reader.layer.inputs if not name.startswith("."))
    labels = units.solver.letters[reader.layer.node][letter].labels
    if labels is None:
        return ""
    atoms = np.unique(units.solver.atoms.resolve(labels))
    unit = next((u for u in units.units if np.isin(atoms[atoms > 0], u.atoms).all()), None)
    if unit is None or len(atoms) < reader.channels:
        return ""
    every = matrices(units.graph)
    read = [m.weight for m in every if units.carries(m.node, (name for name, _ in m.inputs), unit.atoms)]
    return unit.name if read == [reader.layer.weight] else ""


def _removal(evidence: Evidence, reader: Reader, gram: Gram) -> Scores:
    """What each channel adds to the layer's error when it goes in the best order; by what it saves, to be ranked with
    those of other layers."""
    layer = reader.layer
    columns = np.arange(layer.shape[2]).reshape(reader.channels, -1)
    weight = layer.matrix(evidence.arrays[layer.weight])
    order, errors = removal_order([Consumer(weight, evidence.spread(layer, {layer.node: gram}), columns)])
    score = np.zeros(reader.channels)
    score[order] = np.maximum.accumulate(errors)
    step = evidence.step
    if step.scope == "local" or step.ratio is not None:
        return score
    return score * reader.channels / max(_weighs(evidence, reader), 1)


def _weighs(evidence: Evidence, reader: Reader) -> int:
    """What the step limits of a layer: its MACs for a batch, or its weights."""
    values = evidence.units.graph.values
    if evidence.step.target_macs is not None:
        return cost.node_macs(reader.node, lambda name: values[name].shape)
    return math.prod(values[reader.layer.weight].shape)


# -- positions of kernels --------------------------------------------------------------


@dataclass(frozen=True)
class _Options:
    """The kernels that a layer's kernel may become, itself among them: each with the part of the layer that is lost."""

    reader: Reader
    windows: list[Window]
    errors: Array

    @property
    def counts(self) -> Array:
        """Positions that stay."""
        return np.array([kernels.count(w) for w in self.windows])

    def cut(self, index: int) -> Cut:
        return Cut(self.reader, window=self.windows[index], error=float(self.errors[index]))


def _kernels(model: Model, chosen: Sequence[Reader], evidence: Evidence, seed: int) -> CutPlan:
    step = evidence.step
    if not chosen:
        raise SlimlineError(
            "There is no kernel to prune: no layer that was named is a convolution, not transposed and with weights of "
            "its own, whose kernel has more than one position."
        )
    values = _values(evidence, chosen, seed) if step.criterion != "obs" else [np.array(()) for _ in chosen]
    grams = evidence.grams([r.layer for r in chosen]) if step.criterion == "obs" else {}
    options = [
        _solved(evidence, r, grams[r.layer.node]) if grams else _added(r, v)
        for r, v in zip(chosen, values, strict=True)
    ]

    def plan(picked: Sequence[int]) -> CutPlan:
        cuts = [o.cut(i) for o, i in zip(options, picked, strict=True) if o.counts[i] < o.counts.max()]
        return CutPlan(model.graph, cuts)

    if step.scope == "global":
        return plan(_together(evidence, options))

    def select(ratio: float) -> CutPlan:
        return plan([_alone(o, ratio) for o in options])

    return select(step.ratio) if step.ratio is not None else bisect(select, model.graph, step)


def _added(reader: Reader, value: Array) -> _Options:
    """Errors as the part of the values that goes."""
    each = value.sum(axis=(0, 1, 2))
    each = each / max(float(each.sum()), 1e-300)
    stay = np.array([kernels.mask(w, reader.layer.kernel) for w in reader.windows])
    return _Options(reader, reader.windows, np.maximum(1 - stay @ each, 0.0))


def _solved(evidence: Evidence, reader: Reader, gram: Gram) -> _Options:
    """Errors after least squares, of the kernels of each size that single inputs show to be best."""
    layer = reader.layer
    weight = layer.matrix(evidence.arrays[layer.weight]).astype(np.float64)
    second = evidence.spread(layer, {layer.node: gram})
    shape = (*weight.shape[:2], reader.channels, -1)
    alone = (np.square(weight) * np.diagonal(second, axis1=1, axis2=2)[:, None]).reshape(shape)
    first = _added(reader, alone)
    tried = [
        i
        for n in np.unique(first.counts)
        for i in sorted(np.flatnonzero(first.counts == n), key=lambda i: (first.errors[i], i))[:TRIED]
    ]
    windows = [first.windows[i] for i in tried]
    errors = [
        kernels.lost(weight, second, np.tile(kernels.mask(w, layer.kernel), reader.channels), DAMPING)
        if kernels.count(w) < math.prod(layer.kernel)
        else 0.0
        for w in windows
    ]
    return _Options(reader, windows, np.array(errors))


def _alone(options: _Options, ratio: float) -> int:
    """The best kernel that leaves out at least the part `ratio`, or the best single position."""
    total = int(options.counts.max())
    small = options.counts <= max(total - int(ratio * total + 1e-9), 1)
    return int(np.argmin(np.where(small, options.errors, np.inf)))


def _together(evidence: Evidence, options: Sequence[_Options]) -> list[int]:
    """The kernels of all layers that meet the step's goal and keep most: of each layer the part ``1 - error``, of all
    the product, as one reads what the other gives."""
    step, graph = evidence.step, evidence.units.graph
    weight = [_weighs(evidence, o.reader) for o in options]
    costs = [w * o.counts / o.counts.max() for w, o in zip(weight, options, strict=True)]
    what, target, whole, fixed = "kernels' weights", 1 - (step.ratio or 0.0), sum(weight), 0
    if step.target_macs is not None:
        what, target, whole = "MACs", step.target_macs, cost.macs(graph) * graph.batch
        fixed = whole - sum(weight)
    elif step.target_parameters is not None:
        what, target, whole = "parameters", step.target_parameters, graph.size
        fixed = whole - sum(weight)
    losses = [-np.log1p(-np.minimum(o.errors, 1 - 1e-9)) for o in options]
    picked = kernels.cheapest(losses, costs, target * whole - fixed + 1e-6)
    if picked is None:
        least = fixed + sum(float(c.min()) for c in costs)
        raise out_of_reach(target, what, least / whole)
    return picked
