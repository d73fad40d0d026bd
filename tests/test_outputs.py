"""Every output of a network: named, learned, scored, compared; end to end, in both frameworks."""

from __future__ import annotations

import numpy as np
import pytest

import slimline as sl
from slimline.basics.named import Named
from slimline.measure import certify, outputs
from slimline.measure.accuracy import score
from slimline.measure.parity import compare
from slimline.methods.outputs import bare
from slimline.model.outputs import described_outputs
from slimline.runtimes.base import runtime
from slimline.training.loop import recover

N = 80
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, 12)).astype(np.float32)
KIND, AGE = (X @ RNG.normal(size=(12, 3))).argmax(1), (X[:, :2] * 40 + 300).astype(np.float32)
IMAGES = RNG.normal(size=(N, 8, 8, 2)).astype(np.float32)
MASK = (IMAGES[..., 0] > 0).astype(int) + (IMAGES[..., 1] > 0)
TOKENS = RNG.integers(0, 20, (N, 6))
TAGS = np.where(TOKENS < 3, -100, TOKENS % 4)
SETTINGS = {"batch_sizes": (1,), "progress": False}
STEPS = [
    sl.ChannelPruning(ratio=0.25, criterion="taylor", layers=["hidden"]),
    sl.Distillation(epochs=1, batch_size=16, learning_rate=1e-2),
]


@pytest.fixture(params=["torch", "keras"])
def framework(request):
    pytest.importorskip({"torch": "torch", "keras": "tensorflow"}[request.param])
    return request.param


def heads(framework: str, structure: str = "dict") -> sl.Model:
    """Classes and two quantities, of very different sizes."""
    if framework == "torch":
        import torch

        class Heads(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.hidden, self.kind, self.age = (torch.nn.Linear(*sizes) for sizes in ((12, 16), (16, 3), (16, 2)))

            def forward(self, x):
                y = self.hidden(x).relu()
                kind, age = self.kind(y), 100 * self.age(y)
                return {"kind": kind, "age": age} if structure == "dict" else (kind, age)

        torch.manual_seed(0)
        return sl.load(Heads().eval(), X[:2])
    from slimline.frameworks.base import adapter

    adapter("keras")
    import keras

    keras.utils.set_random_seed(0)
    x = keras.Input((12,))
    y = keras.layers.Dense(16, "relu", name="hidden")(x)
    kind = keras.layers.Dense(3, "softmax", name="kind")(y)
    age = keras.layers.Rescaling(100, name="age")(keras.layers.Dense(2, name="years")(y))
    return sl.load(keras.Model(x, {"kind": kind, "age": age} if structure == "dict" else [kind, age]))


def dense(framework: str) -> sl.Model:
    """A class per pixel."""
    if framework == "torch":
        import torch

        torch.manual_seed(0)
        net = torch.nn.Sequential()
        net.add_module("hidden", torch.nn.Conv2d(2, 8, 3, padding=1))
        net.add_module("act", torch.nn.ReLU())
        net.add_module("head", torch.nn.Conv2d(8, 3, 1))
        return sl.load(net.eval(), images(framework)[:2])
    from slimline.frameworks.base import adapter

    adapter("keras")
    import keras

    keras.utils.set_random_seed(0)
    x = keras.Input((8, 8, 2))
    y = keras.layers.Conv2D(8, 3, padding="same", activation="relu", name="hidden")(x)
    return sl.load(keras.Model(x, keras.layers.Conv2D(3, 1, name="head")(y)))


def images(framework: str) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(IMAGES, -1, 1)) if framework == "torch" else IMAGES


