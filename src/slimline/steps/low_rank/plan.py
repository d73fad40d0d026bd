"""Which layers become products, of which rank, and the plan that puts them in."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from slimline.basics.errors import SlimlineError
from slimline.graph import cost
from slimline.graph.edits import Edit, Project, PutTensors
from slimline.graph.ir import Graph
from slimline.graph.matrix import LayerMatrix, matrices, recurrences, tables
from slimline.graph.operators import Linear
from slimline.methods.factorization import allocate
from slimline.plans import Replacement, ReplacementPlan
from slimline.recipe.layers import refuse_unmatched, selected
from slimline.steps.layer_fit import Evidence, Layer, fitting_batches, part_name, refusal
from slimline.steps.low_rank.parts import Split, methods, operators
from slimline.steps.low_rank.step import LowRank, Method

if TYPE_CHECKING:
    from slimline.data import Data
    from slimline.model import Model

CLOSED, MEASURED = 128, 16
"""Ranks of a layer among which a budget chooses, where their errors are known at once and where each is computed."""
TINY = 1e-9  # of its energy that a layer is taken to retain at least
NOTHING: Mapping[str, str] = MappingProxyType({})
NEVER = ("embedding", "recurrent", "experts", "bilinear")
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Option:
    """A layer split at one rank; without a split, as it is."""

    split: Split | None
    rank: int
    parameters: int
    macs: int
    error: float


@dataclass(frozen=True)
class Product(Replacement):
    """A layer that becomes a product.

    Attributes
    ----------
    method, ranks : how it is split, and the channels between its parts.
    kernels : of a recurrent layer, which stays, the weights by which it reads the product; by name.
    """

    method: Method
    ranks: tuple[int, ...]
    kernels: Mapping[str, Array] = field(default_factory=dict)

    @property
    def parts(self) -> tuple[str, ...]:
        return (*super().parts, self.name) if self.kernels else super().parts

    @property
    def weights(self) -> frozenset[str]:
        return super().weights | self.kernels.keys()

    def edit(self, input: str) -> Edit:
        (first, *_) = self.operators
        if self.kernels and isinstance(first, Linear):
            return Project(self.name, first.weight, self.kernels)
        return super().edit(input)


class LowRankPlan(ReplacementPlan):
    """Layers that become products. Printable and JSON-serialisable, without the factors; `mask` and `apply` carry it
    out.

    Parameters
    ----------
    graph : of the model it is for.
    products : in graph order.
    dense : of the chosen layers that stay as they are, why.
    notes : what else should be known.
    """

    def __init__(
        self, graph: Graph, products: Sequence[Product], dense: Mapping[str, str], notes: Sequence[str] = ()
    ) -> None:
        super().__init__(graph, products, dense, "factorise")
        self.products = tuple(products)
        self.notes = tuple(notes)

    def without(self, names: Collection[str]) -> LowRankPlan:
        return LowRankPlan(self.graph, [p for p in self.products if p.name not in names], self.dense, self.notes)

    def summary(self) -> dict[str, Any]:
        """What becomes what, ready for JSON."""
        return {
            "layers": [
                {"layer": p.name, "method": p.method, "ranks": list(p.ranks), **p.record(self.graph.batch)}
                for p in self.products
            ],
            "dense": [{"layer": name, "reason": reason} for name, reason in self.dense.items()],
            "frozen": [],
            "notes": list(self.notes),
            **self.totals,
        }

    def __str__(self) -> str:
        rows = [
            f"  {p.name}: {p.method}, rank {' and '.join(map(str, p.ranks))}, loses {p.error:.2%}, parameters "
            f"{p.parameters[0]:,} -> {p.parameters[1]:,}  ({', '.join(p.parts)})"
            for p in self.products
        ]
        dense = [f"  {name} stays: {reason}" for name, reason in self.dense.items()]
        return "\n".join([self.headline, *rows, *dense, *(f"  note: {note}" for note in self.notes)])


def plan_low_rank(
    model: Model, step: LowRank, data: Data | None = None, dense: Mapping[str, str] = NOTHING
) -> LowRankPlan:
    """Which layers of `model` become products, and the factors, without putting them in.

    Parameters
    ----------
    dense : layers that stay as they are though the step chooses them, and why.

    Raises
    ------
    SlimlineError : no layer that can be factorised, a glob that matches none, a rank at which no layer is smaller, a
        target out of reach, or data missing.
    """
    check(model, step)
    layers, unfit = candidates(model, step)
    work = _Work(model, step, layers, fitting_batches(step, data))
    chosen, reasons, notes = work.choose()
    paying = [option for option in chosen if option.split is not None and option.split.layer.name not in dense]
    return LowRankPlan(model.graph, work.products(paying), {**unfit, **reasons, **dense}, notes)


def check(model: Model, step: LowRank) -> None:
    """Refuse what is known to be out of reach without data: as `plan_low_rank` does."""
    layers, _ = candidates(model, step)
    _Work(model, step, layers, ()).check()


def candidates(model: Model, step: LowRank) -> tuple[list[Layer], dict[str, str]]:
    """The chosen layers that can be factorised, and why the others cannot.

    Raises
    ------
    SlimlineError : a glob that matches none, or no layer that can be factorised.
    """
    graph, types = model.graph, model.graph.types
    nodes, readers = {n.name: n for n in graph.nodes}, graph.consumers()
    places = {name: place for place, name in enumerate(nodes)}
    recurrent = {directions[0].node: directions for directions in recurrences(graph)}
    firsts = [directions[0] for directions in recurrent.values()]
    every = sorted((*matrices(graph), *tables(graph), *firsts), key=lambda matrix: places[matrix.node])
    read = {matrix.node for matrix in every}
    others = [
        n.layer or n.name
        for n in graph.nodes
        if n.kind in NEVER and n.name not in read and any(i in graph.trainable for i in n.inputs)
    ]
    named = [m.layer for m in every]
    for choice, globs in (("layers", step.layers), ("keep", step.keep)):
        refuse_unmatched(f"layer with a weight matrix for {choice}", globs, [*named, *others], types)
    layers, dense = [], {}
    for name in others:
        if selected((name,), step.layers, step.keep, types):
            dense[name] = "it is neither a linear layer, nor a convolution, nor a recurrent layer that reads vectors"
    for matrix in every:
        if not selected((matrix.layer,), step.layers, step.keep, types):
            continue
        node, each = nodes[matrix.node], recurrent.get(matrix.node, (matrix,))
        if node.kind == "embedding":
            reason = _table_refusal(model, matrix, step)
        else:
            reason = next(filter(None, (refusal(graph, node, one, readers) for one in each)), "")
        if reason:
            dense[matrix.layer] = reason
        else:
            layers.append(Layer.of(graph, node, matrix, part_name(graph, matrix, named), each[1:]))
    if not layers:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(dense.items())[:3])
        raise SlimlineError(f"Nothing can be factorised ({why or 'no layer with a weight is left'}): choose others.")
    return layers, dense


def _table_refusal(model: Model, matrix: LayerMatrix, step: LowRank) -> str:
    """Why no product can take the place of an embedding, or ''."""
    if matrix.weight not in model.graph.trainable:
        return "its table is no parameter that was trained"
    if _tied(model, matrix):
        return (
            "its table is tied to an output layer, which multiplies by all of it: give that a weight of its own first"
        )
    if len(model.graph.consumers()[matrix.weight]) > 1:
        return "other embeddings look rows up in its table too"
    if step.target_macs is not None:
        return "it looks rows up, and has no multiply-accumulates that could go"
    if step.undo:
        return "looking rows up takes no time that a product would save: with undo=False, for size, it becomes one"
    return ""


def _tied(model: Model, matrix: LayerMatrix) -> bool:
    """Whether something else than an embedding reads a table, or a weight that is equal to it or its transpose (as ONNX
    files hold them once what turns weights has been computed)."""
    graph, readers = model.graph, model.graph.consumers()

    def multiplies(name: str) -> bool:
        return any(reader.kind != "embedding" for reader in readers[name])

    shape = graph.values[matrix.weight].shape
    alike = [n for n in graph.trainable - {matrix.weight} if graph.values[n].shape in (shape, shape[::-1])]
    if multiplies(matrix.weight) or not any(map(multiplies, alike)):
        return multiplies(matrix.weight)
    stored = model.parameters()
    table = stored[matrix.weight]
    return any(np.array_equal(other, table) for n in filter(multiplies, alike) for other in (stored[n], stored[n].T))


class _Work:
    """One factorisation: evidence, choice of ranks, factors."""

    def __init__(
        self, model: Model, step: LowRank, layers: Sequence[Layer], batches: Sequence[tuple[np.ndarray, ...]]
    ) -> None:
        self.model, self.step, self.layers, self.batches = model, step, layers, batches
        self.evidence = Evidence(model, layers, batches)
        self.splits = {layer.name: self._splits(layer) for layer in layers}

    def _splits(self, layer: Layer) -> list[Split]:
        target = self.evidence.target(layer)
        return [
            Split(layer, m, target.weight, target.second, self.step.damping) for m in methods(layer, self.step.methods)
        ]

    def choose(self) -> tuple[list[Option], dict[str, str], list[str]]:
        """The options taken, why other layers stay dense, and notes."""
        step = self.step
        if step.target_parameters is not None or step.target_macs is not None:
            return *self._allocated(*self._target()), []
        if step.ratio is not None and step.scope == "global":
            return self._within_ratio(step.ratio)
        chosen, dense = [], {}
        for layer in self.layers:
            option, reason = self._alone(layer)
            if option is None:
                dense[layer.name] = reason
            else:
                chosen.append(option)
        return chosen, dense, []

    def _alone(self, layer: Layer) -> tuple[Option | None, str]:
        """What the step makes of one layer, or why it stays."""
        step = self.step
        options = []
        reason = "no rank makes it smaller"
        for split in self.splits[layer.name]:
            if step.rank is not None:
                wished = split.signal_rank if step.rank == "evbmf" else step.rank
                reason = self._misfit(split, wished)
                options += [] if reason else [_option(split, wished)]
                continue
            ranks = self._ranks(split)
            if not ranks:
                continue
            if step.ratio is not None:
                most = (1 - step.ratio) * layer.parameters
                options.append(_option(split, max([r for r in ranks if split.cost(r)[0] <= most], default=ranks[0])))
                continue
            rank = _first(split, ranks, step.loss or 0.0)
            if rank is None:
                reason = f"at every rank that would make it smaller it loses more than {step.loss:.4g} of its energy"
            else:
                options.append(_option(split, rank))
        if not options:
            return None, reason
        by_size = step.loss is not None
        return min(options, key=lambda o: (o.parameters, o.error) if by_size else (o.error, o.parameters)), ""

    def _ranks(self, split: Split) -> list[int]:
        """The ranks that make a layer smaller, ascending."""
        by = self.step.round_to if split.most >= self.step.round_to else 1
        return [rank for rank in range(by, split.most + 1, by) if _smaller(split, rank)]

    def _options(self, layer: Layer) -> list[Option]:
        """Among which a budget chooses; the first is the layer as it is."""
        options = [_dense(layer)]
        for split in self.splits[layer.name]:
            ranks = self._ranks(split)
            number = min(len(ranks), CLOSED if split.closed else MEASURED)
            places = np.unique(np.linspace(0, len(ranks) - 1, number).round().astype(int))
            options += [_option(split, ranks[i]) for i in places]
        return options

    def _least(self, price: Callable[[Option], int]) -> int:
        """What all layers cost at their lowest ranks; no error is asked for."""
        lowest = 0
        for layer in self.layers:
            splits = [(split, ranks[0]) for split in self.splits[layer.name] if (ranks := self._ranks(split))]
            options = [Option(split, rank, *split.cost(rank), 1.0) for split, rank in splits]
            lowest += min(map(price, [_dense(layer), *options]))
        return lowest

    def _within_ratio(self, ratio: float) -> tuple[list[Option], dict[str, str], list[str]]:
        total = sum(layer.parameters for layer in self.layers)
        budget, least = (1 - ratio) * total, self._least(_parameters)
        notes = []
        if least > budget:
            notes.append(f"no more than {1 - least / total:.1%} of the parameters of these layers can go")
        return *self._allocated(max(budget, least), _parameters), notes

    def _target(self) -> tuple[float, Callable[[Option], int]]:
        """What the layers may cost, and by what it is counted.

        Raises
        ------
        SlimlineError : they cost more at their lowest ranks.
        """
        step, graph = self.step, self.model.graph
        if step.target_macs is not None:
            what, target, price = "MACs", step.target_macs, _macs
            total = cost.macs(graph) * graph.batch
        else:
            what, target, price = "parameters", step.target_parameters or 0.0, _parameters
            total = graph.size
        others = total - sum(price(_dense(layer)) for layer in self.layers)
        budget, least = target * total - others, self._least(price)
        if least > budget:
            reached = (others + least) / total
            raise SlimlineError(
                f"LowRank cannot bring the model to {target:.4g} of its {what}: {reached:.4g} is the least at rank "
                f"{step.round_to}; ask for more, or prune channels too."
            )
        return budget, price

    def check(self) -> None:
        """Refuse what is known to be out of reach without data.

        Raises
        ------
        SlimlineError : a rank at which no layer is smaller, a target below what the lowest ranks leave.
        """
        if isinstance(self.step.rank, int):
            splits = [split for each in self.splits.values() for split in each]
            if not any(self._misfit(split, self.step.rank) == "" for split in splits):
                why = "; ".join(f"{s.layer.name}: {self._misfit(s, self.step.rank)}" for s in splits[:3])
                raise SlimlineError(f"No layer gets smaller at rank {self.step.rank} ({why}): ask for a lower rank.")
        if self.step.target_parameters is not None or self.step.target_macs is not None:
            self._target()

    def _misfit(self, split: Split, rank: int) -> str:
        """Why a layer is not split at a rank, or ''."""
        if rank == 0:
            return "nothing in its weight stands out from noise"
        if rank > split.most:
            return f"rank {rank} is more than its matrix can have ({split.most})"
        return "" if _smaller(split, rank) else f"of rank {rank} it would have no fewer parameters or MACs"

    def _allocated(self, budget: float, price: Callable[[Option], int]) -> tuple[list[Option], dict[str, str]]:
        options = [self._options(layer) for layer in self.layers]
        costs = [list(map(price, each)) for each in options]
        lost = [[-math.log(max(1 - option.error, TINY)) for option in each] for each in options]
        taken = allocate(costs, lost, budget)
        assert taken is not None  # the callers saw to it
        chosen, dense = [], {}
        for layer, each, place in zip(self.layers, options, taken, strict=True):
            if each[place].split is not None:
                chosen.append(each[place])
            elif len(each) == 1:
                dense[layer.name] = "no rank makes it smaller"
            else:
                dense[layer.name] = "the other layers lose less for the same budget"
        return chosen, dense

    def products(self, chosen: Sequence[Option]) -> list[Product]:
        """The layers with their factors, in the order of `chosen`; the one behind makes up for the one before."""
        current = self.model.native
        products = []
        for option in chosen:
            assert option.split is not None
            product = self._product(option, option.split, current)
            products.append(product)
            if self.step.compensates:
                current = self.model.adapter.edit(current, (PutTensors(product.tensors),), self.model.example)
        return products

    def _product(self, option: Option, split: Split, current: Any) -> Product:
        layer = split.layer
        target = self.evidence.target(layer)
        if self.step.compensates:
            target = self.evidence.compensating(layer, current)
            split = replace(split, weight=target.weight, second=target.second)
        factors, product = split.factors(option.rank)
        tensors, bias = self.evidence.tensors(layer, product, target.mean)
        return Product(
            layer.name,
            layer.matrix,
            operators(layer, split.method, factors, bias),
            tensors,
            option.error,
            (layer.parameters, option.parameters),
            (layer.macs, option.macs),
            split.method,
            split.ranks(option.rank),
            layer.kernels(factors[-1], self.evidence.stored) if layer.recurrent else {},
        )


def _dense(layer: Layer) -> Option:
    return Option(None, 0, layer.parameters, layer.macs, 0.0)


def _parameters(option: Option) -> int:
    return option.parameters


def _macs(option: Option) -> int:
    return option.macs


def _smaller(split: Split, rank: int) -> bool:
    parameters, macs = split.cost(rank)
    return parameters < split.layer.parameters and (split.layer.table or macs < split.layer.macs)


def _option(split: Split, rank: int) -> Option:
    return Option(split, rank, *split.cost(rank), split.error(rank))


def _first(split: Split, ranks: Sequence[int], loss: float) -> int | None:
    """The lowest rank at which no more is lost; what is lost falls with the rank."""
    if split.error(ranks[-1]) > loss:
        return None
    below, above = -1, len(ranks) - 1
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (below, middle) if split.error(ranks[middle]) <= loss else (middle, above)
    return ranks[above]
