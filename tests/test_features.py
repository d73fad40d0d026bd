"""Losses of inner values in both frameworks: the loss of a step is what numpy makes of the values that are observed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import slimline as sl
from slimline.frameworks.base import adapter
from slimline.methods import distillation, features
from slimline.training.features import terms
from slimline.training.loop import recover

FRAMEWORKS = ("torch", "keras")
RNG = np.random.default_rng(0)
LABELS = np.arange(24) % 4


def images(framework: str) -> np.ndarray:
    x = np.random.default_rng(0).normal(size=(24, 1, 6, 6)).astype(np.float32)
    return np.ascontiguousarray(np.moveaxis(x, 1, -1)) if framework == "keras" else x


def convolutional(framework: str, width: int, seed: int = 0, classes: int = 4) -> sl.Model:
    """Two stages, ``conv1`` and ``conv2``, and a linear ``head``, without norms."""
    if framework == "torch":
        import torch
        from torch import nn

        torch.manual_seed(seed)
        net: Any = nn.Sequential()
        net.add_module("conv1", nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU()))
        net.add_module("conv2", nn.Sequential(nn.Conv2d(width, width, 3, stride=2, padding=1), nn.ReLU()))
        net.add_module("pool", nn.AdaptiveAvgPool2d(1))
        net.add_module("flat", nn.Flatten())
        net.add_module("head", nn.Linear(width, classes))
        net.eval()
    else:
        adapter("keras")
        import keras
        from keras import layers as L

        keras.utils.set_random_seed(seed)
        x = keras.Input((6, 6, 1), name="x")
        y = L.Conv2D(width, 3, padding="same", activation="relu", name="conv1")(x)
        y = L.Conv2D(width, 3, strides=2, padding="same", activation="relu", name="conv2")(y)
        net = keras.Model(x, L.Dense(classes, name="head")(L.GlobalAveragePooling2D(name="pool")(y)))
    return sl.load(net, images(framework)[:2])


def transformer(framework: str, heads: int, layers: int, seed: int = 0) -> sl.Model:
    """Layers with attention of heads of width 4, over 5 tokens."""
    width = 4 * heads
    if framework == "torch":
        import torch
        from torch import nn

        torch.manual_seed(seed)

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed, self.head = nn.Embedding(9, width), nn.Linear(width, 4)
                one = {"dropout": 0.0, "batch_first": True}
                self.layers = nn.ModuleList(
                    nn.TransformerEncoderLayer(width, heads, width, **one) for _ in range(layers)
                )

            def forward(self, x: torch.Tensor) -> Any:
                x = self.embed(x)
                for layer in self.layers:
                    x = layer(x)
                return self.head(x.mean(1))

        return sl.load(Net().eval(), np.zeros((2, 5), np.int64))
    adapter("keras")
    import keras
    from keras import layers as L

    keras.utils.set_random_seed(seed)
    x = keras.Input((5,), dtype="int32", name="x")
    y = L.Embedding(9, width, name="embed")(x)
    for i in range(layers):
        y = L.Add(name=f"add{i}")([y, L.MultiHeadAttention(heads, 4, name=f"attention{i}")(y, y)])
        y = L.LayerNormalization(name=f"norm{i}")(y)
    return sl.load(keras.Model(x, L.Dense(4, name="head")(L.GlobalAveragePooling1D()(y))), np.zeros((2, 5), np.int32))


def observed(model: sl.Model, names: tuple[str, ...], inputs: np.ndarray) -> list[np.ndarray]:
    found: dict[str, np.ndarray] = {}
    model.adapter.observe(model.native, [(inputs,)], list(dict.fromkeys(names)), found.__setitem__)
    return [found[name].astype(np.float64) for name in names]


def loss_of(student: sl.Model, teacher: sl.Model, step: sl.Distillation, inputs: np.ndarray) -> tuple[float, float]:
    """The loss of a step, and the same in numpy's float64."""
    (term,) = terms(step, student, (teacher,), 3)
    trainer = student.adapter.trainer(student.native, teacher.native, step, 0, 1)
    trainer.add(term)
    value = trainer.step(((inputs,), LABELS), 0.0)
    outer = distillation.loss(
        np, "kl", student.predict(inputs).astype(float), teacher.predict(inputs).astype(float), LABELS,
        distillation.Output("classes", axis=1), alpha=0.5,
    )  # fmt: skip
    own, other = observed(student, term.students, inputs), observed(teacher, term.teachers, inputs)
    return value, float(outer + term.value(np, own, other, term.learned))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_loss_is_that_of_the_observed_values(framework: str) -> None:
    student, teacher, x = convolutional(framework, 3), convolutional(framework, 5, 1), images(framework)
    for loss in ("hint", "attention", "similarity", "rkd", "crd", "review"):
        step = sl.Distillation(alpha=0.5, features=[loss])
        value, expected = loss_of(student, teacher, step, x)
        assert value == pytest.approx(expected, rel=1e-4), loss
    # Features are read channels last in either framework.
    (term,) = terms(sl.Distillation(features=["attention"]), student, (teacher,), 0)
    own, other = observed(student, term.students, x), observed(teacher, term.teachers, x)
    rows = [[np.moveaxis(a, 1, -1) if framework == "torch" else a for a in each] for each in (own, other)]
    pairs = [[a.reshape(24, -1, a.shape[-1]) for a in each] for each in rows]
    by_hand = sum(features.attention(np, a, b) for a, b in zip(*pairs, strict=True))
    assert [p.shape[1:] for p in pairs[0]] == [(36, 3), (9, 3), (1, 3)][: len(pairs[0])]
    assert term.value(np, own, other, {}) == pytest.approx(1000 * by_hand)