def tagger(framework: str) -> sl.Model:
    """A class per token."""
    if framework == "torch":
        import torch

        class Tagger(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.embedding = torch.nn.Embedding(20, 8)
                self.hidden, self.head = torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)

            def forward(self, x):
                return self.head(self.hidden(self.embedding(x)).relu())

        torch.manual_seed(0)
        return sl.load(Tagger().eval(), TOKENS[:2])
    from slimline.frameworks.base import adapter

    adapter("keras")
    import keras

    keras.utils.set_random_seed(0)
    x = keras.Input((6,), dtype="int64")
    y = keras.layers.Dense(16, "relu", name="hidden")(keras.layers.Embedding(20, 8)(x))
    return sl.load(keras.Model(x, keras.layers.Dense(4, name="head")(y)))


def split(x, y, **options) -> sl.Data:
    """The last 40 samples certify."""

    def part(rows: slice):
        return (x[rows], {k: v[rows] for k, v in y.items()} if isinstance(y, dict) else y[rows])

    return sl.Data(train=part(slice(40)), test=part(slice(40, None)), **options)


def closeness(outputs, labels):
    right = outputs["kind"].argmax(1) == labels["kind"]
    return right - np.abs(outputs["age"] - labels["age"]).mean(1) / 1000


@pytest.mark.usefixtures("no_clock")
def test_two_heads_end_to_end(framework, tmp_path):
    model = heads(framework)
    assert sorted(model.output_names) == ["age", "kind"]
    data = split(X, {"age": AGE, "kind": KIND}, metric=closeness)
    run = sl.compress(model, data, recipe=STEPS, output=tmp_path / "run", **SETTINGS)
    report = run.report
    assert report.certificate.metric == "closeness" and report.parity.passed
    assert {o.name: (o.kind, o.axis) for o in report.outputs} == {"kind": ("classes", 1), "age": ("regression", None)}
    assert [each.output for each in report.parity.each] == list(model.output_names)
    answer = outputs(run.artifact, (X[40:],))
    assert isinstance(answer, Named) and answer.names == model.output_names
    expected = closeness(answer, {"age": AGE[40:], "kind": KIND[40:]}).mean()
    assert report.compressed.accuracy == pytest.approx(expected, abs=1e-6)
    found = sl.measure(run.artifact, data, batch_sizes=(1,), progress=False)
    assert found.figures["artifact"].accuracy == pytest.approx(expected, abs=1e-6)
    assert run.model.output_names == model.output_names
    assert all((a != b).any() for a, b in zip(run.model.outputs(X), model.outputs(X), strict=True))


def test_dense_classes_and_tokens(framework, tmp_path):
    axis = 1 if framework == "torch" else 3
    for name, net, x, y, where in (
        ("dense", dense(framework), images(framework), MASK, axis),
        ("tokens", tagger(framework), TOKENS, TAGS, 2),
    ):
        data = split(x, y, overlap="allow")
        found = described_outputs(net, data.check(net.inputs), "train")
        assert [(o.kind, o.axis, o.labelled) for o in found] == [("classes", where, True)]
        small = sl.apply(net, STEPS, data, progress=False)
        answer = outputs(sl.export(small, net.usual_target, tmp_path / name), (x[40:],))
        assert isinstance(answer, np.ndarray)
        metric, values = score(answer, y[40:])
        right, counts = answer.argmax(where) == y[40:], y[40:] != -100
        expected = [(r & c).sum() / c.sum() for r, c in zip(right, counts, strict=True)]
        assert metric == "accuracy"
        np.testing.assert_allclose(values, expected)
        assert counts.mean() > 0 and (name == "dense" or counts.mean() < 1)


