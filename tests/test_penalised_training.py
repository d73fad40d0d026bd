"""SparseTraining on the handwritten digits: what it makes small can go, in both frameworks, killed and resumed too."""

from __future__ import annotations

import numpy as np
import pytest

import slimline as sl
from slimline.basics.progress import Progress
from slimline.frameworks.base import Term
from slimline.graph.matrix import matrices
from slimline.steps.activations.plan import observed, relus
from slimline.steps.sparse_training.penalties import penalised
from slimline.training.loop import recover
from tests import recovery_job as job
from tests import sparse_models as small

SHORT = {"epochs": 2, "batch_size": 48, "learning_rate": 3e-3, "refresh_batches": 2}
SGD = {"optimizer": "sgd", "learning_rate": 0.05, "alpha": 0.0, "batch_size": 48, "epochs": 4}


@pytest.fixture(scope="module", params=["torch", "keras"])
def framework(request):
    pytest.importorskip({"torch": "torch", "keras": "tensorflow"}[request.param])
    return request.param


@pytest.fixture(scope="module")
def data(framework):
    return job.digits(framework, samples=1200)


@pytest.fixture(scope="module")
def trained(framework, data):
    blank = job.model(framework, 1)
    step = sl.Distillation(epochs=6, alpha=0.0, learning_rate=5e-3, batch_size=48)
    return recover(blank, blank, step, data, 0).model


def accuracy(model, data):
    split = data.split("selection")
    return float((model.predict(*split.inputs).argmax(-1) == split.labels).mean())


@pytest.mark.parametrize(
    ("criterion", "fields"),
    [
        ("l2", {"penalty": "group_lasso", "strength": 0.02}),
        ("batch_norm", {"penalty": "batch_norm", "strength": 0.1}),
        ("l2", {"penalty": "growing", "strength": 20.0, "growth": 0.5}),
    ],
    ids=["group_lasso", "batch_norm", "growing"],
)
def test_what_was_penalised_can_go(trained, data, criterion, fields):
    cut = sl.ChannelPruning(ratio=0.3, scope="global", criterion=criterion)
    step = sl.SparseTraining(**SGD, **fields)
    found = recover(trained, trained, step, data, 0, company=penalised(step, trained, data, 0, cut))
    pruned = sl.apply(found.model, cut, data)
    assert pruned.graph.size < 0.8 * trained.graph.size
    assert accuracy(pruned, data) > accuracy(trained, data) - 0.05
    assert accuracy(pruned, data) >= accuracy(sl.apply(trained, cut, data), data)
    if fields["penalty"] == "growing":
        assert sl.plan(found.model, cut).removed == sl.plan(trained, cut).removed
    else:
        assert found.records[-1]["sparsity"] > 0.1


def test_closed_gates_are_zeros_that_go_without_loss(trained, data):
    step = sl.SparseTraining(penalty="l0", strength=3.0, gate_rate=0.2, alpha=0.0, epochs=4, batch_size=48)
    found = recover(trained, trained, step, data, 0, company=penalised(step, trained, data))
    part = found.records[-1]["sparsity"]
    assert part > 0.1
    cut = sl.plan(found.model, sl.ChannelPruning(ratio=part, scope="global"), data)
    pruned = cut.apply(found.model)
    x = data.split("selection").inputs[0]
    np.testing.assert_allclose(pruned.predict(x), found.model.predict(x), atol=1e-4)
    assert accuracy(found.model, data) > accuracy(trained, data) - 0.05


def test_l1_makes_zeros_that_cost_little(trained, data):
    sparse = sl.apply(trained, sl.SparseTraining(penalty="l1", strength=0.006, **SGD), data)
    cut = sl.SparsePruning(amount=0.8, scope="global")
    weights = [sparse.parameters()[layer.weight].ravel() for layer in matrices(sparse.graph)]
    assert np.mean(np.concatenate(weights) == 0) > 0.5
    assert accuracy(sl.apply(sparse, cut), data) > accuracy(trained, data) - 0.05
    assert accuracy(sl.apply(sparse, cut), data) > accuracy(sl.apply(trained, cut), data) + 0.1


@pytest.mark.parametrize("penalty", ["l1", "l0"])
def test_penalised_activations_become_zero(trained, data, penalty):
    step = sl.SparseTraining(of="activations", penalty=penalty, alpha=0.0, epochs=4, batch_size=48, learning_rate=3e-3)
    found = sl.apply(trained, step, data)
    names = [node.outputs[0] for node in relus(trained.graph)]
    before, after = (observed(model, names, data, 256) for model in (trained, found))
    zeros = [np.mean(np.concatenate(list(seen.values())) == 0) for seen in (before, after)]
    assert len(names) == 2
    assert zeros[1] > zeros[0] + 0.03
    assert accuracy(found, data) > accuracy(trained, data) - 0.03


