"""Makes up for what pruning broke, without training and without labels.

Layer after layer of the pruned model, weight and bias are solved anew so that the layer gives what it gave in the dense
model, from the inputs it has now: what is missing and what earlier layers could not repair. Where the output is added
to another one (a residual branch), the layer makes up for the error of the sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from slimline.evidence.grams import in_parts
from slimline.evidence.walk import MEMORY, Batches, Walk
from slimline.graph.edits import PutTensors
from slimline.graph.ir import Graph, Node
from slimline.graph.matrix import LayerMatrix, Terms, constant_slot, matrices
from slimline.methods.gram import Gram
from slimline.methods.reconstruction import RIDGE, reconstruct
from slimline.model import Model
from slimline.plans import CutPlan, Plan

Array = np.ndarray
Removals = Sequence[Plan | CutPlan]
Readers = Mapping[str, Sequence[Node]]
Run = Callable[[Callable[[str, Array], None]], None]
"""Shows named values to a function, batch after batch."""

ROWS = 65536  # of a layer that are seen; more say the same


def compensate(dense: Model, pruned: Model, plans: Removals, batches: Batches, ridge: float = RIDGE) -> Model:
    """`pruned` with weights and biases that give the outputs of `dense` again, as nearly as least squares can.

    Parameters
    ----------
    dense : the model that the first of `plans` was made for; `pruned` is what all of them, one after the other, made
        of it.
    batches : inputs of the model, each ``(batch, …)``, without labels.
    ridge : pull towards the weights as they are, see `slimline.methods.reconstruction.reconstruct`.
    """
    native, adapter = pruned.native, pruned.adapter
    limit = max(1, ROWS // max(len(batches), 1))
    schedule = _schedule(pruned, plans)
    samples = sum(len(batch[0]) for batch in batches)

    def size(level: Sequence[_Job]) -> int:
        return sum(4 * min(limit * len(batches), samples * job.places(pruned.graph)) * job.numbers for job in level)

    parts = list(in_parts(schedule, size, MEMORY))
    jobs = [[job for level in part for job in level] for part in parts]
    before = Walk(dense, batches, [list(_target_values(part_jobs)) for part_jobs in jobs])
    walk = Walk(pruned, batches, [_reads(level) for level in schedule])
    for part, part_jobs in zip(parts, jobs, strict=True):
        targets = _Targets(part_jobs, dense.parameters(), lambda see: before.on(dense.native, see), limit)
        for level in part:
            new = _solve(level, adapter.parameters(native), lambda see: walk.on(native, see), targets, limit, ridge)  # noqa: B023
            native = adapter.edit(native, (PutTensors(new),), pruned.example)
    return replace(pruned, native=native)


def _reads(jobs: Sequence[_Job]) -> list[str]:
    return list(dict.fromkeys(name for job in jobs for name in (job.layer.input, job.other) if name is not None))


@dataclass(frozen=True)
class _Job:
    """A layer to be solved.

    Attributes
    ----------
    before, layer : it in the dense model and in the pruned one.
    retained : of its groups and outputs in the dense model, those that are left.
    carried : by axis at whose positions it is applied, those that are left, where some are gone.
    shift : the parameter that takes the constant: a bias, or (`negative`) the mean of a batch norm; None for neither.
    through, other : what is added to make a residual sum: an affine function of the layer's output, and the rest.
    """

    before: LayerMatrix
    layer: LayerMatrix
    retained: tuple[Array, Array]
    carried: Mapping[str, Array]
    shift: str | None
    negative: bool
    through: str | None = None
    other: str | None = None

    @property
    def numbers(self) -> int:
        """Of its targets, in a row."""
        return math.prod(self.layer.shape[:2]) * (1 + 2 * (self.other is not None))

    def places(self, graph: Graph) -> int:
        """Rows of a sample, about."""
        return max(1, math.prod(graph.values[self.layer.output].shape[1:]) // math.prod(self.layer.shape[:2]))


def _schedule(pruned: Model, plans: Removals) -> list[list[_Job]]:
    """The layers whose inputs are not what they were, in levels that do not depend on themselves."""
    graph = pruned.graph
    jobs, origins = _jobs(graph, plans)
    jobs = _with_sums(graph, jobs, origins)
    names = [job.layer.node for job in jobs]
    needs = [origins[job.layer.input] | origins.get(job.other or "", frozenset()) for job in jobs]
    level: dict[str, int] = {}
    while len(level) < len(jobs):
        for name, need in zip(names, needs, strict=True):
            if name not in level and all(n in level for n in need):
                level[name] = 1 + max((level[n] for n in need), default=-1)
    return [[j for j in jobs if level[j.layer.node] == i] for i in range(max(level.values(), default=-1) + 1)]


def _jobs(graph: Graph, plans: Removals) -> tuple[list[_Job], dict[str, frozenset[str]]]:
    """The layers to be solved, in graph order; and per value that changed the layers (by node) it comes from."""
    dense = {m.node: m for m in matrices(plans[0].graph)}
    layers = {m.node: m for m in matrices(graph)}
    readers = graph.consumers()
    origins: dict[str, frozenset[str]] = {}
    jobs = []
    for node in graph.nodes:
        changed = [origins[name] for name in node.inputs if name in origins]
        layer, before = layers.get(node.name), dense.get(node.name)
        touched = bool(changed) or any(plan.statistics(node.name) for plan in plans)
        origin: frozenset[str] = frozenset().union(*changed)
        if layer is not None and before is not None:
            touched = touched or layer.shape[2] != before.shape[2]
            if touched and layer.weight in graph.learning and len(readers[layer.weight]) == 1:
                shift, negative = constant_slot(graph, layer, readers)
                retained = _retained(plans, node.name, before.groups), _retained(plans, node.name, before.outputs)
                jobs.append(_Job(before, layer, retained, _carried(plans, before), shift, negative))
                origins.setdefault(layer.input, frozenset())
                origin |= {node.name}
        if touched:
            origins.update(dict.fromkeys(node.outputs, origin))
    return jobs, origins


def _retained(plans: Removals, node: str, terms: Terms) -> Array:
    """Positions that stay of the product of some axes."""
    stay = np.ones([n for _, n in terms], bool)
    for d, (name, size) in enumerate(terms):
        remaining = np.arange(size)
        for plan in plans if not name.startswith(".") else ():
            retained = plan.axis_retained(node, name)
            remaining = remaining if retained is None else remaining[retained]
        stay &= np.isin(np.arange(size), remaining).reshape([-1 if i == d else 1 for i in range(len(terms))])
    return np.flatnonzero(stay)


def _carried(plans: Removals, before: LayerMatrix) -> dict[str, Array]:
    """By axis that the layer carries along and that loses positions, those that stay."""
    stay = {name: _retained(plans, before.node, ((name, size),)) for name, size in before.carried}
    return {name: stay[name] for name, size in before.carried if len(stay[name]) < size}


def _with_sums(graph: Graph, jobs: Sequence[_Job], origins: Mapping[str, frozenset[str]]) -> list[_Job]:
    """Every sum that changed gets one layer that makes up for the error of all of it: the one with most inputs."""
    readers = graph.consumers()
    best: dict[str, _Job] = {}
    for job in jobs:
        at = _sum(job.layer.output, readers, graph) if job.layer.one_to_one else None
        if at is None:
            continue
        node, through = at
        other = next((name for name in node.inputs if name != through), None)
        if other is None or other not in origins or job.layer.node in origins[other]:
            continue
        if node.name not in best or best[node.name].layer.shape[2] < job.layer.shape[2]:
            best[node.name] = replace(job, through=through, other=other)
    chosen = {job.layer.node: job for job in best.values()}
    return [chosen.get(job.layer.node, job) for job in jobs]


def _sum(value: str, readers: Readers, graph: Graph) -> tuple[Node, str] | None:
    """The addition that a value enters unchanged but for a scale and a shift, and the name under which it does."""
    while len(readers[value]) == 1:
        (node,) = readers[value]
        others = [name for name in node.inputs[1:] if name is not None]
        if node.kind == "elementwise" and node.attributes["function"] == "add":
            same = len(node.inputs) == 2 and len({graph.values[n].shape for n in node.inputs if n is not None}) == 1
            return (node, value) if same and not any(n in graph.parameters for n in node.inputs) else None
        plain = node.kind == "elementwise" and node.attributes["function"] == "identity" and not others
        if node.kind != "batch_norm" and not plain:
            return None
        value = node.outputs[0]
    return None


def _target_values(jobs: Sequence[_Job]) -> dict[str, list[tuple[_Job, str]]]:
    """Of the dense model: the values that tell what the layers should give, each with what it is to which."""
    reads: dict[str, list[tuple[_Job, str]]] = {}
    for job in jobs:
        reads.setdefault(job.before.input, []).append((job, "input"))
        if job.through is not None and job.other is not None:
            reads.setdefault(job.through, []).append((job, "through"))
            reads.setdefault(job.other, []).append((job, "other"))
    return reads


class _Targets:
    """What the dense model gives at the outputs that stay, and what it adds to it; rows of all batches in order.

    Parameters
    ----------
    stored : the dense model's parameters; `run` shows its values.
    """

    def __init__(self, jobs: Sequence[_Job], stored: Mapping[str, Array], run: Run, limit: int) -> None:
        self.outputs: dict[str, list[Array]] = {job.layer.node: [] for job in jobs}
        self.others: dict[str, list[Array]] = {job.layer.node: [] for job in jobs}
        after: dict[str, list[Array]] = {job.layer.node: [] for job in jobs}
        reads = _target_values(jobs)
        weights = {job.layer.node: _pick(job.before.matrix(stored[job.before.weight]), job.retained) for job in jobs}
        self.shifts = {job.layer.node: _shift(job, stored) for job in jobs if job.shift is not None}

        def see(name: str, array: Array) -> None:
            for job, what in reads[name]:
                node = job.layer.node
                if what == "input":
                    rows = job.before.rows(array, limit, job.carried)[job.retained[0]]
                    self.outputs[node].append(np.asarray(rows @ weights[node].swapaxes(1, 2), np.float32))
                else:
                    rows = job.before.results(array, limit, job.carried)[job.retained[0]][:, :, job.retained[1]]
                    (after if what == "through" else self.others)[node].append(np.asarray(rows, np.float32))

        run(see)
        self.slope = {node: _slope(self.outputs[node], seen) for node, seen in after.items() if seen}

    def rows(self, node: str, batch: int, other: Array | None) -> Array:
        """``(groups, rows, outputs)`` that the layer should give, where now `other` is added to them."""
        target = self.outputs[node][batch]
        missing = 0 if other is None else (self.others[node][batch] - other) * self.slope[node]
        return np.asarray(target + missing)


def _pick(matrix: Array, retained: tuple[Array, Array]) -> Array:
    return np.asarray(matrix[retained[0]][:, retained[1]])


def _shift(job: _Job, stored: Mapping[str, Array]) -> Array:
    """``(groups, outputs)``: the dense model's shift, which the outputs in `_Targets` are without."""
    held = job.before.vector(stored[str(job.shift)])
    assert held is not None  # constant_slot saw to it
    return _pick(held, job.retained)