def test_the_loss_of_two_heads_is_numpys(framework):
    model = heads(framework)
    data = split(X, {"age": AGE, "kind": KIND}, metric=closeness).check(model.inputs)
    found = described_outputs(model, data, "train", weights={"age": 2.0})
    scale = model.outputs(*data.example(64))[model.output_names.index("age")].var()
    by_name = {o.name: o for o in found}
    assert by_name["age"].scale == pytest.approx(scale, rel=1e-5) and by_name["kind"].scale == 1
    step = sl.Distillation(alpha=0.25, temperature=2.0, batch_size=16)
    trainer = model.adapter.trainer(model.native, model.native, step, 0, 1, found)
    batch = (X[:16],), Named([AGE[:16], KIND[:16]], ("age", "kind"))
    answers = dict(zip(model.output_names, model.outputs(X[:16]), strict=True))
    logits = np.log(answers["kind"]) if framework == "keras" else answers["kind"]
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    hard = -logs[np.arange(16), KIND[:16]].mean() + 2 * ((answers["age"] - AGE[:16]) ** 2).mean() / scale
    assert trainer.step(batch, 1e-3) == pytest.approx(0.75 * hard, rel=1e-4)  # towards itself nothing is soft
    slopes = model.adapter.gradients(model.native, [batch], "cross_entropy", outputs=found)
    assert all(np.abs(slope).max() > 0 for slope in slopes.values())


def test_weights_leave_outputs_out(framework):
    model = heads(framework, "tuple")
    data = sl.Data(train=X[:40], test=X[40:]).check(model.inputs)
    with pytest.raises(sl.SlimlineError, match="did you mean"):
        described_outputs(model, data, "train", weights={f"{model.output_names[1]}x": 0.0})
    found = described_outputs(model, data, "train", weights={model.output_names[0]: 0.0})
    assert [o.kind for o in found] == ["features", "features"]
    trainer = model.adapter.trainer(model.native, model.native, sl.Distillation(), 0, 1, found)
    slopes = trainer.gradients(((X[:16] + 1,), None))
    assert not any(slope.any() for name, slope in slopes.items() if name.startswith("kind"))


@pytest.mark.parametrize("shape", [(7,), (3, 4)])
def test_several_labels_are_scored_by_their_jaccard_index(shape: tuple[int, ...]) -> None:
    from sklearn.metrics import jaccard_score

    logits = RNG.normal(size=(40, *shape)) * 3
    labels = RNG.random((40, *shape)) < 0.3
    logits[0], labels[0] = -1, False
    yes = (logits > 0).reshape(40, -1)
    truth = labels.reshape(40, -1)
    name, values = score(logits, labels.astype(int))
    assert name == "jaccard" and values.dtype == np.float64 and values[0] == 1
    assert values.mean() == pytest.approx(jaccard_score(truth, yes, average="samples", zero_division=1))
    probabilities = 1 / (1 + np.exp(-logits))
    np.testing.assert_array_equal(score(probabilities, labels)[1], values)
    # Both are judged by what the original answers: of a network that lost its range too.
    shrunk = 0.1 + 0.3 * probabilities
    np.testing.assert_array_equal(
        score(shrunk, labels, reference=logits)[1], score(np.ones_like(shrunk), labels, reference=logits)[1]
    )
    broken = logits.copy()
    broken[1] = np.nan
    assert score(broken, labels)[1][1] == 0
    certificate = certify(values, values, 0.5, metric=name)
    assert (certificate.verdict, certificate.method) == ("certified", "betting")


def test_the_default_score_is_the_mean_over_labelled_classes():
    a, b = RNG.normal(size=(6, 4)), RNG.normal(size=(6, 3, 5))
    y, z = RNG.integers(0, 4, 6), RNG.integers(0, 3, (6, 5))
    z[:, 0] = -100
    answer = Named([a, b, RNG.normal(size=(6, 2))], ("a", "b", "c"))
    name, values = score(answer, Named([z, y], ("b", "a")))
    right = (b.argmax(1) == z)[:, 1:].mean(1)
    assert name == "accuracy"
    np.testing.assert_allclose(values, ((a.argmax(1) == y) + right) / 2)
    assert score(answer, y)[1].dtype == bool
    with pytest.raises(sl.SlimlineError, match="None of the outputs a, b, c is known to name classes"):
        score(answer, reference=answer)
    said = {"a": sl.Output("classes", axis=1)}
    assert score(answer, reference=answer, declared=said)[0] == "agreement"
    with pytest.raises(sl.SlimlineError, match="a and c are of different kinds, which have no default score together"):
        score(answer, Named([y, np.eye(6, 2, dtype=bool)], ("a", "c")))
    with pytest.raises(sl.SlimlineError, match="'c' is regression, which has no default score"):
        score(answer, Named([np.ones((6, 2), np.float32)], ("c",)))
    z[3] = -100
    with pytest.raises(sl.SlimlineError, match="Sample 3 has no label that counts"):
        score(answer, Named([z], ("b",)))


