"""Structural steps: from a `ChannelPruning` to a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import numpy as np

from slimline.criteria import scores
from slimline.errors import SlimlineError, unknown
from slimline.graph import cost
from slimline.graph.kinds import kind
from slimline.graph.plan import Plan
from slimline.graph.units import Unit, Units
from slimline.methods.structured import Scores, select_global, select_local

if TYPE_CHECKING:
    from slimline.data import Data
    from slimline.model import Model
    from slimline.recipe import ChannelPruning


def plan(model: Model, step: ChannelPruning, data: Data | None = None, seed: int = 0, part: float = 1.0) -> Plan:
    """What `step` removes from `model`, without removing it.

    Parameters
    ----------
    data : needed by criteria that look at activations or gradients.
    part : fraction of the step's goal, for rounds of a gradual schedule.

    Raises
    ------
    SlimlineError
        If a glob matches no layer, the goal cannot be reached (the best that can is said), or data is missing.
    """
    units = Units(model.graph)
    chosen = _eligible(units, step)
    if not chosen:
        reasons = "; ".join(f"{f.name}: {f.reason}" for f in units.frozen[:3]) or "no layer was left to prune"
        raise SlimlineError(f"Nothing can be pruned: {reasons}.")
    chosen, found, notes = _scored(units, chosen, model, step, data, seed)
    if step.ratio is not None:
        made = _select(units, chosen, found, step, step.ratio * part)
    else:
        made = _search(units, chosen, found, step, part)
    return Plan(units, made.removed, (*notes, *made.notes))


def _check_globs(units: Units, globs: Sequence[str], field: str) -> None:
    layers = dict.fromkeys(n.layer for n in units.graph.nodes if n.layer)
    for glob in globs:
        if not any(fnmatchcase(layer, glob) for layer in layers):
            raise unknown(f"layer for {field}", glob, layers)


def _matches(names: Sequence[str], globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) for name in names for glob in globs)


def _eligible(units: Units, step: ChannelPruning) -> list[Unit]:
    if tuple(step.layers) != ("*",):
        _check_globs(units, step.layers, "layers")
    _check_globs(units, step.keep, "keep")
    wanted = None if step.axes is None else {"filters" if a == "channels" else a for a in step.axes}
    kinds = {u.name: kind(units, u) for u in units.units} if wanted is not None else {}
    sizes = {u.name: u.size + u.frozen for u in units.units if wanted is None or kinds[u.name] in wanted}
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
        if unit.size + unit.frozen > 1 and _matches(names, step.layers) and not _matches(names, step.keep):
            chosen.append(unit)
    if not chosen and tuple(step.layers) != ("*",):
        stuck = [f for f in units.frozen if _matches((f.name.rpartition(" (")[0],), step.layers)]
        if stuck:
            raise SlimlineError(f"{stuck[0].name} cannot be pruned: {stuck[0].reason}.")
    if not chosen and step.axes is not None:
        there = ", ".join(dict.fromkeys(kinds.values())) or "none"
        stuck = [f for f in units.frozen if f.reason != "the model's output"]
        why = f" ({stuck[0].name} is frozen: {stuck[0].reason})" if stuck else ""
        raise SlimlineError(
            f"There are no {' or '.join(step.axes)} to prune{why}: the axes of these layers are {there}; name one of "
            "them in axes."
        )
    return chosen


def _scored(
    units: Units, chosen: Sequence[Unit], model: Model, step: ChannelPruning, data: Data | None, seed: int
) -> tuple[list[Unit], list[Scores], tuple[str, ...]]:
    """The units of which the criterion says something, the scores of their positions, and what is to be noted."""
    found = scores(units, chosen, model, step, data, seed)
    left = [(u, s) for u, s in zip(chosen, found, strict=True) if s is not None]
    notes = tuple(
        f"{u.name} was left alone: the {step.criterion} criterion says nothing of it"
        for u, s in zip(chosen, found, strict=True)
        if s is None
    )
    if step.criterion == "obs" and step.scope != "local":
        left = [(u, s / _saved(units, u, step)) for u, s in left]
    return [u for u, _ in left], [s for _, s in left], notes


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
    found = []
    for name, dim in unit.carriers:
        for node in readers[name]:
            found.append((node.kind, node.inputs.index(name), dim))
    return tuple(sorted(found))


def _select(units: Units, chosen: Sequence[Unit], scores: Sequence[Scores], step: ChannelPruning, ratio: float) -> Plan:
    fixed = [u.frozen for u in chosen]
    if step.scope == "local":
        gone = select_local(scores, fixed, ratio, step.round_to)
    else:
        groups = [_topology(units, u) for u in chosen] if step.scope == "isomorphic" else None
        gone = select_global(scores, fixed, ratio, step.round_to, groups, relative=step.criterion != "obs")
    removed = {u.name: g for u, g in zip(chosen, gone, strict=True)}
    by_atom = {a: s for u, us in zip(chosen, scores, strict=True) for a, s in zip(u.atoms, us, strict=True)}
    notes = tuple(
        f"{u.name} keeps {u.size + u.frozen - len(g)} of {u.size + u.frozen}, the smallest legal width"
        for u, g in zip(chosen, gone, strict=True)
        if step.scope != "local" and g and u.size + u.frozen - len(g) <= step.round_to
    )
    return _legal(Plan(units, removed, notes), by_atom)


def _legal(plan: Plan, score: Mapping[int, float]) -> Plan:
    """Give back the most important position of every dimension that would be left empty."""
    notes = list(plan.notes)
    units = plan.units
    gone = {unit.atoms[p] for unit in units.units for p in plan.removed.get(unit.name, ())}
    back: set[int] = set()
    for name, rows in units.rows.items():
        for labels in rows:
            if labels is None or not labels.shape[1]:
                continue
            lost = np.isin(labels, list(gone - back))
            if lost.any(axis=1).all():
                worth = [sum(score.get(int(a), 0.0) for a in row[hit]) for row, hit in zip(labels, lost, strict=True)]
                best = int(np.argmax(worth))
                back |= {int(a) for a in labels[best][lost[best]]}
                notes.append(f"one position of {name} was kept that would have been left empty")
    if not back:
        return plan
    left = gone - back
    removed = {u.name: tuple(p for p, a in enumerate(u.atoms) if a in left) for u in units.units}
    return Plan(units, removed, tuple(notes))


def _search(units: Units, chosen: Sequence[Unit], scores: Sequence[Scores], step: ChannelPruning, part: float) -> Plan:
    """The smallest ratio whose plan meets the MACs or parameter target, by bisection."""
    if step.target_macs is not None:
        what, target, before = "MACs", step.target_macs, cost.macs(units.graph)
    else:
        what, target, before = "parameters", step.target_parameters or 1.0, units.graph.size
    limit = (1 - (1 - target) * part) * before

    def left(found: Plan) -> int:
        return found.macs if what == "MACs" else found.parameters

    low, high = 0.0, 1.0
    best = _select(units, chosen, scores, step, high)
    if left(best) > limit:
        raise SlimlineError(
            f"Pruning cannot reach {target:.0%} of the {what}: at most {1 - left(best) / before:.0%} can go "
            f"with these settings; raise the target, lower round_to or prune more layers."
        )
    for _ in range(20):
        middle = (low + high) / 2
        trial = _select(units, chosen, scores, step, middle)
        if left(trial) <= limit:
            best, high = trial, middle
        else:
            low = middle
    return best
