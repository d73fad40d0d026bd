"""Students that end as their teacher does (SimKD), in every framework."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import slimline as sl
from slimline.graph.matrix import matrices
from slimline.recipe.recipe import parse
from slimline.steps.base import Context, handler_of
from slimline.steps.teacher_head.head import head_of
from slimline.training.features import Inside, terms
from slimline.training.loop import described, recover
from tests import recovery_job as job
from tests.frameworks.onnx import graphs
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


@pytest.mark.parametrize("framework", ["torch", "keras", "onnx"])
def test_on_maps_the_projector_is_of_convolutions(framework: str, tmp_path: Path) -> None:
    student, teacher, x = averaging(framework, 6), averaging(framework, 5, 1), images(framework)
    data = sl.Data(train=(x, LABELS), test=(x, LABELS), overlap="allow")
    step = sl.TeacherHead(on="map", width=12)
    outcome = handler_of(step).perform(step, student, Context(teacher, data, ""))
    begun = outcome.model
    assert outcome.record["widths"] == [6, 12, 12, 5, 4]
    own, new, other = Inside(student, ""), Inside(begun, ""), Inside(teacher, "")
    assert own.map is not None and new.map is not None and other.map is not None

    # By hand: convolutions of PyTorch on the student's map, the mean, and the teacher's head.
    stored, taught = begun.parameters(), teacher.parameters()
    (value,) = (np.moveaxis(v, own.map.axis, 1) for v in observed(student, (own.map.name,), x))
    projector = [each for each in matrices(begun.graph) if each.layer.startswith(f"{head_of(student, '').layer}.")]
    for layer in projector[:3]:
        weight = layer.matrix(stored[layer.weight])[0].reshape(layer.shape[1], -1, *(layer.kernel or (1, 1)))
        tensors = [torch.tensor(np.array(a, np.float32)) for a in (value, weight, stored[layer.bias].ravel())]
        value = torch.relu(torch.conv2d(*tensors, padding="same")).numpy()
    source = head_of(teacher, "")
    expected = value.mean((2, 3)) @ source.matrix(taught[source.weight])[0].T + taught[source.bias].ravel()
    np.testing.assert_allclose(begun.predict(x), expected, rtol=1e-3, atol=1e-4)

    learn = sl.Distillation(
        features=[{"loss": "simkd", "weight": 2.0}], output_weights={begun.output_names[0]: 0.0}, epochs=4,
        learning_rate=1e-2, batch_size=8,
    )  # fmt: skip
    (term,) = terms(learn, begun, (teacher,), 0)
    assert (term.students, term.teachers) == ((new.map.name,), (other.map.name,))

    def distance(model: sl.Model) -> float:
        pair = [observed(m, names, x)[0] for m, names in ((model, term.students), (teacher, term.teachers))]
        return float(2 * ((pair[0] - pair[1]) ** 2).mean())

    trainer = begun.adapter.trainer(
        begun.native, teacher.native, learn, 0, 1, described(begun, (teacher,), learn, data)
    )
    trainer.add(term)
    first, *_, last = (trainer.step(((x,), LABELS), rate) for rate in (0.0, *[1e-2] * 12))
    assert first == pytest.approx(distance(begun), rel=1e-4) and last < 0.95 * first
    again = sl.load(begun.save(tmp_path / f"small{begun.adapter.suffix}"))
    np.testing.assert_allclose(again.predict(x), begun.predict(x), atol=1e-5)
    sl.export(begun, "onnxruntime", tmp_path / "artifact")


@pytest.mark.parametrize(("framework", "sides"), [("torch", (6, 5)), ("torch", (2, 2)), ("keras", (6, 5))])
def test_the_larger_map_is_pooled(framework: str, sides: tuple[int, int]) -> None:
    """The teacher's map has three by three places; the student's is larger, unequally, or smaller."""
    student, teacher, x = sided(framework, sides), averaging(framework, 5, 1), images(framework)
    data = sl.Data(train=(x, LABELS), test=(x, LABELS), overlap="allow")
    step = sl.TeacherHead(on="map", width=4)
    begun = handler_of(step).perform(step, student, Context(teacher, data, "")).model
    learn = sl.Distillation(features=[{"loss": "simkd", "weight": 2.0}], output_weights={begun.output_names[0]: 0.0})
    (term,) = terms(learn, begun, (teacher,), 0)
    trainer = begun.adapter.trainer(
        begun.native, teacher.native, learn, 0, 1, described(begun, (teacher,), learn, data)
    )
    trainer.add(term)

    new, other = Inside(begun, "").map, Inside(teacher, "").map
    assert new is not None and other is not None and (new.size, other.size) == (sides, (3, 3))
    pair = [
        torch.tensor(np.moveaxis(observed(model, (tap.name,), x)[0], tap.axis, 1))
        for model, tap in ((begun, new), (teacher, other))
    ]
    smaller = [min(a, 3) for a in sides]
    one, two = (torch.nn.functional.adaptive_avg_pool2d(each, smaller) for each in pair)
    losses = [trainer.step(((x,), LABELS), rate) for rate in (0.0, *[1e-2] * 12)]
    assert losses[0] == pytest.approx(float(2 * ((one - two) ** 2).mean()), rel=1e-4)
    assert losses[-1] < 0.95 * losses[0]


def sided(framework: str, sides: tuple[int, int]) -> sl.Model:
    """Of images of six by six places a map of three channels and of these sides, its mean, and a linear layer."""
    kernel = tuple(6 - n + 1 for n in sides)
    torch.manual_seed(0)
    if framework == "torch":
        end = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)]
        return sl.load(nn.Sequential(nn.Conv2d(1, 3, kernel), nn.ReLU(), *end).eval(), images("torch")[:2])
    import keras

    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 6, 1))
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(3, kernel, activation="relu")(inputs))
    return sl.load(keras.Model(inputs, keras.layers.Dense(4)(x)))


def test_maps_of_other_dimensions_and_no_maps_are_refused() -> None:
    teacher, x = averaging("torch", 5, 1), images("torch")
    step = sl.TeacherHead(on="map")

    def begin(student: Any) -> None:
        handler_of(step).perform(step, sl.load(student.eval(), x[:2]), Context(teacher, None, ""))

    end = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)]
    volume = [nn.Unflatten(1, (1, 1)), nn.Conv3d(1, 3, (1, 3, 3)), nn.AdaptiveAvgPool3d(1), *end[1:]]
    with pytest.raises(sl.SlimlineError, match="1 × 4 × 4 places and the teacher's 3 × 3"):
        begin(nn.Sequential(*volume))
    with pytest.raises(sl.SlimlineError, match="does not read the mean"):
        begin(nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.AdaptiveMaxPool2d(1), *end[1:]))
    with pytest.raises(sl.SlimlineError, match="does not read the mean"):
        begin(nn.Sequential(nn.Conv2d(1, 3, 4), nn.AvgPool2d(2), *end[1:]))  # of three by three places it drops some


def averaging(framework: str, width: int, seed: int = 0) -> sl.Model:
    """`convolutional`, also in ONNX."""
    if framework != "onnx":
        return convolutional(framework, width, seed)
    rng = np.random.default_rng(seed)
    shapes = {"c.weight": (width, 1, 3, 3), "d.weight": (width, width, 3, 3), "h.weight": (width, 4), "h.bias": (4,)}
    body = (
        "a = Conv<pads = [1, 1, 1, 1]>(x, c__weight) b = Relu(a) "
        "c = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(b, d__weight) d = Relu(c) "
        "e = GlobalAveragePool(d) f = Flatten(e) y = Gemm(f, h__weight, h__bias)"
    )
    weights = {name: rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}
    return sl.load(graphs.model(body, weights, "float[N,1,6,6] x"), images("torch")[:2])


def _linear(model: sl.Model) -> list[Any]:
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
    return sl.load(torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU()).eval(), images("torch")[:2])


def test_it_is_rehearsed_with_the_original_as_the_teacher() -> None:
    model, x = convolutional("torch", 5), images("torch")
    data = sl.Data(train=(x, LABELS), test=(x, LABELS), overlap="allow")
    recipe = [sl.ChannelPruning(ratio=0.4), HEAD, sl.Distillation(features=["simkd"], epochs=1)]
    preview = sl.preview(model, recipe, data)
    assert "ends the student in the teacher's last layer" in str(preview)
    assert preview.expected.parameters == sl.apply(model, recipe, data).graph.size > preview.steps[0].after.parameters
