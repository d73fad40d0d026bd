"""Penalties around a trainer whose arithmetic is written down."""

from __future__ import annotations

import numpy as np
import pytest

import slimline as sl
from slimline.basics.errors import SlimlineError
from slimline.graph.groups import Groups, Slot
from slimline.methods import gates
from slimline.steps.sparse_training.penalties import Gates, penalty
from tests import sparse_models as small

_drawn = np.random.default_rng(0)
X, Y = _drawn.normal(size=(40, 4)), _drawn.normal(size=(40, 2))
BATCH = ((X,), Y)


class TwoLayers:
    """``y = (x Aᵀ) Bᵀ`` under plain gradient descent on half the mean squared error, in float64."""

    def __init__(self, hidden: int = 3, seed: int = 0) -> None:
        rng = np.random.default_rng([1, seed])
        self.wanted = Y
        self.arrays = {"a": rng.normal(size=(hidden, 4)), "b": rng.normal(size=(2, hidden))}
        self.found: dict[str, np.ndarray] = {}

    def loss(self) -> float:
        return 0.5 * float(np.square(X @ self.arrays["a"].T @ self.arrays["b"].T - self.wanted).sum()) / len(X)

    def step(self, rate: float) -> None:
        hidden = X @ self.arrays["a"].T
        error = (hidden @ self.arrays["b"].T - self.wanted) / len(X)
        self.found = {"a": (error @ self.arrays["b"]).T @ X, "b": error.T @ hidden}
        self.arrays = {name: array - rate * self.found[name] for name, array in self.arrays.items()}

    def weights(self):
        return {name: np.array(array) for name, array in self.arrays.items()}

    def set_weights(self, weights):
        self.arrays = {**self.arrays, **weights}

    def slopes(self):
        return self.found


class Noted:
    """An optimiser that notes what it is given, and does nothing."""

    def step(self, gradient, rate):
        self.gradient, self.rate = gradient, rate
        return np.zeros_like(gradient)


def gated(trainer: TwoLayers, **fields) -> Gates:
    index = np.arange(3)[:, None]
    groups = Groups(np.zeros(3, int), (Slot("a", 0, index), Slot("b", 1, index)))
    return Gates(sl.SparseTraining(penalty="l0", **fields), 10, trainer.weights(), groups, 0)


def test_the_slope_of_a_gate_is_a_difference_of_the_penalised_loss():
    trainer = TwoLayers()
    found = gated(trainer, strength=0.7)
    found.parameters = np.array([0.3, -0.5, 0.8])
    found.optimizer = Noted()
    full = trainer.weights()
    found.before(trainer)
    uniform = found._uniform

    def value(parameters: np.ndarray) -> float:
        z = gates.sampled(parameters, uniform)
        trainer.arrays = {"a": full["a"] * z[:, None], "b": full["b"] * z}
        return trainer.loss() + 0.7 * float(np.mean(gates.open_probability(parameters)))

    h = 1e-6
    expected = [(value(found.parameters + h * e) - value(found.parameters - h * e)) / (2 * h) for e in np.eye(3)]
    trainer.set_weights(found._gated)
    trainer.step(1e-3)
    found.after(trainer, 1e-3, BATCH)
    assert any(0 < z < 1 for z in gates.sampled(found.parameters, uniform))
    np.testing.assert_allclose(found.optimizer.gradient, expected, rtol=1e-5, atol=1e-8)
    assert found.optimizer.rate == pytest.approx(found.step.gate_rate)


def test_gated_weights_move_by_the_chain_rule():
    trainer = TwoLayers()
    found = gated(trainer)
    found.optimizer = Noted()
    full = trainer.weights()
    found.before(trainer)
    z = gates.sampled(found.parameters, found._uniform)
    trainer.step(0.1)
    found.after(trainer, 0.1, BATCH)
    np.testing.assert_allclose(found.open["a"], full["a"] - 0.1 * z[:, None] * trainer.found["a"], rtol=1e-9)
    np.testing.assert_allclose(found.open["b"], full["b"] - 0.1 * z * trainer.found["b"], rtol=1e-9)
    np.testing.assert_allclose(trainer.arrays["a"], found.open["a"])  # all gates are open when they are not random


@pytest.mark.parametrize("seed", [1, 3, 6])
def test_a_worthless_position_is_gated_away_and_a_needed_one_is_not(seed):
    trainer = TwoLayers(seed=seed)
    trainer.wanted = X @ trainer.arrays["a"][:2].T @ trainer.arrays["b"][:, :2].T  # the third position is not needed
    parts = [X @ trainer.arrays["a"][[i]].T @ trainer.arrays["b"][:, [i]].T for i in (0, 1)]
    assert all(0.5 * np.square(part).sum() / len(X) > 0.5 / 3 for part in parts)  # and either other is worth its gate
    trainer.arrays["b"][:, 2] *= 0.05
    found = gated(trainer, strength=0.5, gate_rate=0.1)
    found.total = 600
    for _ in range(found.total):
        found.before(trainer)
        trainer.step(0.02)
        found.after(trainer, 1e-3, BATCH)
    assert found.complete
    assert found.sparsity == pytest.approx(1 / 3)
    assert not trainer.arrays["a"][2].any()
    assert not trainer.arrays["b"][:, 2].any()
    assert trainer.loss() < 1e-5


@pytest.fixture(scope="module")
def model():
    return small.load("torch")


class Still:
    """A trainer whose steps change nothing."""

    def __init__(self, model):
        self.arrays = {name: model.parameters()[name] for name in model.graph.trainable}

    def weights(self):
        return dict(self.arrays)

    def set_weights(self, weights):
        self.arrays = {**self.arrays, **weights}