def _slope(before: Sequence[Array], after: Sequence[Array]) -> Array:
    """``(groups, 1, outputs)``: the change of the layer's output that changes the sum by one; 0 where none does."""
    x, y = (np.concatenate(part, axis=1).astype(np.float64) for part in (before, after))
    x, y = x - x.mean(axis=1, keepdims=True), y - y.mean(axis=1, keepdims=True)
    both, square = (x * y).mean(axis=1, keepdims=True), (y * y).mean(axis=1, keepdims=True)
    return np.asarray(np.divide(both, square, out=np.zeros_like(both), where=square > 1e-12))


def _solve(
    jobs: Sequence[_Job],
    stored: Mapping[str, Array],
    run: Run,
    targets: _Targets,
    limit: int,
    ridge: float,
) -> dict[str, Array]:
    """New weights and shifts of one level; `run` shows the pruned model's values."""
    grams = {}
    for job in jobs:
        groups, outputs, inputs = job.layer.shape
        grams[job.layer.node] = Gram(groups, inputs + (job.shift is not None), outputs)
    pending: dict[str, dict[str, Array]] = {job.layer.node: {} for job in jobs}
    count = dict.fromkeys(pending, 0)
    reads: dict[str, list[_Job]] = {}
    for job in jobs:
        for name in dict.fromkeys((job.layer.input, job.other)):
            if name is not None:
                reads.setdefault(name, []).append(job)

    def see(name: str, array: Array) -> None:
        for job in reads[name]:
            node, held = job.layer.node, pending[job.layer.node]
            if name == job.layer.input:
                held["input"] = job.layer.rows(array, limit)
            if name == job.other:
                held["other"] = job.layer.results(array, limit)
            if len(held) < 1 + (job.other is not None):
                continue
            x = held["input"]
            if job.shift is not None:
                x = np.concatenate([x, np.ones((*x.shape[:2], 1), x.dtype)], axis=2)
            grams[node].see(x, targets.rows(node, count[node], held.get("other")))
            count[node] += 1
            held.clear()

    run(see)
    new: dict[str, Array] = {}
    for job in jobs:
        layer, gram = job.layer, grams[job.layer.node]
        weight = layer.matrix(stored[layer.weight]).astype(np.float64)
        constant = job.shift is not None
        if constant:
            weight = np.concatenate([weight, np.zeros((*weight.shape[:2], 1))], axis=2)
        solved = reconstruct(weight, gram.second, gram.cross, ridge, constant)
        if job.shift is not None:
            old = stored[job.shift]
            change = -solved[..., -1] if job.negative else solved[..., -1]
            new[job.shift] = layer.as_bias(targets.shifts[layer.node] + change, old.shape).astype(old.dtype)
            solved = solved[..., :-1]
        old = stored[layer.weight]
        new[layer.weight] = layer.tensor(solved, old.shape).astype(old.dtype)
    return new
