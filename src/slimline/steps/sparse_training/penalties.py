"""What `SparseTraining` does to a network besides training it. Knows no framework.

The training loop tells a `Penalty` before and after every optimiser step, and the penalty changes weights through the
trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from slimline.basics.errors import SlimlineError
from slimline.frameworks.base import Batch, Term, Trainer
from slimline.graph.groups import Groups
from slimline.graph.units import Units
from slimline.methods import activations, gates
from slimline.methods.adam import Adam
from slimline.methods.proximal import adaptive_weights, group_factors, ridge_factor, soft_threshold
from slimline.methods.structured import slice_products, slice_scores
from slimline.recipe.step import Step
from slimline.steps.activations.plan import chosen as chosen_relus
from slimline.steps.channels.selection import eligible
from slimline.steps.channels.selection import plan as plan_channels
from slimline.steps.channels.step import ChannelPruning
from slimline.steps.sparse.prune import chosen as chosen_layers
from slimline.steps.sparse.step import SparsePruning
from slimline.steps.sparse_training.step import SparseTraining
from slimline.training.companions import Companion, Company

if TYPE_CHECKING:
    from slimline.data import Data
    from slimline.model import Model

Array = np.ndarray[Any, np.dtype[Any]]
Weights = Mapping[str, Array]
PREFIX = "penalty/"


class Penalty(Companion):
    """Of activations, a term of the loss; of weights, what a subclass does around every optimiser step.

    Parameters
    ----------
    total : optimiser steps of the training.
    terms : names of activations that the loss penalises.

    Attributes
    ----------
    steps_taken : optimiser steps so far.
    """

    refreshes = True  # it changes weights in front of batch norms, whose statistics lag behind

    def __init__(self, step: SparseTraining, total: int, terms: Sequence[str] = ()) -> None:
        self.step, self.total, self.terms = step, total, tuple(terms)
        self.steps_taken = 0

    @property
    def sparsity(self) -> float | None:
        """The part of the penalised weights, scales or groups that is exactly zero; None of activations."""
        return None

    @property
    def complete(self) -> bool:
        """Whether the training is over; no earlier epoch is worth keeping."""
        return self.steps_taken >= self.total

    @property
    def strength(self) -> float:
        """Of the optimiser step under way."""
        return self.step.strength_at((self.steps_taken + 1) / self.total)

    def start(self, trainer: Trainer) -> None:
        """Put the terms into the loss."""
        if self.terms:
            term = activations.l1 if self.step.penalty == "l1" else activations.hoyer_square
            trainer.add(Term.mean(self.terms, term, self.step.strength_at(1.0)))

    def after(self, trainer: Trainer, rate: float, batch: Batch) -> None:
        """Count the step."""
        self.steps_taken += 1

    def record(self) -> dict[str, Any]:
        """What is zero, and whether the training is over."""
        part = {} if self.sparsity is None else {"sparsity": round(self.sparsity, 6)}
        return {**part, "pruned": self.complete}

    def state(self) -> dict[str, Array]:
        """All that the next step depends on besides the trainer's own state."""
        return {f"{PREFIX}done": np.array(self.steps_taken)}

    def restore(self, state: Mapping[str, Array], trainer: Trainer) -> None:
        """Continue from `state`."""
        self.steps_taken = int(state[f"{PREFIX}done"])


class Shrinkage(Penalty):
    """A proximal step on the weights after every optimiser step.

    Parameters
    ----------
    shrunk : what weights become for an amount, the learning rate times the strength.
    zeros : the part of them that is zero.
    """

    def __init__(
        self,
        step: SparseTraining,
        total: int,
        weights: Weights,
        shrunk: Callable[[Weights, float], Weights],
        zeros: Callable[[Weights], float],
    ) -> None:
        super().__init__(step, total)
        self._shrunk, self._zeros = shrunk, zeros
        self._part = zeros(weights)
        # With momentum a gradient acts on later steps too: so does the penalty that is weighed against it.
        self._momentum = step.momentum if step.optimizer == "sgd" else 0.0
        self._amount = 0.0

    @property
    def sparsity(self) -> float:
        """The part of the weights, scales or groups that is zero."""
        return self._part

    def after(self, trainer: Trainer, rate: float, batch: Batch) -> None:
        """Shrink, and count the zeros."""
        self._amount = self._momentum * self._amount + rate * self.strength
        shrunk = self._shrunk(trainer.weights(), self._amount)
        trainer.set_weights(shrunk)
        self._part = self._zeros(shrunk)
        super().after(trainer, rate, batch)

    def state(self) -> dict[str, Array]:
        """The amount of the last step too."""
        return super().state() | {f"{PREFIX}amount": np.array(self._amount)}

    def restore(self, state: Mapping[str, Array], trainer: Trainer) -> None:
        """Continue from `state`."""
        super().restore(state, trainer)
        self._amount = float(state[f"{PREFIX}amount"])