@pytest.mark.parametrize("penalty", ["group_lasso", "l0"])
def test_a_stopped_training_ends_as_an_undisturbed_one_to_the_bit(framework, trained, penalty, tmp_path):
    fields = {**SHORT, "optimizer": "sgd"} if penalty == "group_lasso" else SHORT
    step, data = sl.SparseTraining(penalty=penalty, strength=3.0, growth=0.5, **fields), job.data(framework)

    def run(checkpoint=None, stop=None):
        def progress(now: Progress):
            assert now.what == "sparse training"
            if now.done == stop:
                raise KeyboardInterrupt

        return recover(trained, trained, step, data, 7, checkpoint, progress, penalised(step, trained, data, 7))

    for stop in (2, 7):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, stop)
    resumed, whole = run(tmp_path), run()
    strip = [[{k: v for k, v in r.items() if k != "seconds"} for r in found.records] for found in (resumed, whole)]
    assert strip[0] == strip[1]
    assert whole.best_epoch == 2
    assert [r["pruned"] for r in whole.records] == [False, False, True]
    for name, array in whole.model.parameters().items():
        np.testing.assert_array_equal(resumed.model.parameters()[name], array)


def test_the_slopes_of_a_step_are_its_gradients(framework):
    model = small.load(framework)
    batch = next(small.data(framework).split("train").batches(40))
    trainer = model.adapter.trainer(model.native, None, sl.SparseTraining(), 0, 10)
    weights = {name: array + 0.01 for name, array in trainer.weights().items()}
    trainer.set_weights(weights)
    for name, array in trainer.weights().items():
        np.testing.assert_array_equal(array, weights[name])
    loss = trainer.step(batch, 0.0)
    slopes = trainer.slopes()
    # There is no dropout, so the loss of a step is a function of the weights.
    name = "9.weight" if framework == "torch" else "9/kernel"
    at = np.unravel_index(np.abs(slopes[name]).argmax(), slopes[name].shape)
    moved = np.array(weights[name])
    moved[at] += 1e-2
    trainer.set_weights({name: moved})
    assert (trainer.step(batch, 0.0) - loss) / 1e-2 == pytest.approx(slopes[name][at], rel=0.05)


def test_a_term_of_the_loss_is_the_mean_over_its_activations(framework):
    model = small.load(framework)
    batch = next(small.data(framework).split("train").batches(40))
    names = [node.outputs[0] for node in relus(model.graph)]
    losses, seen = [], {}
    for strength in (None, 2.0):
        trainer = model.adapter.trainer(model.native, None, sl.SparseTraining(), 0, 10)
        if strength is not None:
            trainer.add(Term.mean(names, lambda xp, a: xp.mean(xp.abs(a)), strength))
        trainer.refresh([batch])
        if strength is None:
            native = trainer.native()  # with the statistics that training mode has
            model.adapter.observe(native, [batch[0]], names, lambda n, x: seen.update({n: float(np.abs(x).mean())}))
        losses.append(trainer.step(batch, 0.0))
    assert len(names) == 3
    assert losses[1] - losses[0] == pytest.approx(2 * np.mean(list(seen.values())), rel=1e-3)


def test_masks_hold_while_units_are_penalised(framework, trained):
    steps = [
        sl.SparsePruning(amount=0.5),
        sl.SparseTraining(penalty="l0", **SHORT),
        sl.SparseTraining(penalty="l2", **SHORT),
    ]
    found = sl.apply(trained, steps, job.data(framework))
    assert found.masks
    for name, mask in found.masks.items():
        assert not found.parameters()[name][~mask].any()


def test_data_without_labels_trains_towards_the_original(framework, trained):
    data = job.digits(framework, labels=False, samples=300)
    step = sl.SparseTraining(alpha=0.0, strength=0.1, **SHORT)
    found = recover(trained, trained, step, data, 0, company=penalised(step, trained, data))
    assert found.records[-1]["score"] > 0.9  # classed as the original does
    assert found.records[-1]["loss"] < 0.5


def test_a_penalty_that_destroys_the_network_is_warned_of(framework, trained, data, caplog):
    step = sl.SparseTraining(strength=300.0, alpha=0.0, epochs=1, batch_size=200)
    found = recover(trained, trained, step, data, 0, company=penalised(step, trained, data))
    assert found.records[-1]["sparsity"] > 0.5
    assert "lower its strength" in caplog.text


def test_relus_that_overwrite_their_input_are_seen_in_low_precision_too():
    pytest.importorskip("torch")
    from torch import nn

    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(inplace=True), nn.Linear(32, 10))
    model, data = sl.load(net.eval(), np.zeros((2, 1, 8, 8), np.float32)), job.digits("torch", samples=400)
    kept = []
    for strength in (1e-6, 30.0):
        step = sl.SparseTraining(
            of="activations", penalty="l1", strength=strength, epochs=2, learning_rate=1e-2, precision="bfloat16"
        )
        trained = sl.apply(model, step, data)
        name = relus(model.graph)[0].outputs[0]
        kept.append(float(np.mean(observed(trained, [name], data, 256)[name])))
    assert kept[1] < 0.5 * kept[0]
