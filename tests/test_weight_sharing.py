"""Weights that share values: which, how well, through later steps, and into an archive."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import slimline as sl
from slimline.basics.errors import SlimlineError
from slimline.evidence.grams import collect
from slimline.graph.matrix import matrices as matrices_of
from slimline.recipe.recipe import parse
from slimline.steps.base import handler_of
from slimline.steps.weight_sharing.centroids import LearnedCentroids
from tests.digit_models import digits

X, Y = digits(), load_digits().target


class Net(nn.Sequential):
    """A small convolutional network with a batch norm."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10),
        )  # fmt: skip


@pytest.fixture(scope="module")
def model() -> sl.Model:
    torch.manual_seed(0)
    net = Net()
    x, y = torch.from_numpy(X[:1200]), torch.from_numpy(Y[:1200]).long()
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    for _ in range(12):
        for rows in torch.randperm(1200).split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    return sl.load(net.eval(), (X[:2],))


@pytest.fixture(scope="module")
def data() -> sl.Data:
    return sl.Data(train=(X[:1200], Y[:1200]), test=(X[1200:], Y[1200:]))


def accuracy(model: sl.Model) -> float:
    return float((model.predict(X[1200:]).argmax(1) == Y[1200:]).mean())


def matrices(model: sl.Model) -> dict[str, np.ndarray]:
    return {name: array for name, array in model.parameters().items() if array.ndim > 1}


def test_32_clusters_cost_nothing_and_make_the_file_five_times_smaller(
    model: sl.Model, data: sl.Data, tmp_path: Path
) -> None:
    before = accuracy(model)
    assert before > 0.93
    shared = sl.apply(model, sl.WeightSharing(), data)
    assert {len(np.unique(w)) for w in matrices(shared).values()} == {32}
    assert accuracy(shared) > before - 0.004
    packed = sl.pack(shared, tmp_path / "shared.slim")
    assert packed.model_bytes / packed.packed_bytes > 5
    assert np.array_equal(sl.load(packed.path).predict(X[:99]), shared.predict(X[:99]))


def test_pruned_shared_trained_and_packed(model: sl.Model, data: sl.Data, tmp_path: Path) -> None:
    recipe = parse(
        "steps: [{step: SparsePruning, amount: 0.8}, {step: Distillation, epochs: 5, learning_rate: 0.003},"
        " {step: WeightSharing, clusters: 8}, {step: Distillation, epochs: 4, learning_rate: 0.01}]"
    )
    without = sl.apply(model, recipe.steps[:3], data)
    trained = sl.apply(model, recipe.steps, data)
    for name, weight in matrices(trained).items():
        shared = matrices(without)[name]
        assert len(np.unique(weight)) == 8 and (weight[shared == 0] == 0).all() and not np.array_equal(weight, shared)
        for value in np.unique(shared):
            assert len(np.unique(weight[shared == value])) == 1, "weights that shared a value no longer do"
    assert accuracy(trained) > max(accuracy(without) + 0.02, 0.85)  # 0.822 to 0.874; 0.863 before they shared
    packed = sl.pack(sl.finalize(trained), tmp_path / "net.slim")
    assert packed.ratio > 10
    assert np.array_equal(sl.load(packed.path).predict(X[:99]), trained.predict(X[:99]))
    sl.export(sl.load(packed.path), "onnxruntime", tmp_path)


