"""Pruning while a network trains: during recovery, in the user's own loop, killed and resumed."""

from __future__ import annotations

import numpy as np
import pytest

import slimline as sl
from slimline.basics.progress import Progress
from slimline.graph.matrix import matrices
from slimline.steps.sparse.gradual import gradual
from slimline.training.loop import recover
from tests import sparse_models as small

RECOVERY = sl.Distillation(epochs=3, batch_size=48, learning_rate=3e-3, refresh_batches=2)
GRADUAL = sl.SparsePruning(amount=0.8, schedule="polynomial", frequency=2, scope="erk")


@pytest.fixture(scope="module", params=["torch", "keras"])
def framework(request):
    pytest.importorskip({"torch": "torch", "keras": "tensorflow"}[request.param])
    return request.param


@pytest.fixture(scope="module")
def model(framework):
    return small.load(framework)


@pytest.fixture(scope="module")
def data(framework):
    return small.data(framework)


def part(model):
    stored = model.parameters()
    weights = [stored[layer.weight] for layer in matrices(model.graph)]
    return sum((w == 0).sum() for w in weights) / sum(w.size for w in weights)


@pytest.mark.parametrize(
    "fields",
    [
        {"schedule": "polynomial", "scope": "erk"},
        {"schedule": "constant", "regrow": 0.3},
        {"schedule": "acdc", "frequency": 2, "scope": "global"},
        {"schedule": "exponential", "criterion": "taylor", "frequency": 3},
        {"schedule": "iterative", "rounds": 2, "criterion": "obs", "compensate": True},
    ],
    ids=["cubic", "rigl", "acdc", "taylor", "iterative"],
)
def test_schedules_end_at_the_amount(model, data, fields):
    recovery = RECOVERY.model_copy(update={"epochs": 2})
    found = sl.apply(model, [sl.SparsePruning(amount=0.8, **fields), recovery], data)
    masks = np.concatenate([mask.ravel() for mask in found.masks.values()])
    assert 1 - masks.mean() == pytest.approx(0.8, abs=0.01)
    for name, mask in found.masks.items():
        assert not found.parameters()[name][~mask].any()
    assert [h["step"] for h in found.history] == ["SparsePruning", "Distillation"]


def test_only_epochs_that_are_pruned_can_be_the_best(model, data):
    step = GRADUAL.model_copy(update={"end": 0.6})
    found = recover(model, model, RECOVERY.model_copy(update={"patience": 1}), data, 0, company=gradual(step, model))
    assert [r["pruned"] for r in found.records][:2] == [False, False]
    assert found.records[found.best_epoch]["pruned"]
    assert found.records[found.best_epoch]["sparsity"] == pytest.approx(0.8, abs=0.01)
    assert part(found.model) == pytest.approx(0.8, abs=0.01)


def test_a_stopped_pruning_ends_as_an_undisturbed_one_to_the_bit(model, data, tmp_path):
    step = sl.SparsePruning(amount=0.8, schedule="constant", regrow=0.4, frequency=2, end=0.9)

    def run(checkpoint=None, stop=None):
        def progress(now: Progress):
            if now.done == stop:
                raise KeyboardInterrupt

        return recover(model, model, RECOVERY, data, 7, checkpoint, progress, gradual(step, model, 7))

    for stop in (2, 7):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, stop)
    resumed, whole = run(tmp_path), run()
    assert [r["score"] for r in resumed.records] == [r["score"] for r in whole.records]
    for name, array in whole.model.parameters().items():
        np.testing.assert_array_equal(resumed.model.parameters()[name], array)
    for name, mask in whole.model.masks.items():
        np.testing.assert_array_equal(resumed.model.masks[name], mask)


def test_a_trainer_holds_what_it_is_told_and_its_momentum(model, data):
    batch = next(data.split("train").batches(40))
    for optimizer in ("adamw", "sgd"):
        step = sl.Distillation(optimizer=optimizer, batch_size=40, alpha=0.5)
        trainer = model.adapter.trainer(model.native, model.native, step, 0, 10)
        trainer.step(batch, 1e-2)
        rng = np.random.default_rng(0)
        names = [layer.weight for layer in matrices(model.graph)]
        masks = {name: rng.random(model.parameters()[name].shape) < 0.5 for name in names}
        trainer.hold(masks)
        for _ in range(2):
            trainer.step(batch, 1e-2)
        assert all(not trainer.weights()[n][~m].any() for n, m in masks.items())
        dense = trainer.gradients(batch)
        assert all(np.abs(dense[n][~m]).max() > 0 for n, m in masks.items())
        trainer.hold({n: np.ones_like(m) for n, m in masks.items()})
        before = trainer.weights()
        trainer.step(batch, 0.0)  # momentum that was left would need a rate to show
        trainer.step(batch, 1e-6)
        moved = {n: np.abs(trainer.weights()[n] - before[n])[~m].max() for n, m in masks.items()}
        assert all(0 < v < 1e-3 for v in moved.values())


def test_gradients_of_the_trainer_are_those_of_the_loss(model, data):
    batch = next(data.split("train").batches(40))
    trainer = model.adapter.trainer(model.native, None, sl.Distillation(), 0, 10)
    found = trainer.gradients(batch)
    expected = model.adapter.gradients(model.native, [batch], "cross_entropy")
    for layer in matrices(model.graph):
        np.testing.assert_allclose(found[layer.weight], expected[layer.weight], atol=1e-6, rtol=1e-3)


@pytest.mark.usefixtures("no_clock")
def test_runs_prune_gradually_and_report_it(model, data, tmp_path, framework):
    target = "onnxruntime" if framework == "torch" else "litert"
    if framework == "keras":
        pytest.importorskip("ai_edge_litert")
    recovery = RECOVERY.model_copy(update={"epochs": 1})
    run = sl.compress(
        model, data, target, sl.Budget(max_drop=None), [GRADUAL, recovery], tmp_path / "run", batch_sizes=(2,)
    )
    assert run.model.masks
    assert part(run.model) == pytest.approx(0.8, abs=0.01)
    rows = {row.layer: row for row in run.report.layers}
    assert rows["7"].after.sparsity > 0.5
    assert rows["7"].before.sparsity == 0