def test_a_second_output_that_disagrees_is_named(framework):
    model = heads(framework)
    answers = model.outputs(X)
    wrong = [answer.copy() for answer in answers]
    wrong[1][7] += 3 * answers[1].std()
    found = compare(answers, wrong, known=bare(model.output_names, answers))
    assert not found.passed and found.gross
    assert found.reason.startswith(f"output {model.output_names[1]!r}: ")
    assert [each.passed for each in found.each] == [True, False]


def test_an_artifact_whose_second_output_disagrees_is_not_written(framework, tmp_path, monkeypatch):
    model = heads(framework)
    target = model.usual_target
    session = type(runtime(target).load(sl.export(model, target, tmp_path / "first")))
    honest = session.outputs
    monkeypatch.setattr(session, "outputs", lambda self, x: (honest(self, x)[0], honest(self, x)[1] + 50))
    with pytest.raises(sl.SlimlineError, match=f"output '{model.output_names[1]}': "):
        sl.export(model, target, tmp_path / "again")


def test_names_survive_saving_and_steps(framework, tmp_path):
    model = heads(framework)
    path = model.save(tmp_path / f"model{model.adapter.suffix}")
    again = sl.load(path)
    assert again.output_names == model.output_names
    assert sl.apply(again, sl.ChannelPruning(ratio=0.5, layers=["hidden"])).output_names == model.output_names
    assert [row.name for row in sl.inspect(again).outputs] == list(model.output_names)


def test_several_labels_per_sample_are_learned(framework):
    if framework == "torch":
        import torch

        model = sl.load(torch.nn.Sequential(torch.nn.Linear(12, 2), torch.nn.Sigmoid()), X[:2])
    else:
        from slimline.frameworks.base import adapter

        adapter("keras")
        import keras

        model = sl.load(keras.Sequential([keras.Input((12,)), keras.layers.Dense(2, "sigmoid")]))
    y = (AGE > 300).astype(np.float32)
    data = split(X, y, metric=lambda outputs, labels: ((outputs > 0.5) == labels).mean(1), outputs="multilabel")
    data = data.check(model.inputs)
    found = described_outputs(model, data, "train")
    assert [o.kind for o in found] == ["multilabel"]
    step = sl.Distillation(alpha=0.0, epochs=8, batch_size=8, learning_rate=5e-2)
    trainer = model.adapter.trainer(model.native, None, step, 0, 1, found)
    p = model.predict(X[:16]).astype(np.float64)
    expected = -np.mean(y[:16] * np.log(p) + (1 - y[:16]) * np.log(1 - p))
    assert trainer.step(((X[:16],), y[:16]), 1e-3) == pytest.approx(expected, rel=1e-4)
    trained = recover(model, None, step, data, 0).model
    before, after = (((m.predict(X) > 0.5) == y).mean() for m in (model, trained))
    assert after > before + 0.1


def test_labels_that_do_not_fit_are_refused_before_work(tmp_path):
    pytest.importorskip("torch")
    model = heads("torch")
    with pytest.raises(sl.SlimlineError, match="did you mean 'kind'"):
        sl.compress(model, split(X, {"kindd": KIND}), recipe=STEPS, output=tmp_path / "a", **SETTINGS)
    with pytest.raises(sl.SlimlineError, match=r"labels of 'age' are float32, not classes"):
        split(X, {"kind": KIND, "age": AGE})
    with pytest.raises(sl.SlimlineError, match="go from 1 to 3, but the model has 3"):
        sl.compress(model, split(X, {"kind": KIND + 1}), recipe=STEPS, output=tmp_path / "b", **SETTINGS)