@pytest.mark.parametrize("width", [3, 5])
def test_flow_is_that_of_projected_channels_where_they_are_not_as_many(width: int) -> None:
    student, teacher, x = convolutional("torch", width), convolutional("torch", 5, 1), images("torch")
    step = sl.Distillation(alpha=0.5, features=[{"loss": "fsp", "layers": ["conv1.0", "conv1.1"]}])
    value, expected = loss_of(student, teacher, step, x)
    assert value == pytest.approx(expected, rel=1e-4)
    (term,) = terms(step, student, (teacher,), 3)
    assert len(term.learned) == (0 if width == 5 else 4)  # as published where nothing has to be projected
    own, other = observed(student, term.students, x), observed(teacher, term.teachers, x)
    rows = [[np.moveaxis(a, 1, -1).reshape(24, 36, -1) for a in each] for each in (own, other)]
    if width != 5:
        rows[0] = [a @ term.learned[f"{i}/weight"] + term.learned[f"{i}/bias"] for i, a in enumerate(rows[0])]
    flows = [np.einsum("npi,npj->nij", *each) / 36 for each in rows]
    by_hand = 50 * ((flows[0] - flows[1]) ** 2).mean()
    assert term.value(np, own, other, term.learned) == pytest.approx(by_hand)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_transformers_are_compared_by_their_attention(framework: str) -> None:
    student, teacher = transformer(framework, 2, 1), transformer(framework, 3, 2, 1)
    x = RNG.integers(0, 9, (24, 5)).astype(student.example[0].dtype)
    for loss in ("maps", "relations", {"loss": "hint", "layers": ["embed"]}, "hint"):
        value, expected = loss_of(student, teacher, sl.Distillation(alpha=0.5, features=[loss]), x)
        assert value == pytest.approx(expected, rel=1e-4), loss
    (term,) = terms(sl.Distillation(features=["maps"]), student, (student,), 0)
    own = observed(student, term.students, x)
    assert term.value(np, own, own, {}) == pytest.approx(0, abs=1e-9)
    (term,) = terms(sl.Distillation(features=["relations"]), student, (teacher,), 0)
    own = observed(student, term.students, x)
    heads = [a if framework == "torch" else a.swapaxes(1, 2) for a in own]
    assert [a.shape for a in heads] == [(24, 2, 5, 4)] * 3


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_student_learns_its_teachers_features_and_resumes(framework: str, tmp_path: Any) -> None:
    student, teacher, x = convolutional(framework, 3), convolutional(framework, 5, 1), images(framework)
    data = sl.Data(train=(x, LABELS), selection=(x[:8], LABELS[:8]), test=(x, LABELS), overlap="allow")
    step = sl.Distillation(
        epochs=2, batch_size=12, learning_rate=0.02, warmup=0, optimizer="sgd", alpha=1.0,
        features=[{"loss": "hint", "layers": [("conv1", "conv1"), ("conv*", "conv*")], "weight": 1.0}],
    )  # fmt: skip
    whole = recover(student, teacher, step, data, 0, tmp_path)
    assert whole.records[2]["loss"] < whole.records[1]["loss"]
    again = recover(student, teacher, step, data, 0, tmp_path)  # reads all that the optimiser and projections were
    np.testing.assert_array_equal(again.model.predict(x), whole.model.predict(x))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_several_teachers_teach_their_mean(framework: str) -> None:
    student, x = convolutional(framework, 3), images(framework)
    teachers = [convolutional(framework, 4, seed) for seed in (1, 2)]
    step = sl.Distillation(alpha=1.0)
    trainer = student.adapter.trainer(student.native, tuple(t.native for t in teachers), step, 0, 1)
    p = np.mean([_softmax(t.predict(x) / 4) for t in teachers], axis=0)
    q = _softmax(student.predict(x) / 4)
    assert trainer.step(((x,), None), 0.0) == pytest.approx(16 * np.mean(np.sum(p * np.log(p / q), 1)), abs=1e-5)
    data = sl.Data(train=(x, LABELS), test=(x, LABELS), overlap="allow")
    taught = sl.apply(student, sl.Distillation(epochs=1, batch_size=12), data, teacher=teachers)
    assert np.abs(taught.predict(x) - student.predict(x)).max() > 1e-4
    with pytest.raises(sl.SlimlineError, match="one teacher, and there are 2"):
        sl.apply(student, sl.Distillation(features=["hint"]), data, teacher=teachers)
    with pytest.raises(sl.SlimlineError, match=r"teacher's outputs \(5,\) and the student's \(4,\)"):
        sl.apply(student, sl.Distillation(), data, teacher=[teachers[0], convolutional(framework, 3, classes=5)])


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_blocks_of_unequal_depth_and_pruned_students_are_paired(framework: str) -> None:
    networks = []
    for widths, blocks in (((4, 8), 1), ((8, 16), 2)):
        if framework == "torch":
            import torch

            from slimline.zoo.torch import ResidualCNN

            torch.manual_seed(0)
            net: Any = ResidualCNN(widths, blocks).eval()
        else:
            adapter("keras")
            from slimline.zoo.keras import residual_cnn

            net = residual_cnn(widths, blocks, size=6)
        networks.append(sl.load(net, images(framework)[:2]))
    student, teacher = networks
    (term,) = terms(sl.Distillation(features=["attention"]), student, (teacher,), 0)
    own, other = (
        observed(student, term.students, images(framework)),
        observed(teacher, term.teachers, images(framework)),
    )
    axis = 1 if framework == "torch" else -1
    widths = [[a.shape[axis] for a in each] for each in (own, other)]
    # The pooled values have one position, and no branch ends there.
    assert [each[:2] for each in widths] == [[4, 8], [8, 16]]
    assert all(a.min() >= 0 for a in (*own[:2], *other[:2]))  # behind the activation
    pruned = sl.apply(teacher, sl.ChannelPruning(ratio=0.5))
    (term,) = terms(sl.Distillation(features=["attention"]), pruned, (teacher,), 0)
    assert term.students == term.teachers