@pytest.mark.parametrize("framework", ["torch", "keras", "onnx"])
def test_vectors_are_shared_stored_in_their_bits_and_trained(framework: str, tmp_path: Path) -> None:
    from tests import recovery_job as job

    model, data = job.model(framework, 0), job.digits(framework, samples=600)
    sparse = sl.apply(model, sl.SparsePruning(amount=0.5, pattern="element", layers=("type:linear",)), data)
    step = sl.WeightSharing(clusters=64, vector=4, refresh=False)
    shared = sl.apply(sparse, step, data)
    readings = {matrix.weight: matrix for matrix in matrices_of(shared.graph)}
    rows = {name: readings[name].matrix(array) for name, array in shared.parameters().items() if name in readings}
    before = {name: readings[name].matrix(array) for name, array in sparse.parameters().items() if name in readings}
    conv = next(name for name in rows if rows[name].shape == (1, 24, 108))
    head = next(name for name in rows if rows[name].shape == (1, 10, 384))
    assert len(np.unique(rows[conv].reshape(-1, 4), axis=0)) == 64
    assert (rows[head][before[head] == 0] == 0).all() and (rows[head] == 0).mean() >= 0.5
    first = next(name for name in rows if rows[name].shape == (1, 12, 9))  # 9 weights are no fours
    np.testing.assert_array_equal(rows[first], before[first])
    packed = sl.pack(sl.apply(model, step, data), tmp_path / "shared.slim")
    # 64 fours are 1.5 bits a weight, and their codebook is 1 KiB; the rest of the file is layers that share nothing.
    own = sum(rows[name].size for name in (conv, head))
    assert packed.model_bytes - packed.packed_bytes > 4 * own - (own * 1.5 / 8 + 2 * 1024) - 1500
    x = data.split("train").inputs[0][:9]
    assert np.array_equal(sl.load(packed.path).predict(x), sl.apply(model, step, data).predict(x))
    if framework == "torch":
        recovery = sl.Distillation(epochs=1, learning_rate=0.01)
        trained = sl.apply(sparse, [step, recovery], data, teacher=model)
        after = readings[conv].matrix(trained.parameters()[conv]).reshape(-1, 4)
        pairs = {(was.tobytes(), now.tobytes()) for was, now in zip(rows[conv].reshape(-1, 4), after, strict=True)}
        assert len(pairs) == 64 and not np.array_equal(after, rows[conv].reshape(-1, 4))
        assert (readings[head].matrix(trained.parameters()[head])[before[head] == 0] == 0).all()


def test_importance_is_the_mean_square_of_inputs(model: sl.Model, data: sl.Data) -> None:
    (layer,) = [matrix for matrix in matrices_of(model.graph) if matrix.layer == "5"]
    inputs = collect(model, [layer], [(X[:400],)])[layer.node].norm[0] ** 2

    def errors(**settings: object) -> tuple[float, float]:
        """Of the weights, each counted by its input, and each alike."""
        step = sl.WeightSharing.model_validate({"clusters": 4, "layers": ("5",), "refresh": False, **settings})
        new = sl.apply(model, step, sl.Data(calibration=(X[:400],)))
        squares = (matrices(new)["5.weight"] - matrices(model)["5.weight"]) ** 2
        return float((squares * inputs).sum()), float(squares.sum())

    by_inputs, plain = errors(), errors(importance="none")
    assert by_inputs[0] < plain[0] and by_inputs[1] > plain[1]
    assert errors(per="channel")[0] < by_inputs[0]
    assert errors(start="linear")[0] >= by_inputs[0]


def test_layers_have_codebooks_of_their_own(model: sl.Model, data: sl.Data) -> None:
    step = sl.WeightSharing(clusters=4, layers=("type:linear",), overrides={"7": {"clusters": 16}}, start="k-means++")
    counts = {name: len(np.unique(w)) for name, w in matrices(sl.apply(model, step, data, seed=3)).items()}
    assert counts == {"0.weight": len(np.unique(matrices(model)["0.weight"])), "5.weight": 4, "7.weight": 16}
    channels = matrices(sl.apply(model, sl.WeightSharing(clusters=4, per="channel")))
    assert {len(np.unique(row)) for w in channels.values() for row in w} == {4}


def test_embeddings_and_recurrent_weights_too() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.cells, self.head = nn.Embedding(50, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.cells(self.words(x))[0][:, -1])

    model = sl.load(Words().eval(), (np.zeros((2, 5), np.int64),))
    shared = sl.apply(model, sl.WeightSharing(clusters=8))
    assert {len(np.unique(w)) for w in matrices(shared).values()} == {8}
    with pytest.raises(SlimlineError, match=r"words cannot share its weights, because its weights have no output chan"):
        sl.apply(model, sl.WeightSharing(clusters=4, per="channel", layers=("words",)))


