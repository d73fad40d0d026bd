"""How much each position of each unit matters: arrays of a model gathered, and handed to the formulas in `methods`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from slimline.basics.errors import SlimlineError
from slimline.basics.named import rows
from slimline.evidence.grams import collect
from slimline.graph.groups import Groups
from slimline.graph.ir import Node
from slimline.graph.matrix import LayerMatrix, Terms, constant_slot, matrices
from slimline.graph.units import Unit, Units
from slimline.methods import structured
from slimline.methods.gram import Gram, output_energy
from slimline.methods.removal import Consumer, removal_order
from slimline.methods.structured import Scores
from slimline.model.outputs import described_outputs
from slimline.recipe.criterion import name_of
from slimline.recipe.named_code import function_of

if TYPE_CHECKING:
    from slimline.data import Data
    from slimline.frameworks.base import Batch
    from slimline.model import Model
    from slimline.steps.channels.step import ChannelPruning

Array = np.ndarray

ROWS = 65536  # of a layer's inputs in its Gram matrix; more say the same
RANK_SAMPLES = 64
SINGLE_SAMPLES = 128
"""Samples whose feature maps are ranked, and whose gradients are taken one by one."""


def scores(
    units: Units, chosen: Sequence[Unit], model: Model, step: ChannelPruning, data: Data | None, seed: int
) -> list[Scores | None]:
    """Importance of every position of every chosen unit; None for a unit of which the criterion says nothing.

    Raises
    ------
    SlimlineError
        If the criterion needs data, labels or operators that are not there, or a user's function gives no scores.
    """
    if step.criterion == "random":
        rng = np.random.default_rng(seed)
        return [rng.random(u.size) for u in chosen]
    context = Evidence(units, model, step, data)
    per_unit = _CRITERIA.get(str(step.criterion), _by_function)(context, chosen)
    if all(s is None for s in per_unit):
        raise SlimlineError(
            f"The {step.criterion} criterion says nothing of these layers, as "
            f"{_SILENT.get(str(step.criterion), 'no weight makes or reads their positions')}: choose another."
        )
    return per_unit


_SILENT = {
    "batch_norm": "no batch norm follows them",
    "feature_rank": "they make no feature maps",
    "geometric_median": "no weight makes their positions",
}


@dataclass
class Evidence:
    """A model and a step's data, and what criteria read off them, computed at most once."""

    units: Units
    model: Model
    step: ChannelPruning
    data: Data | None

    @cached_property
    def arrays(self) -> Mapping[str, Array]:
        return self.model.parameters()

    @cached_property
    def layers(self) -> tuple[LayerMatrix, ...]:
        return matrices(self.units.graph)

    @cached_property
    def checked(self) -> Data:
        """The data as the model takes it."""
        if self.data is None:
            raise SlimlineError(
                f"The {self.step.criterion} criterion needs data: pass slimline.Data with training or calibration "
                "samples."
            )
        return self.data.check(self.model.inputs)

    def samples(self, size: int, count: int) -> list[Batch]:
        """The first `count` calibration samples with their labels, `size` at a time."""
        batches, seen = [], 0
        for inputs, labels in self.checked.split("calibration").batches(size):
            remaining = count - seen
            batches.append((tuple(x[:remaining] for x in inputs), rows(labels, slice(remaining))))
            seen += len(inputs[0])
            if seen >= count:
                break
        return batches

    def gradients(
        self, size: int, count: int, see: Callable[[Mapping[str, Array]], None] | None = None
    ) -> Mapping[str, Array]:
        """Mean gradient per parameter of the loss that fits the labels."""
        batches = self.samples(size, count)
        loss = self.step.loss or "cross_entropy"
        outputs = described_outputs(self.model, self.checked, "calibration", lenient=True if loss == "norm" else None)
        if loss == "cross_entropy" and not any(output.labelled for output in outputs):
            raise SlimlineError(
                f"The {self.step.criterion} criterion needs the gradient of a loss, and there are no labels of the "
                "outputs: give labelled data, or loss='norm' for the norm of the outputs."
            )
        return self.model.adapter.gradients(self.model.native, batches, loss, see, outputs)

    def grams(self, layers: Sequence[LayerMatrix]) -> dict[str, Gram]:
        """Gram matrices of the layers' inputs."""
        batches = [inputs for inputs, _ in self.samples(self.step.batch_size, self.step.samples)]
        return collect(self.model, layers, batches, rows=max(1, ROWS // len(batches)))

    def spread(self, layer: LayerMatrix, grams: Mapping[str, Gram]) -> Array:
        """What a change of the weight is measured with: the covariance where a constant can make up for the means."""
        slot, _ = constant_slot(self.units.graph, layer, self.readers)
        gram = grams[layer.node]
        return gram.second if slot is None else gram.covariance

    @cached_property
    def readers(self) -> Mapping[str, Sequence[Node]]:
        return self.units.graph.consumers()

    def summed(self, chosen: Sequence[Unit], value: Callable[[str, int], Scores | None]) -> list[Scores]:
        """Per unit the values of all parameter slices that go with each position, added up."""
        sums = Groups.of(self.units, chosen).sums(value)
        return np.split(sums, np.cumsum([u.size for u in chosen])[:-1])

    def places(self, layer: LayerMatrix, terms: Terms, unit: Unit) -> Array:
        """Of a product of a layer's axes, what each position of a unit owns: ``(positions, width)``, -1 for none."""
        where = np.full(len(self.units.solver.atoms.axis), -1)
        where[list(unit.atoms)] = np.arange(unit.size)
        every = np.arange(int(np.prod([n for _, n in terms]))).reshape([n for _, n in terms])
        owned: list[set[int]] = [set() for _ in range(unit.size)]
        for d, (name, _) in enumerate(terms):
            dim = None if name.startswith(".") else self.units.solver.letters[layer.node][name]
            if dim is None or dim.labels is None:
                continue
            at = where[self.units.solver.atoms.resolve(dim.labels)]
            for index, position in zip(*np.nonzero(at >= 0), strict=True):
                owned[at[index, position]].update(np.take(every, index, axis=d).reshape(-1).tolist())
        width = max(map(len, owned), default=0)
        table = np.full((unit.size, width), -1)
        for position, columns in enumerate(owned):
            table[position, : len(columns)] = sorted(columns)
        return table


def _magnitude(context: Evidence, chosen: Sequence[Unit]) -> list[Scores | None]:
    criterion = str(context.step.criterion)
    sums = context.summed(chosen, lambda name, dim: structured.slice_scores(context.arrays[name], dim, criterion))
    return [np.sqrt(s) for s in sums] if criterion == "l2" else [*sums]


def _taylor(context: Evidence, chosen: Sequence[Unit]) -> list[Scores | None]:
    gradients = context.gradients(64, context.step.samples)

    def value(name: str, dim: int) -> Scores | None:
        return structured.slice_scores(context.arrays[name], dim, "taylor", gradients[name])

    return [*context.summed(chosen, value)]


def _second_order(context: Evidence, chosen: Sequence[Unit]) -> list[Scores | None]:
    """``fisher``: the squared first-order change of every single sample's loss; ``obd``: the diagonal Hessian's."""
    totals = [np.zeros(u.size) for u in chosen]
    arrays = context.arrays
    squares = {name: np.zeros(arrays[name].shape) for name in context.units.graph.trainable}
    makes = {layer.weight for layer in context.layers}
    count = 0

    def see(gradients: Mapping[str, Array]) -> None:
        nonlocal count
        count += 1
        if context.step.criterion == "obd":
            for name, gradient in gradients.items():
                squares[name] += np.square(gradient, dtype=np.float64)
            return
        changes = context.summed(
            chosen,
            lambda name, dim: structured.slice_products(arrays[name], gradients[name], dim) if name in makes else None,
        )
        for total, change in zip(totals, changes, strict=True):
            total += np.square(change)

    context.gradients(1, min(context.step.samples, SINGLE_SAMPLES), see)
    if context.step.criterion == "obd":
        return [
            *context.summed(chosen, lambda name, dim: structured.obd_scores(arrays[name], squares[name] / count, dim))
        ]
    return [total / count for total in totals]


def _batch_norm(context: Evidence, chosen: Sequence[Unit]) -> list[Scores | None]:
    scales = {n.inputs[1] for n in context.units.graph.nodes if n.kind == "batch_norm"}
    has = [any(name in scales for name, _ in u.carriers) for u in chosen]
    sums = context.summed(
        chosen, lambda name, _: np.abs(context.arrays[name], dtype=np.float64) if name in scales else None
    )
    return [s if h else None for s, h in zip(sums, has, strict=True)]


def _geometric_median(context: Evidence, chosen: Sequence[Unit]) -> list[Scores | None]:
    totals: list[Scores | None] = []
    for unit in chosen:
        total = None
        for layer in context.layers:
            if not any(name == layer.weight for name, _ in unit.carriers):
                continue
            rows = context.places(layer, (*layer.groups, *layer.outputs), unit)
            if rows.size:
                weight = layer.matrix(context.arrays[layer.weight])
                flat = np.vstack([weight.reshape(-1, weight.shape[2]), np.zeros((1, weight.shape[2]))])
                value = structured.distances(flat[rows].reshape(unit.size, -1))
                total = value if total is None else total + value
        totals.append(total)
    return totals


def _feature_rank(context: Evidence, chosen: Sequence[Unit]) -> list[Scores | None]:
    graph, rows = context.units.graph, context.units.rows
    at: dict[str, list[tuple[int, int, Array]]] = {}
    for index, unit in enumerate(chosen):
        for node in reversed(graph.nodes):
            name = node.outputs[0]
            dims = rows.get(name, ())
            held = [(d, x) for d, x in enumerate(dims) if x is not None and np.isin(unit.atoms, x).all()]
            if len(held) == 1 and len(dims) >= 4 and held[0][0] > 0 and min(graph.values[name].shape[1:]) > 1:
                d, labels = held[0]
                places = np.array([int(np.flatnonzero((labels == atom).any(axis=1))[0]) for atom in unit.atoms])
                at.setdefault(name, []).append((index, d, places))
                break
    totals: list[Scores | None] = [None] * len(chosen)
    batches = [inputs for inputs, _ in context.samples(32, min(context.step.samples, RANK_SAMPLES))] if at else []
    count = sum(len(inputs[0]) for inputs in batches)

    def see(name: str, array: Array) -> None:
        for index, dim, places in at[name]:
            maps = np.moveaxis(np.take(array, places, axis=dim), dim, 1)
            ranks = structured.mean_ranks(maps) * len(array) / count
            total = totals[index]
            totals[index] = ranks if total is None else total + ranks

    if at:
        context.model.adapter.observe(context.model.native, batches, list(at), see)
    return totals


def _obs(context: Evidence, chosen: Sequence[Unit]) -> list[Scores | None]:
    """What each position adds to the error of the layers that read it, in the order in which positions go best.

    A unit that no layer reads (a width that a product of activations contracts) is scored by its share of what the
    layers that make it give.
    """
    read = [[(layer, context.places(layer, layer.inputs, unit)) for layer in context.layers] for unit in chosen]
    read = [[(layer, columns) for layer, columns in pairs if columns.size] for pairs in read]
    produced = [
        []
        if pairs
        else [(layer, context.places(layer, (*layer.groups, *layer.outputs), unit)) for layer in context.layers]
        for pairs, unit in zip(read, chosen, strict=True)
    ]
    produced = [[(layer, rows) for layer, rows in pairs if rows.size] for pairs in produced]
    needed = {layer.node for pairs in (*read, *produced) for layer, _ in pairs}
    grams = context.grams([layer for layer in context.layers if layer.node in needed])
    result: list[Scores | None] = []
    for unit, consumers, producers in zip(chosen, read, produced, strict=True):
        if consumers:
            parts = [
                Consumer(layer.matrix(context.arrays[layer.weight]), context.spread(layer, grams), columns)
                for layer, columns in consumers
            ]
            order, errors = removal_order(parts)
            score = np.zeros(unit.size)
            score[order] = np.maximum.accumulate(errors)
            result.append(score)
        elif producers:
            shares = [_share(layer, rows, context.arrays, grams[layer.node]) for layer, rows in producers]
            result.append(np.sum(shares, axis=0))
        else:
            result.append(None)
    return result


def _share(layer: LayerMatrix, rows: Array, arrays: Mapping[str, Array], gram: Gram) -> Scores:
    weight = layer.matrix(arrays[layer.weight]).astype(np.float64)
    energy = np.append(output_energy(weight, gram.second).reshape(-1), 0)
    return np.asarray(energy[rows].sum(axis=1) / max(energy.sum(), 1e-300))


def _by_function(context: Evidence, chosen: Sequence[Unit]) -> list[Scores | None]:
    """Scores of the user's ``(weight, gradient, gram)`` for every row of the matrix of each layer that makes a unit."""
    function = function_of(context.step.criterion)
    wants = _arguments(function)
    makers = {
        layer.node: layer
        for layer in context.layers
        if any(name == layer.weight for u in chosen for name, _ in u.carriers)
    }
    gradients = context.gradients(64, context.step.samples) if wants > 1 else {}
    grams = context.grams(list(makers.values())) if wants > 2 else {}
    rated: dict[str, Scores] = {}
    for node, layer in makers.items():
        weight = layer.matrix(context.arrays[layer.weight])
        gradient = layer.matrix(gradients[layer.weight]) if wants > 1 else None
        gram = grams[node].second if wants > 2 else None
        rated[node] = _rated(function, layer, (weight, gradient, gram)[:wants])
    totals: list[Scores | None] = []
    for unit in chosen:
        total = None
        for node, layer in makers.items():
            rows = context.places(layer, (*layer.groups, *layer.outputs), unit)
            if rows.size:
                value = np.append(rated[node].reshape(-1), 0)[rows].sum(axis=1)
                total = value if total is None else total + value
        totals.append(total)
    return totals


def _arguments(function: Callable[..., Any]) -> int:
    """How many of weight, gradient and Gram matrix a user's function takes."""
    try:
        count = len(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        count = 0
    if not 1 <= count <= 3:
        raise SlimlineError(
            f"The criterion {name_of(function)} takes {count} arguments: write a function of (weight), (weight, "
            "gradient) or (weight, gradient, gram)."
        )
    return count


def _rated(function: Callable[..., Any], layer: LayerMatrix, arguments: tuple[Any, ...]) -> Scores:
    name = getattr(function, "__name__", "criterion")
    try:
        scores = np.asarray(function(*arguments), np.float64)
    except Exception as e:
        raise SlimlineError(f"The criterion {name} failed for {layer.layer}: {type(e).__name__}: {e}.") from e
    expected = layer.shape[:2]
    if scores.shape != expected and scores.size == expected[1] and expected[0] == 1:
        scores = scores.reshape(expected)
    if scores.shape != expected:
        raise SlimlineError(
            f"The criterion {name} gave scores of shape {scores.shape} for {layer.layer}: it must give {expected}, "
            "one for every output of every group."
        )
    if not np.isfinite(scores).all():
        raise SlimlineError(f"The criterion {name} gave NaN or infinity for {layer.layer}: it must give finite scores.")
    return scores


_CRITERIA: dict[str, Callable[[Evidence, Sequence[Unit]], list[Scores | None]]] = {
    "l1": _magnitude,
    "l2": _magnitude,
    "taylor": _taylor,
    "fisher": _second_order,
    "obd": _second_order,
    "batch_norm": _batch_norm,
    "geometric_median": _geometric_median,
    "feature_rank": _feature_rank,
    "obs": _obs,
}