class Gates(Penalty):
    """A hard-concrete gate on all weights of each group (L0).

    Each optimiser step sees the weights times one sample of the gates. Its change of the gated weights, times the gates
    as the chain rule has it, is added to the weights without gates, which are kept here. Between the steps the trainer
    holds the weights times the expected gates, so they are evaluated, and stay, that way.
    """

    def __init__(self, step: SparseTraining, total: int, weights: Weights, groups: Groups, seed: int) -> None:
        super().__init__(step, total)
        self.groups, self.seed = groups, seed
        self.open = {name: np.array(weights[name]) for name in groups.parameters}
        sizes = groups.sizes({name: weights[name].shape for name in groups.parameters})
        self.worth = sizes / sizes.sum()
        self.parameters = np.full(groups.count, gates.OPEN)
        self.optimizer = Adam(self.parameters.shape)
        self._gates = self._uniform = np.ones(groups.count)
        self._gated: Weights = {}

    @property
    def sparsity(self) -> float:
        """The part of the groups whose gate is closed."""
        return float(np.mean(gates.expected(self.parameters) == 0))

    def before(self, trainer: Trainer) -> None:
        """Draw the gates."""
        rng = np.random.default_rng([self.seed, self.steps_taken])
        self._uniform = rng.uniform(1e-6, 1 - 1e-6, self.groups.count)
        self._gates = gates.sampled(self.parameters, self._uniform)
        self._gated = self.groups.scaled(self.open, self._gates)
        trainer.set_weights(self._gated)

    def after(self, trainer: Trainer, rate: float, batch: Batch) -> None:
        """Move the weights and the gates."""
        moved, gradients = trainer.weights(), trainer.slopes()
        change = self.groups.scaled({n: moved[n] - w for n, w in self._gated.items()}, self._gates)
        self.open = {name: weight + change[name] for name, weight in self.open.items()}
        # Weight times gradient is the derivative by a factor on the weight, here the gate times its own derivative.
        by_factor = self.groups.sums(lambda name, dim: slice_products(self._gated[name], gradients[name], dim))
        by_gate = np.divide(by_factor, self._gates, out=np.zeros_like(by_factor), where=self._gates > 0)
        slope = by_gate * gates.slope(self.parameters, self._uniform)
        slope += self.strength * self.worth * gates.open_slope(self.parameters)
        factor = rate / self.step.learning_rate
        self.parameters = self.parameters - self.optimizer.step(slope, factor * self.step.gate_rate)
        trainer.set_weights(self.groups.scaled(self.open, gates.expected(self.parameters)))
        super().after(trainer, rate, batch)

    def state(self) -> dict[str, Array]:
        """The gates and the weights without them too."""
        arrays = super().state() | {f"{PREFIX}open/{name}": array for name, array in self.open.items()}
        arrays |= {f"{PREFIX}adam/{name}": array for name, array in self.optimizer.state().items()}
        return arrays | {f"{PREFIX}gates": self.parameters}

    def restore(self, state: Mapping[str, Array], trainer: Trainer) -> None:
        """Continue from `state`."""
        super().restore(state, trainer)
        self.parameters = state[f"{PREFIX}gates"]
        self.open = {name: state[f"{PREFIX}open/{name}"] for name in self.open}
        self.optimizer.restore({name: state[f"{PREFIX}adam/{name}"] for name in self.optimizer.state()})


def penalised(
    step: SparseTraining, model: Model, data: Data, seed: int = 0, removal: ChannelPruning | None = None
) -> Company:
    """The `penalty` of a step beside a training of `model`."""
    steps: tuple[Step, ...] = (step,) if removal is None else (step, removal)
    return Company(steps, lambda updates: penalty(step, model, updates, data, seed, removal))