def test_what_has_no_meaning_is_refused(model: sl.Model) -> None:
    for step, words in (
        (sl.WeightSharing(layers=("nope",)), "nope"),
        (sl.WeightSharing(keep=("nope",)), "nope"),
        (sl.WeightSharing(layers=("0",), clusters=256), "0 cannot share its weights, because it has 144 weights and"),
        (sl.WeightSharing(keep=("*",)), "No weights can be shared"),
    ):
        with pytest.raises(SlimlineError, match=words):
            handler_of(step).check(step, model, ())
    with pytest.raises(SlimlineError, match="has 9 weights in a row, which are no vectors of 2"):
        handler_of(step).check(sl.WeightSharing(vector=2, clusters=4, layers=("0",)), model, ())
    with pytest.raises(SlimlineError, match="has 160 vectors of 4 weights and no more"):
        handler_of(step).check(sl.WeightSharing(vector=4, clusters=256, layers=("7",)), model, ())
    with pytest.raises(SlimlineError, match="have no start 'linear'"):
        sl.WeightSharing(vector=2, start="linear")
    for clusters in (1, 257, 2.5):
        with pytest.raises(SlimlineError, match="clusters of WeightSharing"):
            sl.WeightSharing(clusters=clusters)  # type: ignore[arg-type]
    refused = sl.preview(model, sl.WeightSharing(clusters=200))
    assert "0: it has 144 weights and no more, for 200 clusters" in str(refused)
    for steps, words in (
        ("{step: StaticQuantization}, {step: WeightSharing}", "cannot follow StaticQuantization"),
        ("{step: WeightSharing}, {step: SparsePruning, amount: 0.5}", "cannot follow WeightSharing"),
        ("{step: WeightSharing}, {step: Distillation}, {step: Distillation}", "unless it stands right behind"),
    ):
        with pytest.raises(SlimlineError, match=words):
            parse(f"steps: [{steps}]")
    with pytest.raises(SlimlineError, match="unless it stands right behind"):
        sl.apply(sl.apply(model, sl.WeightSharing()), sl.Distillation())


def test_strength_is_bits() -> None:
    handler = handler_of(sl.WeightSharing())
    counts = [handler.with_strength(sl.WeightSharing(), s).clusters for s in (0.01, 0.5, 0.99)]  # type: ignore[union-attr]
    assert counts == [246, 32, 4]


def test_training_of_values_goes_on_from_its_state() -> None:
    """As a run that was killed does: the same values as without an interruption."""

    class Trainer:
        def slopes(self) -> dict[str, np.ndarray]:
            return {"w": np.arange(6, dtype=np.float32).reshape(2, 3) - 2}

        def set_weights(self, weights: dict[str, np.ndarray]) -> None:
            self.held = weights["w"]

    weight = np.array([[0, 1, 1], [2, 0, 2]], np.float32)
    groups = {"w": np.array([[-1, 0, 0], [1, -1, 1]])}
    batch = ((np.zeros(1),), None)
    through, trainer = LearnedCentroids(groups, {"w": weight}), Trainer()
    for _ in range(4):
        through.after(trainer, 0.1, batch)  # type: ignore[arg-type]
    before, after = (LearnedCentroids(groups, {"w": weight}) for _ in range(2))
    for _ in range(2):
        before.after(trainer, 0.1, batch)  # type: ignore[arg-type]
    after.restore(before.state(), trainer)  # type: ignore[arg-type]
    for _ in range(2):
        after.after(trainer, 0.1, batch)  # type: ignore[arg-type]
    assert np.array_equal(after.values["w"], through.values["w"])
    assert (trainer.held[weight == 0] == 0).all() and trainer.held[0, 1] == trainer.held[0, 2] > 1
    assert trainer.held[1, 0] == trainer.held[1, 2] < 2