def _softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z.astype(np.float64) - z.max(1, keepdims=True))
    return np.asarray(e / e.sum(1, keepdims=True))


@pytest.mark.parametrize(
    ("loss", "sentence"),
    [
        ({"loss": "hint", "layers": ["conv3"]}, r"no layer of the student called 'conv3'; did you mean 'conv"),
        ({"loss": "hint", "layers": [("conv1", "cnv2")]}, r"no layer of the teacher called 'cnv2'; did you mean 'conv"),
        ({"loss": "hint", "layers": [("conv1", "conv2")]}, "pair layers of the same positions"),
        ({"loss": "hint", "layers": [("conv*", "conv1")]}, "name as many of both"),
        ({"loss": "hint", "layers": ["block*"]}, r"no layer of the student like 'block\*'"),
        ({"loss": "fsp", "layers": ["conv1"]}, "name two layers of one stage"),
        ({"loss": "maps"}, "attention of several heads, and the student has none"),
        ({"loss": "hints"}, "hint"),
        ({"loss": "hint", "weight": 0}, "weight of FeatureLoss is 0"),
    ],
)
def test_what_does_not_fit_is_one_sentence(loss: Any, sentence: str) -> None:
    student, teacher = convolutional("torch", 3), convolutional("torch", 5, 1)
    with pytest.raises(sl.SlimlineError, match=sentence) as caught:
        terms(sl.Distillation(features=[loss]), student, (teacher,), 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_loss_is_there_for_loops_of_ones_own(framework: str) -> None:
    rng = np.random.default_rng(1)
    s, t, u = rng.normal(size=(3, 6, 4)).astype(np.float32)
    y = np.array([0, 1, 2, 3, 0, 1])
    for step in (sl.Distillation(alpha=0.3), sl.Distillation(loss="dkd", beta=2.0), sl.SparseTraining(loss="mse")):
        loss = sl.DistillationLoss(step)
        expected = distillation.loss(
            np, step.loss, s, t, y, distillation.Output("classes", axis=1), alpha=step.alpha, beta=step.beta
        )
        if framework == "torch":
            import torch

            student = torch.tensor(s, requires_grad=True)
            value = loss(student, torch.tensor(t), torch.tensor(y))
            value.backward()
            assert student.grad is not None and torch.isfinite(student.grad).all()
            several = loss(student, [torch.tensor(t), torch.tensor(u)])
            wrong = [torch.tensor(s), torch.zeros(6, 5)]
        else:
            adapter("keras")
            import tensorflow as tf

            student, own = tf.constant(s), tf.constant(y)
            with tf.GradientTape() as tape:
                tape.watch(student)
                value = loss(student, tf.constant(t), own)
            assert np.isfinite(tape.gradient(value, student)).all()
            several = loss(student, [tf.constant(t), tf.constant(u)])
            wrong = [student, tf.zeros((6, 5))]
        numbers = [float(x.detach() if framework == "torch" else x) for x in (value, several)]
        assert numbers[0] == pytest.approx(float(expected), rel=1e-4) and numbers[1] > 0
    with pytest.raises(sl.SlimlineError, match="must have the same classes"):
        loss(*wrong)
    with pytest.raises(sl.SlimlineError, match="no tensor of a framework"):
        loss(s, t)
    with pytest.raises(sl.SlimlineError, match="inside the networks"):
        sl.DistillationLoss(sl.Distillation(features=["hint"]))