def penalty(
    step: SparseTraining, model: Model, total: int, data: Data | None, seed: int, removal: ChannelPruning | None = None
) -> Penalty:
    """The penalty of a step on a model.

    Parameters
    ----------
    total : optimiser steps of the training.
    removal : the `ChannelPruning` that follows; ``growing`` penalises what it would remove.

    Raises
    ------
    SlimlineError : nothing to penalise, a glob that matches no layer, or ``growing`` without `removal`.
    """
    if step.of == "activations":
        nodes = chosen_relus(model.graph, step)
        if not nodes:
            raise SlimlineError("No ReLU is left to penalise: keep fewer of them.")
        return Penalty(step, total, [node.outputs[0] for node in nodes])
    weights = model.parameters()
    if step.penalty in ("l1", "l2"):
        layers, _ = chosen_layers(model, SparsePruning(amount=0.0, layers=step.layers, keep=step.keep))
        names = [name for name in layers if name in model.graph.learning]
        shrink = soft_threshold if step.penalty == "l1" else _ridge
        everywhere = dict.fromkeys(names, ...)
        return Shrinkage(step, total, weights, partial(_each, names, shrink), partial(_zeros, everywhere))
    units = Units(model.graph)
    if step.penalty == "growing":
        if removal is None:
            raise SlimlineError(
                "SparseTraining with penalty='growing' penalises what the next step removes: let ChannelPruning follow."
            )
        removed = plan_channels(model, removal, data, seed).removed
        groups = Groups.of(units, [u for u in units.units if u.name in removed], removed)
        return Shrinkage(step, total, weights, partial(_ridge_groups, groups), partial(_empty, groups))
    groups = Groups.of(units, eligible(units, step))
    if not groups.slots:
        reasons = "; ".join(f"{f.name}: {f.reason}" for f in units.frozen[:3]) or "no layer was left"
        raise SlimlineError(f"No unit can be penalised: {reasons}.")
    if step.penalty == "l0":
        return Gates(step, total, weights, groups, seed)
    if step.penalty == "batch_norm":
        scales = _scales(model, groups)
        return Shrinkage(step, total, weights, partial(_soft_scales, scales), partial(_zeros, scales))
    sizes = groups.sizes({name: weights[name].shape for name in groups.parameters})
    return Shrinkage(step, total, weights, partial(_lasso, groups, sizes), partial(_empty, groups))


def _ridge(weight: Array, amount: float) -> Array:
    return np.asarray(weight * ridge_factor(amount), weight.dtype)


def _each(names: Sequence[str], shrink: Callable[[Array, float], Array], weights: Weights, amount: float) -> Weights:
    return {name: shrink(weights[name], amount) for name in names}


def _scales(model: Model, groups: Groups) -> dict[str, Any]:
    """By name the batch-norm scales, and which of their positions are in groups."""
    every = {node.inputs[1] for node in model.graph.nodes if node.kind == "batch_norm"}
    scales = {s.parameter: (s.groups >= 0).any(axis=1) for s in groups.slots if s.parameter in every}
    if not scales:
        raise SlimlineError(
            "The batch_norm penalty finds no batch-norm scale behind these layers: use penalty='group_lasso'."
        )
    return scales


def _soft_scales(scales: Mapping[str, Array], weights: Weights, amount: float) -> Weights:
    return {n: np.where(at, soft_threshold(weights[n], amount), weights[n]) for n, at in scales.items()}


def _lasso(groups: Groups, sizes: Array, weights: Weights, amount: float) -> Weights:
    squares = _squares(groups, weights)
    amounts = amount * np.sqrt(sizes) * adaptive_weights(squares, sizes, groups.units)
    return groups.scaled(weights, group_factors(squares, amounts))


def _ridge_groups(groups: Groups, weights: Weights, amount: float) -> Weights:
    return groups.scaled(weights, np.full(groups.count, ridge_factor(amount)))


def _squares(groups: Groups, weights: Weights) -> Array:
    return groups.sums(lambda name, dim: slice_scores(weights[name], dim, "l2"))


def _empty(groups: Groups, weights: Weights) -> float:
    """The part of the groups that is zero."""
    return float(np.mean(_squares(groups, weights) == 0))


def _zeros(where: Mapping[str, Any], weights: Weights) -> float:
    """The part of the weights, of each of which only ``where``, that is zero."""
    picked = [weights[name][at] for name, at in where.items()]
    return float(np.mean(np.concatenate([w.ravel() == 0 for w in picked])))
