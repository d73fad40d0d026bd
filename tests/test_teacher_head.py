"""Students that end as their teacher does (SimKD), in every framework."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slimline as sl
from slimline.recipe.recipe import parse
from slimline.steps.base import Context, handler_of
from slimline.steps.teacher_head.head import head_of
from slimline.training.features import terms
from slimline.training.loop import described, recover
from tests import recovery_job as job
from tests.test_features import LABELS, convolutional, images, observed

HEAD = sl.TeacherHead()


def ended(student: sl.Model, teacher: sl.Model, data: sl.Data) -> sl.Model:
    return handler_of(HEAD).perform(HEAD, student, Context(teacher, data, "")).model


@pytest.mark.parametrize("framework", ["torch", "keras", "onnx"])
def test_a_student_learns_what_its_teachers_head_reads(framework: str, tmp_path: Path) -> None:
    data = job.digits(framework, samples=900)
    teacher = recover(
        job.model(framework, 0), None, sl.Distillation(epochs=4, alpha=0.0, learning_rate=3e-3), data, 0
    ).model
    student = sl.apply(job.model(framework, 1), sl.ChannelPruning(ratio=0.5))
    begun = ended(student, teacher, data)
    x, y = data.split("train").inputs[0], data.split("train").labels
    old, new, source = head_of(student, ""), head_of(begun, ""), head_of(teacher, "")
    stored, taught = begun.parameters(), teacher.parameters()
    np.testing.assert_array_equal(new.matrix(stored[new.weight]), source.matrix(taught[source.weight]))

    # By hand: the projector on what the student's own head read, and the teacher's head.
    (value,) = observed(student, (old.input,), x[:8])
    linear = [each for each in _linear(begun) if each.layer.startswith(f"{old.layer}.")]
    for position, layer in enumerate(linear):
        value = value @ layer.matrix(stored[layer.weight])[0].T + stored[layer.bias].ravel()
        value = np.maximum(value, 0) if position < 3 else value
    answer = begun.predict(x[:8])
    expected = np.exp(value) / np.exp(value).sum(1, keepdims=True) if framework == "keras" else value
    np.testing.assert_allclose(answer, expected, rtol=1e-3, atol=1e-4)

    outputs = {student.output_names[0]: 0.0}
    step = sl.Distillation(features=["simkd"], epochs=6, learning_rate=5e-3, batch_size=32, output_weights=outputs)
    trained = sl.apply(student, [HEAD, step], data, teacher=teacher)
    after = trained.parameters()
    np.testing.assert_array_equal(new.matrix(after[new.weight]), source.matrix(taught[source.weight]))
    np.testing.assert_array_equal(after[new.bias].ravel(), taught[source.bias].ravel())
    assert [entry["step"] for entry in trained.history][-2:] == ["TeacherHead", "Distillation"]
    right = [(model.predict(x).argmax(1) == y).mean() for model in (begun, trained, teacher)]
    assert right[0] < 0.5 and right[1] > 0.8 and right[2] > 0.9  # 0.93 of 0.97
    again = sl.load(trained.save(tmp_path / f"small{trained.adapter.suffix}"))
    np.testing.assert_allclose(again.predict(x[:9]), trained.predict(x[:9]), atol=1e-6)
    sl.export(trained, "onnxruntime", tmp_path / "artifact")


@pytest.mark.parametrize("framework", ["torch", "keras"])
def test_the_loss_is_the_distance_of_what_both_heads_read(framework: str) -> None:
    student, teacher, x = convolutional(framework, 3), convolutional(framework, 5, 1), images(framework)
    data = sl.Data(train=(x, LABELS), test=(x, LABELS), overlap="allow")
    begun = ended(student, teacher, data)
    outputs = {begun.output_names[0]: 0.0}
    step = sl.Distillation(features=[{"loss": "simkd", "weight": 2.0}], output_weights=outputs)
    (term,) = terms(step, begun, (teacher,), 0)
    pair = [observed(model, names, x)[0] for model, names in ((begun, term.students), (teacher, term.teachers))]
    expected = 2 * ((pair[0] - pair[1]) ** 2).mean()
    trainer = begun.adapter.trainer(begun.native, teacher.native, step, 0, 1, described(begun, (teacher,), step, data))
    trainer.add(term)
    assert pair[1].shape == (24, 5) and trainer.step(((x,), LABELS), 0.0) == pytest.approx(expected, rel=1e-5)


def _linear(model: sl.Model) -> list[Any]:
    from slimline.graph.matrix import matrices

    kinds = {node.name: node.kind for node in model.graph.nodes}
    return [each for each in matrices(model.graph) if kinds[each.node] == "linear"]


def test_what_has_no_meaning_is_refused() -> None:
    student, teacher, x = convolutional("torch", 3), convolutional("torch", 5, 1), images("torch")
    data = sl.Data(train=(x, LABELS), test=(x, LABELS), overlap="allow")
    learn = sl.Distillation(features=["simkd"], epochs=1)
    for steps, words in (
        ([HEAD], "has to be trained"),
        ([HEAD, sl.SparsePruning(amount=0.5), learn], "has to be trained"),
        ([HEAD, learn, HEAD, learn], "comes once"),
        ([learn], "put a TeacherHead before it"),
        ([HEAD, learn.model_copy(update={"features": (), "output_weights": {"0": 0.0}})], "leaves every output out"),
    ):
        with pytest.raises(sl.SlimlineError, match=words):
            sl.apply(student, steps, data, teacher=teacher)
    with pytest.raises(sl.SlimlineError, match="the last layer of one teacher"):
        sl.apply(student, [HEAD, sl.Distillation(epochs=1)], data, teacher=[teacher, teacher])
    with pytest.raises(sl.SlimlineError, match="has no linear layer"):
        head_of(_without_head(), "student")
    step = parse("steps: [{step: TeacherHead, width: 4}, {step: Distillation, features: [simkd]}]").steps[0]
    assert step == sl.TeacherHead(width=4)


def _without_head() -> sl.Model:
    import torch

    return sl.load(torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU()).eval(), images("torch")[:2])


def test_it_is_rehearsed_with_the_original_as_the_teacher() -> None:
    model, x = convolutional("torch", 5), images("torch")
    data = sl.Data(train=(x, LABELS), test=(x, LABELS), overlap="allow")
    recipe = [sl.ChannelPruning(ratio=0.4), HEAD, sl.Distillation(features=["simkd"], epochs=1)]
    preview = sl.preview(model, recipe, data)
    assert "ends the student in the teacher's last layer" in str(preview)
    assert preview.expected.parameters == sl.apply(model, recipe, data).graph.size > preview.steps[0].after.parameters
