"""Structural steps: from a `ChannelPruning` to a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

from slimline.basics.errors import NothingToPrune, SlimlineError
from slimline.graph import cost
from slimline.graph.ir import Graph
from slimline.graph.kinds import kind
from slimline.graph.units import Unit, Units
from slimline.methods.structured import Scores, select_global, select_local
from slimline.plans import Plan, StructuralPlan
from slimline.recipe.layers import Choice, first_match, matches, refuse_unmatched, selected
from slimline.steps.channels.criteria import scores
from slimline.steps.channels.rounding import resolved

if TYPE_CHECKING:
    from slimline.data import Data
    from slimline.model import Model
    from slimline.steps.channels.step import ChannelPruning


class UnitChoice(Choice, Protocol):
    """What chooses units, by the layers that carry them and by their axes."""

    @property
    def axes(self) -> tuple[str, ...] | None:
        """Kinds of axes; None for all."""

    @property
    def factors(self) -> str:
        """``largest`` or ``all`` of several in one dimension."""


def plan(
    model: Model, step: ChannelPruning, data: Data | None = None, seed: int = 0, target: str | None = None
) -> Plan:
    """What `step` removes from `model`, without removing it.

    Parameters
    ----------
    data : needed by criteria that look at activations or gradients.
    target : the runtime that is timed for ``round_to: auto``; the framework's usual one by default.

    Raises
    ------
    SlimlineError
        If a glob matches no layer, the goal cannot be reached (the best that can is said), or data is missing.
    """
    units = Units(model.graph)
    chosen = eligible(units, step)
    if not chosen:
        reasons = "; ".join(f"{f.name}: {f.reason}" for f in units.frozen[:3]) or "no layer was left to prune"
        raise NothingToPrune(f"Nothing can be pruned: {reasons}.")
    step, rounding = resolved(step, model.graph, target or model.usual_target)
    chosen, unit_scores, notes = _scored(units, chosen, model, step, data, seed)
    if step.ratio is not None:
        selection = _select(units, chosen, unit_scores, step, step.ratio)
    else:
        selection = _search(units, chosen, unit_scores, step)
    return Plan(units, selection.removed, (*notes, *selection.notes), rounding)


def check_layers(graph: Graph, step: Choice) -> None:
    """Refuse a pattern of `layers` or `keep` that fits no layer."""
    named = dict.fromkeys(n.layer for n in graph.nodes if n.layer)
    for field, patterns in (("layers", step.layers), ("keep", step.keep)):
        refuse_unmatched(f"layer for {field}", patterns, named, graph.types)


def _parts(units: Units, chosen: Sequence[Unit], step: ChannelPruning, ratio: float) -> list[tuple[float, list[int]]]:
    """Of the units, by index, those that are chosen among each other, with what they lose: each override's, and the
    rest."""
    types = units.graph.types
    refuse_unmatched("layer for overrides", step.overrides, dict.fromkeys(n.layer for n in units.graph.nodes), types)
    members: dict[str | None, list[int]] = {}
    for index, unit in enumerate(chosen):
        members.setdefault(first_match(unit.layers or (unit.name,), step.overrides, types), []).append(index)
    return [(ratio if name is None else step.overrides[name].ratio, part) for name, part in members.items()]


def eligible(units: Units, step: UnitChoice) -> list[Unit]:
    """The units that the step's `layers`, `keep`, `axes` and `factors` choose.

    Raises
    ------
    SlimlineError : a glob that matches no layer, layers that are frozen, or axes that are not there.
    """
    types = units.graph.types
    check_layers(units.graph, step)
    requested = None if step.axes is None else {"filters" if a == "channels" else a for a in step.axes}
    kinds = {u.name: kind(units, u) for u in units.units} if requested is not None else {}
    sizes = {u.name: u.size + u.frozen for u in units.units if requested is None or kinds[u.name] in requested}
    rank = {u.name: i for i, u in enumerate(units.units)}
    chosen = []
    for unit in units.units:
        if unit.name not in sizes:
            continue
        names = unit.layers or (unit.name,)
        mine = (sizes[unit.name], -rank[unit.name])
        bigger = [s for s in unit.siblings if s in sizes and (sizes[s], -rank[s]) > mine]
        if step.factors == "largest" and bigger:
            continue
        if unit.size + unit.frozen > 1 and selected(names, step.layers, step.keep, types):
            chosen.append(unit)
    if not chosen and tuple(step.layers) != ("*",):
        stuck = [f for f in units.frozen if matches((f.name.rpartition(" (")[0],), step.layers, types)]
        if stuck:
            raise SlimlineError(f"{stuck[0].name} cannot be pruned: {stuck[0].reason}.")
    if not chosen and step.axes is not None:
        present = ", ".join(dict.fromkeys(kinds.values())) or "none"
        stuck = [f for f in units.frozen if f.reason != "the model's output"]
        why = f" ({stuck[0].name} is frozen: {stuck[0].reason})" if stuck else ""
        raise SlimlineError(
            f"There are no {' or '.join(step.axes)} to prune{why}: the axes of these layers are {present}; name one of "
            "them in axes."
        )
    return chosen


def _scored(
    units: Units, chosen: Sequence[Unit], model: Model, step: ChannelPruning, data: Data | None, seed: int
) -> tuple[list[Unit], list[Scores], tuple[str, ...]]:
    """The units of which the criterion says something, the scores of their positions, and what is to be noted."""
    unit_scores = scores(units, chosen, model, step, data, seed)
    scored = [(u, s) for u, s in zip(chosen, unit_scores, strict=True) if s is not None]
    notes = tuple(
        f"{u.name} was left alone: the {step.criterion} criterion says nothing of it"
        for u, s in zip(chosen, unit_scores, strict=True)
        if s is None
    )
    if step.criterion == "obs" and step.scope != "local":
        scored = [(u, s / _saved(units, u, step)) for u, s in scored]
    return [u for u, _ in scored], [s for _, s in scored], notes


def _saved(units: Units, unit: Unit, step: ChannelPruning) -> float:
    """What one position of a unit saves of that which the step limits, as long as all others are there."""
    if step.ratio is not None:
        return 1.0
    half = tuple(range(max(1, unit.size // 2)))
    trial = Plan(units, {unit.name: half})
    if step.target_macs is not None:
        return max(cost.macs(units.graph) - trial.macs, 1) / len(half)
    return max(units.graph.size - trial.parameters, 1) / len(half)


def _topology(units: Units, unit: Unit) -> tuple[tuple[str, int, int], ...]:
    """What a unit looks like to the graph: the operators that read its parameter slices, and through which slot."""
    readers = units.graph.consumers()
    signature = []
    for name, dim in unit.carriers:
        for node in readers[name]:
            signature.append((node.kind, node.inputs.index(name), dim))
    return tuple(sorted(signature))


def _select(units: Units, chosen: Sequence[Unit], scores: Sequence[Scores], step: ChannelPruning, ratio: float) -> Plan:
    fixed, multiple = [u.frozen for u in chosen], step.round_to
    assert multiple != "auto"  # it is resolved
    gone: list[tuple[int, ...]] = [()] * len(chosen)
    for share, part in _parts(units, chosen, step, ratio):
        worth, stuck = [scores[i] for i in part], [fixed[i] for i in part]
        if step.scope == "local":
            lost = select_local(worth, stuck, share, multiple)
        else:
            groups = [_topology(units, chosen[i]) for i in part] if step.scope == "isomorphic" else None
            lost = select_global(worth, stuck, share, multiple, groups, relative=step.criterion != "obs")
        for i, positions in zip(part, lost, strict=True):
            gone[i] = positions
    removed = {u.name: g for u, g in zip(chosen, gone, strict=True)}
    by_atom = {a: s for u, us in zip(chosen, scores, strict=True) for a, s in zip(u.atoms, us, strict=True)}
    notes = tuple(
        f"{u.name} keeps {u.size + u.frozen - len(g)} of {u.size + u.frozen}, the smallest legal width"
        for u, g in zip(chosen, gone, strict=True)
        if step.scope != "local" and g and u.size + u.frozen - len(g) <= multiple
    )
    return _legal(Plan(units, removed, notes), by_atom)


def _legal(plan: Plan, score: Mapping[int, float]) -> Plan:
    """Give back the most important position of every dimension that would be left empty."""
    notes = list(plan.notes)
    units = plan.units
    gone = units.removed([unit.atoms[p] for unit in units.units for p in plan.removed.get(unit.name, ())])
    back = False
    for name, rows in units.rows.items():
        for labels in rows:
            if labels is None or not labels.shape[1]:
                continue
            lost = gone[labels]
            if lost.any(axis=1).all():
                worth = [sum(score.get(int(a), 0.0) for a in row[hit]) for row, hit in zip(labels, lost, strict=True)]
                best = int(np.argmax(worth))
                gone[labels[best][lost[best]]], back = False, True
                notes.append(f"one position of {name} was kept that would have been left empty")
    if not back:
        return plan
    removed = {u.name: tuple(p for p, a in enumerate(u.atoms) if gone[a]) for u in units.units}
    return Plan(units, removed, tuple(notes))


def _search(units: Units, chosen: Sequence[Unit], scores: Sequence[Scores], step: ChannelPruning) -> Plan:
    return bisect(lambda ratio: _select(units, chosen, scores, step, ratio), units.graph, step)


P = TypeVar("P", bound=StructuralPlan)


def bisect(select: Callable[[float], P], graph: Graph, step: ChannelPruning) -> P:
    """The plan of the smallest ratio that meets the step's MACs or parameter target.

    Parameters
    ----------
    select : the plan of a ratio.

    Raises
    ------
    SlimlineError : the target is out of reach.
    """
    if step.target_macs is not None:
        what, target, before = "MACs", step.target_macs, cost.macs(graph)
    else:
        what, target, before = "parameters", step.target_parameters or 1.0, graph.size

    def size(candidate: P) -> int:
        return candidate.macs if what == "MACs" else candidate.parameters

    low, high = 0.0, 1.0
    best = select(high)
    if size(best) > target * before:
        raise out_of_reach(target, what, size(best) / before)
    for _ in range(20):
        middle = (low + high) / 2
        trial = select(middle)
        if size(trial) <= target * before:
            best, high = trial, middle
        else:
            low = middle
    return best


def out_of_reach(target: float, what: str, least: float) -> SlimlineError:
    """The error of a target below what pruning can leave."""
    return SlimlineError(
        f"Pruning cannot reach {target:.0%} of the {what}: at most {1 - least:.0%} can go "
        "with these settings; raise the target, lower round_to or prune more layers."
    )
