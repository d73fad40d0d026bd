"""Settings of training, in both frameworks: gradients in parts and clipped, means of weights, views."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import slimline as sl
from slimline.steps.base import handler_of
from slimline.training import views
from slimline.training.loop import paces, recover
from tests.test_features import FRAMEWORKS, LABELS, convolutional, images


def change(framework: str, **fields: Any) -> dict[str, np.ndarray]:
    """What a step of plain gradient descent at rate 1 subtracts from the weights."""
    student, teacher, x = convolutional(framework, 3), convolutional(framework, 5, 1), images(framework)
    step = sl.Distillation(optimizer="sgd", momentum=0.0, weight_decay=0.0, **fields)
    trainer = student.adapter.trainer(student.native, teacher.native, step, 0, 1)
    before = trainer.weights()
    trainer.step(((x,), LABELS), 1.0)
    return {name: before[name] - after for name, after in trainer.weights().items()}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_parts_of_a_batch_add_up_and_large_gradients_are_scaled(framework: str) -> None:
    whole = change(framework)
    norm = np.sqrt(sum(np.sum(g**2) for g in whole.values()))
    assert norm > 0.01
    for name, part in change(framework, accumulate=5).items():
        np.testing.assert_allclose(part, whole[name], atol=1e-6)
    for name, clipped in change(framework, clip=float(norm) / 4).items():
        np.testing.assert_allclose(clipped, whole[name] / 4, atol=1e-6)
    for name, same in change(framework, clip=float(norm) * 2, accumulate=2).items():
        np.testing.assert_allclose(same, whole[name], atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_layers_learn_at_their_own_rates(framework: str, optimizer: str) -> None:
    """A factor for all is the same as another rate, step by step, moments and decay included; 0 leaves a layer."""
    student, teacher, x = convolutional(framework, 3), convolutional(framework, 5, 1), images(framework)

    def trained(rate: float, **rates: float) -> dict[str, np.ndarray]:
        step = sl.Distillation(optimizer=optimizer, weight_decay=0.1, rates=rates)
        trainer = student.adapter.trainer(student.native, teacher.native, step, 0, 3)
        trainer.pace(paces(student, step))
        for _ in range(3):
            trainer.step(((x,), LABELS), rate)
        return trainer.weights()

    whole, half = trained(0.02, **{"*": 0.5}), trained(0.01)
    for name, array in whole.items():
        np.testing.assert_allclose(array, half[name], atol=1e-6)
    stays = paces(student, sl.Distillation(rates={"head": 0.0}))
    own, before = trained(0.01, **{"head": 0.0, "*": 1.0}), student.parameters()
    assert len(stays) == 2 < len(own)
    for name, array in own.items():
        assert np.array_equal(array, before[name]) == (name in stays), name


def test_rates_reach_an_onnx_model(tmp_path: Any) -> None:
    onnx = sl.load(sl.export(convolutional("torch", 3), "onnxruntime", tmp_path), images("torch")[:2])
    x, teacher = images("torch"), sl.load(sl.export(convolutional("torch", 5, 1), "onnxruntime", tmp_path / "t"))
    data = sl.Data(train=(x, LABELS), selection=(x[:8], LABELS[:8]), test=(x, LABELS), overlap="allow")
    (head,) = {n.layer for n in onnx.graph.nodes if n.kind == "linear"}
    step = sl.Distillation(epochs=2, rates={str(head): 0.0, "type:conv": 0.1})
    trained = sl.apply(onnx, step, data, teacher=teacher)
    still = paces(onnx, step)
    assert set(still.values()) == {0.0, 0.1}
    for name in (name for name, factor in still.items() if not factor):
        np.testing.assert_array_equal(trained.parameters()[name], onnx.parameters()[name])
    with pytest.raises(sl.SlimlineError, match="no layer with weights for rates 'nowhere'"):
        sl.apply(onnx, sl.Distillation(rates={"nowhere": 0.5}), data, teacher=teacher)


@pytest.mark.parametrize("kind", [sl.Distillation, sl.SparseTraining, sl.QuantizationAwareTraining])
def test_rates_of_no_layer_are_refused_before_work(kind: Any) -> None:
    model, step = convolutional("torch", 3), kind(rates={"nowhere": 0.5})
    with pytest.raises(sl.SlimlineError, match="no layer with weights for rates 'nowhere'"):
        handler_of(step).check(step, model, ())


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_what_stays_is_the_mean_of_the_weights(framework: str, tmp_path: Any) -> None:
    student, teacher, x = convolutional(framework, 3), convolutional(framework, 5, 1), images(framework)
    data = sl.Data(train=(x, LABELS), selection=(x[:8], LABELS[:8]), test=(x, LABELS), overlap="allow")
    fields = {"epochs": 1, "batch_size": 12, "learning_rate": 0.1, "optimizer": "sgd", "schedule": "constant"}
    step = sl.Distillation(ema=0.5, warmup=0, **fields)
    taken: list[dict[str, np.ndarray]] = []
    trainer_of = student.adapter.trainer

    class Watched:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def step(self, batch: Any, rate: float) -> float:
            loss: float = self.inner.step(batch, rate)
            taken.append(self.inner.weights())
            return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(student.adapter), "trainer", lambda self, *args: Watched(trainer_of(*args)))
        trained = recover(student, teacher, step, data, 0, tmp_path)
    mean = taken[0]
    for number, weights in enumerate(taken[1:], 1):
        decay = min(0.5, (1 + number) / (10 + number))
        mean = {name: decay * mean[name] + (1 - decay) * weights[name] for name in mean}
    if trained.best_epoch == 1:
        for name, array in trained.model.parameters().items():
            np.testing.assert_allclose(array, mean[name], atol=1e-6)
    resumed = recover(student, teacher, step.model_copy(), data, 0, tmp_path)
    np.testing.assert_array_equal(resumed.model.predict(x), trained.model.predict(x))
    with pytest.raises(sl.SlimlineError, match="would undo what SparsePruning does"):
        sl.apply(student, [sl.SparsePruning(amount=0.5, schedule="polynomial"), step], data, teacher=teacher)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_teacher_and_student_see_the_same_view(framework: str) -> None:
    """A teacher that is the student has nothing to teach, whatever both see."""
    model, x = convolutional(framework, 3), images(framework)
    data = sl.Data(train=x, selection=x[:8], test=x, overlap="allow")
    view = sl.View(flip=True, shift=1, crop=0.5, erase=0.4, noise=0.1, mixup=1.0)
    step = sl.Distillation(alpha=1, epochs=1, batch_size=12, weight_decay=0, view=view)
    assert recover(model, model, step, data, 0).records[1]["loss"] == pytest.approx(0, abs=1e-6)
    first = framework == "torch"
    seen = views.seen(view, ((x,), LABELS), first, np.random.default_rng(1))
    again = views.seen(view, ((x,), LABELS), first, np.random.default_rng(1))
    np.testing.assert_array_equal(seen[0][0], again[0][0])
    assert seen[0][0].shape == x.shape and (seen[0][0] != x).any() and seen[1] is LABELS
    other = np.moveaxis(x, 1, -1) if first else np.moveaxis(x, -1, 1)
    turned = views.seen(view, ((other,), LABELS), not first, np.random.default_rng(1))[0][0]
    np.testing.assert_allclose(np.moveaxis(turned, -1, 1) if first else np.moveaxis(turned, 1, -1), seen[0][0])


@pytest.mark.parametrize(
    ("view", "example", "alpha", "sentence"),
    [
        ({"flip": True}, np.zeros((2, 5), "f"), 1, "no input is one"),
        ({"erase": 0.3}, np.zeros((2, 5), "f"), 1, "no input is one"),
        ({"shift": 3}, np.zeros((2, 1, 6, 6), "f"), 1, "shift them by less"),
        ({"noise": 0.1}, np.zeros((2, 5), int), 1, "an input is int64"),
        ({"mixup": 1.0}, np.zeros((2, 5), "f"), 0.9, "Mixed samples have no labels"),
        ({"flip": True}, np.zeros((2, 1, 6, 6), "f"), 0.9, "labels have a place in them"),
    ],
)
def test_a_view_that_the_inputs_do_not_allow(view: Any, example: np.ndarray, alpha: float, sentence: str) -> None:
    with pytest.raises(sl.SlimlineError, match=sentence):
        views.check(sl.Distillation(view=view, alpha=alpha), (example,), np.zeros((2, 6, 6), int))


def test_views_and_labels_that_go_together() -> None:
    image, view = np.zeros((2, 1, 6, 6), np.float32), {"flip": True, "shift": 1, "crop": 0.5}
    views.check(sl.Distillation(view=view, alpha=0.5), (image,), np.zeros(2, int))  # a class is where it likes
    views.check(sl.Distillation(view={"erase": 0.3}, alpha=0.5), (image,), np.zeros((2, 6, 6), int))  # nothing moves
    views.check(sl.Distillation(view=view, alpha=1), (image,), np.zeros((2, 6, 6), int))  # which nobody learns