@pytest.mark.parametrize("optimizer", [{}, {"optimizer": "sgd", "momentum": 0.5}], ids=["adamw", "sgd"])
def test_l1_takes_the_rate_times_the_strength_and_with_momentum_what_is_left_of_it(model, optimizer):
    trainer = Still(model)
    before = trainer.weights()
    step = sl.SparseTraining(penalty="l1", strength=0.5, layers=("7",), growth=0.5, **optimizer)
    found = penalty(step, model, 10, None, 0)
    found.after(trainer, 0.02, BATCH)  # a tenth of the training: a fifth of the strength
    found.after(trainer, 0.01, BATCH)
    first, second = 0.02 * 0.5 / 5, 0.01 * 0.5 * 2 / 5
    taken = first + second + (first / 2 if optimizer else 0)
    new = np.sign(before["7.weight"]) * np.maximum(np.abs(before["7.weight"]) - taken, 0)
    np.testing.assert_allclose(trainer.arrays["7.weight"], new, atol=1e-7)
    assert found.sparsity == np.mean(trainer.arrays["7.weight"] == 0)
    assert all((trainer.arrays[name] == array).all() for name, array in before.items() if name != "7.weight")


def test_growing_shrinks_what_the_next_step_removes_and_nothing_else(model):
    cut = sl.ChannelPruning(ratio=0.5, criterion="l1")
    removed = sl.plan(model, cut)
    trainer = Still(model)
    before = trainer.weights()
    found = penalty(sl.SparseTraining(penalty="growing"), model, 4, None, 0, cut)
    strengths = []
    for _ in range(4):
        strengths.append(found.strength)
        found.after(trainer, 1e-3, BATCH)
    assert strengths == pytest.approx([1000 / 3, 2000 / 3, 1000, 1000])
    factor = float(np.prod([1 / (1 + 1e-3 * s) for s in strengths]))
    for name, array in before.items():
        stays = np.ones(array.shape, bool)
        for dim, kept in enumerate(removed.retained(name)):
            if kept is not None:
                stays &= np.isin(np.arange(array.shape[dim]), kept).reshape(
                    [-1 if d == dim else 1 for d in range(array.ndim)]
                )
        np.testing.assert_array_equal(trainer.arrays[name][stays], array[stays])
        changed = trainer.arrays[name][~stays]
        assert (np.abs(changed) <= factor * np.abs(array[~stays]) * 1.001).all()
    assert np.array_equal(sl.plan(model, cut).removed, removed.removed)


def test_batch_norm_shrinks_scales_alone(model):
    trainer = Still(model)
    before = trainer.weights()
    found = penalty(sl.SparseTraining(penalty="batch_norm", strength=1.0), model, 10, None, 0)
    found.after(trainer, 0.25, BATCH)
    scales = {"1.weight", "4.weight"}
    for name, array in before.items():
        np.testing.assert_allclose(trainer.arrays[name], array - 0.25 if name in scales else array)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"layers": ("7a",)}, "There is no layer for layers '7a'"),
        ({"penalty": "l1", "layers": ("nothing",)}, "There is no layer with a weight matrix for layers 'nothing'"),
        ({"layers": ("9",)}, r"9 \(o\) cannot be pruned: the model's output"),
        ({"keep": ("*",)}, "No unit can be penalised"),
        ({"penalty": "batch_norm", "layers": ("7",)}, "finds no batch-norm scale behind these layers"),
        ({"penalty": "growing"}, "let ChannelPruning follow"),
        ({"of": "activations", "penalty": "l1", "layers": ("relu_7",)}, "There is no ReLU for layers 'relu_7'"),
        ({"of": "activations", "penalty": "l1", "keep": ("*",)}, "No ReLU is left to penalise"),
    ],
)
def test_what_cannot_be_penalised_is_said(model, fields, said):
    with pytest.raises(SlimlineError, match=said):
        penalty(sl.SparseTraining(**fields), model, 10, None, 0)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"penalty": "l3"}, "There is no SparseTraining with penalty 'l3'"),
        ({"strength": 0}, "strength of SparseTraining is 0 but must be greater than 0"),
        ({"growth": 1.5}, "growth of SparseTraining is 1.5 but must be less than or equal to 1"),
        ({"epochs": 0}, "epochs of SparseTraining is 0"),
        ({"patience": 3}, "There is no field in SparseTraining called 'patience'"),
        ({"of": "activations"}, "takes penalty='l1' or 'l0', not 'group_lasso'"),
        ({"of": "activations", "penalty": "l1", "growth": 0.5}, "has a constant strength: drop growth"),
        ({"of": "activations", "penalty": "l1", "axes": ("mlp",)}, "of activations has no axes"),
        ({"penalty": "l1", "axes": ("mlp",)}, "of single weights has no axes"),
        ({"penalty": "growing", "keep": ("a",)}, "give them to the ChannelPruning that follows"),
        ({"optimizer": "sgd"}, "with optimizer='sgd' needs a strength"),
    ],
)
def test_settings_that_do_not_fit_are_refused(fields, said):
    with pytest.raises(SlimlineError, match=said):
        sl.SparseTraining(**fields)


def test_the_order_of_steps():
    from slimline.recipe import check_order

    growing = sl.SparseTraining(penalty="growing")
    check_order([growing, sl.ChannelPruning(ratio=0.5), sl.Distillation()])
    check_order([sl.SparseTraining()])
    for after in ([], [sl.Distillation()], [sl.SparsePruning(amount=0.5)]):
        with pytest.raises(SlimlineError, match="let ChannelPruning follow"):
            check_order([growing, *after])
    with pytest.raises(SlimlineError, match="SparseTraining cannot follow StaticQuantization"):
        check_order([sl.StaticQuantization(), sl.SparseTraining()])
