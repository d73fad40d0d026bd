"""Layers that share one weight: the best one, the right ones, stored once in every file, and tied while they train."""

from __future__ import annotations

import io
import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist, squareform
from sklearn.datasets import load_digits

import slimline as sl
from slimline.basics.errors import SlimlineError
from slimline.methods.tying import cycle, joined, lost, merged, sequence
from slimline.recipe.recipe import parse

torch = pytest.importorskip("torch")
nn = torch.nn

X = (load_digits().data / 16).astype(np.float32)
Y = load_digits().target
DATA = sl.Data(train=(X[:256], Y[:256]), calibration=(X[:300],), overlap="allow")
DEPTH, WIDTH = 4, 24


class Residual(nn.Module):
    """Digits through equal residual layers, of which the second and the last have nearly the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(64, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, 10)
        with torch.no_grad():
            self.blocks[3].weight.copy_(self.blocks[1].weight + 0.01 * torch.randn(WIDTH, WIDTH))
            self.blocks[3].bias.copy_(self.blocks[1].bias + 0.01)

    def forward(self, x: Any) -> Any:
        x = self.stem(x)
        for block in self.blocks:
            x = x + torch.relu(block(x))
        return self.head(x)


def network() -> Any:
    torch.manual_seed(0)
    return Residual().eval()


def loaded(framework: str) -> sl.Model:
    """The same network in every framework."""
    if framework == "torch":
        return sl.load(network(), (X[:2],))
    if framework == "onnx":
        file = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(network(), (torch.zeros(2, 64),), file, dynamo=False, input_names=["x"],
                              dynamic_axes={"x": {0: "batch"}})  # fmt: skip
        return sl.load(onnx.load_from_string(file.getvalue()), (X[:2],))
    keras = pytest.importorskip("keras")
    x = inputs = keras.Input((64,), name="x")
    x = keras.layers.Dense(WIDTH, name="stem")(x)
    for i in range(DEPTH):
        x = x + keras.layers.Dense(WIDTH, activation="relu", name=f"block_{i}")(x)
    model = keras.Model(inputs, keras.layers.Dense(10, name="head")(x))
    source = network()
    for layer, linear in zip(
        [each for each in model.layers if each.weights], [source.stem, *source.blocks, source.head], strict=True
    ):
        layer.set_weights([linear.weight.detach().numpy().T, linear.bias.detach().numpy()])
    return sl.load(model, (X[:2],))


def stored(artifact: Path) -> int:
    """Numbers in the weights of an ONNX file."""
    return sum(int(np.prod(t.dims)) for t in onnx.load(artifact).graph.initializer if len(t.dims))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**16), st.integers(2, 4), st.booleans())
def test_the_shared_weight_is_the_least_squares_fit(seed: int, layers: int, constant: bool) -> None:
    rng = np.random.default_rng(seed)
    weights = [rng.normal(size=(1, 3, 4)) for _ in range(layers)]
    rows = [rng.normal(size=(20, 4)) * rng.uniform(0.2, 2, 4) for _ in range(layers)]
    for x in rows:
        x[:, -1] = 1.0 if constant else x[:, -1]
    seconds = [(x.T @ x / len(x))[None] for x in rows]
    shared = merged(weights, seconds, ridge=1e-13, constant=constant)
    targets = np.concatenate([x @ w[0].T for x, w in zip(rows, weights, strict=True)])
    expected, *_ = np.linalg.lstsq(np.concatenate(rows), targets, rcond=None)
    np.testing.assert_allclose(shared[0], expected.T, atol=1e-6)
    parts = [
        np.square(x @ (w[0] - shared[0]).T).sum() / np.square(x @ w[0].T).sum()
        for x, w in zip(rows, weights, strict=True)
    ]
    np.testing.assert_allclose(lost(weights, seconds, shared), parts, rtol=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**16), st.integers(2, 8), st.integers(1, 5), st.floats(0.1, 3.0))
def test_groups_are_those_of_complete_linkage(seed: int, count: int, fewest: int, most: float) -> None:
    points = np.random.default_rng(seed).normal(size=(count, 2))
    between = squareform(pdist(points))

    def loss(group: tuple[int, ...]) -> float:
        return float(between[np.ix_(group, group)].max())

    def numbered(groups: list[tuple[int, ...]]) -> list[set[int]]:
        return [set(group) for group in groups]

    tree = linkage(points, "complete")
    for groups, labels in (
        (joined(count, loss, fewest), fcluster(tree, fewest, "maxclust")),
        (joined(count, loss, most=most), fcluster(tree, most, "distance")),
    ):
        expected = [set(np.flatnonzero(labels == label)) for label in dict.fromkeys(labels)]
        assert sorted(map(sorted, numbered(groups))) == sorted(map(sorted, expected))


def test_neighbours_and_periods() -> None:
    assert sequence(5, 2) == [(0, 1, 2), (3, 4)] and cycle(5, 2) == [(0, 2, 4), (1, 3)]
    assert sequence(2, 4) == [(0,), (1,)] and cycle(2, 4) == [(0,), (1,)]


@pytest.mark.parametrize("framework", ["torch", "keras", "onnx"])
def test_what_is_alike_shares_one_tensor_everywhere(framework: str, tmp_path: Path) -> None:
    model = loaded(framework)
    step = sl.LayerTying(similarity=0.99)
    plan = sl.plan(model, step, DATA)
    small = plan.apply(model)
    (group,) = plan.tied
    assert [re.findall(r"\d", name) for name in group.names] == [["1"], ["3"]]
    assert len(plan.alone) == DEPTH - 2 + 2 and "loses" in str(plan)
    assert json.loads(plan.to_json())["tied"][0]["layers"] == list(group.names)
    gone = WIDTH * (WIDTH + 1)
    assert small.graph.size == plan.parameters == model.graph.size - gone and plan.macs > 0
    np.testing.assert_allclose(small.predict(X[:50]), plan.mask(model).predict(X[:50]), atol=1e-5)
    assert not np.allclose(small.predict(X[:50]), model.predict(X[:50]), atol=1e-7)

    again = sl.load(small.save(tmp_path / f"small{small.adapter.suffix}"))
    assert again.graph.size == small.graph.size
    np.testing.assert_allclose(again.predict(X[:9]), small.predict(X[:9]), atol=1e-6)
    before, after = (stored(sl.export(each, "onnxruntime", tmp_path / each.adapter.name)) for each in (model, small))
    assert before - after == gone
    before, after = (sl.pack(each, tmp_path / f"{each.graph.size}.slim").packed_bytes for each in (model, small))
    assert before - after > 2 * gone  # bytes, of float32

    trained = sl.apply(small, sl.Distillation(epochs=1, learning_rate=1e-2), DATA, teacher=model)
    assert trained.graph.size == small.graph.size and not np.allclose(trained.predict(X[:9]), small.predict(X[:9]))
    pruned = sl.apply(small, sl.ChannelPruning(ratio=0.25, keep=["*head*"]), DATA)
    assert pruned.graph.size < small.graph.size


@pytest.mark.parametrize(("order", "groups"), [("sequence", [[0, 1], [2, 3]]), ("cycle", [[0, 2], [1, 3]])])
def test_layers_share_by_their_place(order: str, groups: list[list[int]]) -> None:
    plan = sl.plan(loaded("torch"), sl.LayerTying(groups=2, order=order, criterion="weight"))
    assert [list(group.names) for group in plan.tied] == [[f"blocks.{i}" for i in group] for group in groups]
    one = sl.plan(loaded("torch"), sl.LayerTying(groups=1), DATA)
    assert [len(group.names) for group in one.tied] == [DEPTH]


def test_convolutions_share_with_those_of_their_settings() -> None:
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=1, bias=False)]
    net = nn.Sequential(*convolutions, nn.Conv2d(4, 4, 3, padding=2, dilation=2, bias=False), nn.Flatten())
    x = np.random.default_rng(0).normal(size=(8, 4, 6, 6)).astype(np.float32)
    model = sl.load(net.eval(), (x[:2],))
    data = sl.Data(calibration=(x,))
    plan = sl.plan(model, sl.LayerTying(groups=1), data)
    assert [group.names for group in plan.tied] == [("0", "1")] and "2" in plan.alone
    np.testing.assert_allclose(plan.apply(model).predict(x), plan.mask(model).predict(x), atol=1e-5)
    with pytest.raises(SlimlineError, match="shares its weights already"):
        sl.plan(plan.apply(model), sl.LayerTying(groups=1, layers=["0", "1"]), data)


def test_what_cannot_share_is_said_beforehand() -> None:
    model = loaded("torch")
    with pytest.raises(SlimlineError, match="either similarity"):
        sl.LayerTying()
    with pytest.raises(SlimlineError, match="give groups"):
        sl.LayerTying(similarity=0.9, order="cycle")
    with pytest.raises(SlimlineError, match="No two layers can share"):
        sl.plan(model, sl.LayerTying(groups=1, layers=["stem", "head"]), DATA)
    with pytest.raises(SlimlineError, match="needs data"):
        sl.plan(model, sl.LayerTying(groups=1))
    recipe = parse("- {step: LayerTying, groups: 2, order: cycle}")
    assert parse(recipe.dump()) == recipe
