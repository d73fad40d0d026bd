"""Several layers as one: exact in every framework, and nothing is merged that would not be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slimline as sl
from slimline.basics.errors import SlimlineError
from slimline.graph import cost
from slimline.graph.matrix import matrices
from slimline.steps.merging.plan import MergePlan

torch = pytest.importorskip("torch")
nn = torch.nn

X = np.random.default_rng(0).normal(size=(6, 4, 9, 9)).astype(np.float32)


def normed(channels: int) -> Any:
    norm = nn.BatchNorm2d(channels, eps=1e-3)
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        nn.init.uniform_(tensor, 0.5, 1.5)
    return norm


class Branches(nn.Module):
    """RepVGG's block, ACNet's, one of strides, one of groups; chains of convolutions and of linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a3, self.a1, self.n3, self.n1, self.n0 = (
            nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 1, bias=False), *(normed(4) for _ in range(3)),
        )  # fmt: skip
        self.square = nn.Conv2d(4, 8, 3, padding=1)
        self.flat, self.tall = nn.Conv2d(4, 8, (1, 3), padding=(0, 1)), nn.Conv2d(4, 8, (3, 1), padding=(1, 0))
        self.s5, self.s1 = nn.Conv2d(8, 8, 5, 2, 2), nn.Conv2d(8, 8, 1, 2)
        self.g3, self.g1 = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2), nn.Conv2d(8, 8, 1, groups=2)
        self.before, self.norm, self.after = nn.Conv2d(8, 12, 1), normed(12), nn.Conv2d(12, 6, 3)
        self.one, self.two, self.three = nn.Linear(6, 9), nn.Linear(9, 7, bias=False), nn.Linear(7, 5)

    def forward(self, x: Any) -> Any:
        x = torch.relu(self.n3(self.a3(x)) + self.n1(self.a1(x)) + self.n0(x))
        x = torch.relu(self.square(x) + (self.flat(x) + self.tall(x)))
        x = torch.relu(self.s5(x) + self.s1(x))
        x = torch.relu(self.g3(x) + self.g1(x) + x)
        x = torch.relu(self.after(self.norm(self.before(x))))
        return self.three(self.two(self.one(x.mean((2, 3)))))


def torch_branches() -> sl.Model:
    torch.manual_seed(0)
    return sl.load(Branches().eval(), X[:2])


def keras_branches() -> sl.Model:
    pytest.importorskip("keras")
    from slimline.frameworks.base import adapter

    adapter("keras")
    import keras

    keras.utils.set_random_seed(0)
    layers = keras.layers

    def norm() -> Any:
        return layers.BatchNormalization(
            gamma_initializer="random_uniform",
            beta_initializer="random_normal",
            moving_mean_initializer="random_normal",
        )

    x = inputs = keras.Input((9, 9, 4))
    three, one = layers.Conv2D(4, 3, padding="same", name="a3"), layers.Conv2D(4, 1, use_bias=False, name="a1")
    x = layers.ReLU()(layers.Add()([norm()(three(x)), norm()(one(x)), norm()(x)]))
    flat, tall = layers.Conv2D(8, (1, 3), padding="same"), layers.Conv2D(8, (3, 1), padding="same")
    x = layers.ReLU()(layers.Conv2D(8, 3, padding="same", name="square")(x) + (flat(x) + tall(x)))
    x = layers.Conv2D(6, 3, name="after")(norm()(layers.Conv2D(12, 1, name="before")(x)))
    x = layers.GlobalAveragePooling2D()(layers.ReLU()(x))
    return sl.load(keras.Model(inputs, layers.Dense(5)(layers.Dense(7, name="one")(x))))


def onnx_branches() -> sl.Model:
    from tests.frameworks.onnx.graphs import model, weights

    body = (
        "a = Conv<pads = [1, 1, 1, 1]>(x, a3__weight) b = BatchNormalization(a, scale, shift, mean, variance) "
        "c = Conv(x, a1__weight, a1__bias) d = Add(b, c) e = Relu(d) f = Conv(e, before__weight, before__bias) "
        "g = Conv(f, after__weight) h = GlobalAveragePool(g) y = Flatten(h)"
    )
    shapes = {
        "a3__weight": (6, 4, 3, 3), "a1__weight": (6, 4, 1, 1), "a1__bias": (6,), "before__weight": (8, 6, 1, 1),
        "before__bias": (8,), "after__weight": (5, 8, 3, 3), "scale": (6,), "shift": (6,), "mean": (6,),
        "variance": (6,),
    }  # fmt: skip
    stored = weights(**shapes)
    stored["variance"] = np.abs(stored["variance"]) + 0.5
    return sl.load(model(body, stored, "float[N,4,9,9] x"), X[:2])


MERGED = {"torch": 6, "keras": 4, "onnx": 2}
"""How many layers with a weight are left."""


@pytest.mark.parametrize("framework", list(MERGED))
def test_merged_layers_compute_the_same(framework: str, tmp_path: Path) -> None:
    model = {"torch": torch_branches, "keras": keras_branches, "onnx": onnx_branches}[framework]()
    x = X.transpose(0, 2, 3, 1) if framework == "keras" else X
    plan = sl.plan(model, sl.MergeLayers())
    assert isinstance(plan, MergePlan)
    small = sl.apply(model, sl.MergeLayers())
    answer = model.predict(x)
    np.testing.assert_allclose(small.predict(x), answer, rtol=1e-4, atol=1e-5 * np.abs(answer).max())
    assert len(matrices(small.graph)) == MERGED[framework]
    assert not any(node.kind == "batch_norm" for node in small.graph.nodes)
    assert (plan.parameters, plan.macs) == (small.graph.size, cost.macs(small.graph))
    assert plan.parameters < model.graph.size and plan.macs < cost.macs(model.graph)
    merged = [name for row in json.loads(plan.to_json())["merged"] for name in row["layers"]]
    assert len(merged) >= 2 and "->" in str(plan)
    again = sl.load(small.save(tmp_path / f"model{model.adapter.suffix}"))
    np.testing.assert_allclose(again.predict(x), small.predict(x), rtol=1e-5, atol=1e-5)
    assert sl.export(again, again.usual_target, tmp_path).is_file()  # gated: it answers as the model does
    with pytest.raises(SlimlineError, match="Nothing can be merged"):
        sl.apply(small, sl.MergeLayers())


class Bound(nn.Module):
    """What looks as if it could be merged, and cannot: by what is asked for, by zeros around a bias, by an activation,
    by another reader, by other places, or at a greater cost."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case = case
        self.one, self.two = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 6, 3, padding=1)
        self.near, self.far = nn.Conv2d(4, 6, 3, 2, padding=1), nn.Conv2d(4, 6, 3, 2, padding=2, dilation=2)
        self.narrow, self.wide = nn.Conv2d(4, 1, 3), nn.Conv2d(1, 8, 1)

    def forward(self, x: Any) -> Any:
        if self.case == "zeros":
            return self.two(self.one(x))
        if self.case == "activation":
            return self.two(torch.relu(self.one(x)))
        if self.case == "reader":
            x = self.one(x)
            return self.two(x) * x
        if self.case == "places":
            return self.near(x) + self.far(x)
        return self.wide(self.narrow(x))


@pytest.mark.parametrize("case", ["zeros", "activation", "reader", "places", "cost"])
def test_what_is_not_the_same_stays(case: str) -> None:
    model = sl.load(Bound(case).eval(), X[:2])
    with pytest.raises(SlimlineError, match="Nothing can be merged"):
        sl.plan(model, sl.MergeLayers())


@pytest.mark.parametrize("case", ["dilated", "strided", "one way", "groups", "words"])
def test_heavier_layers_are_merged_where_they_are_asked_for(case: str) -> None:
    """Kernels along different sides; strides and zeros go with each; the oracle is the network itself."""
    torch.manual_seed(0)
    first = {
        "dilated": nn.Conv2d(4, 3, (3, 1), padding=(2, 0), dilation=(2, 1), bias=False),
        "strided": nn.Conv2d(4, 3, (3, 1), (2, 1), padding=(1, 0), bias=False),
        "one way": nn.Conv2d(4, 3, (5, 1)),  # no zeros come after its bias
        "groups": nn.Conv2d(4, 8, (3, 1), padding="same", groups=4, bias=False),
        "words": nn.Conv2d(4, 3, (3, 1), padding="same", bias=False),
    }[case]
    second = {
        "one way": nn.Conv2d(3, 6, (1, 3)),
        "groups": nn.Conv2d(8, 8, (1, 3), padding=(0, 1), groups=8),
        "words": nn.Conv2d(3, 6, (1, 3), padding="same"),
        "strided": nn.Conv2d(3, 6, (1, 3), (1, 3), padding=(0, 1)),
    }.get(case, nn.Conv2d(3, 6, (1, 3), padding=(0, 1)))
    model = sl.load(nn.Sequential(first, second, nn.ReLU()).eval(), X[:2])
    small = sl.apply(model, sl.MergeLayers(heavier=True))
    (matrix,) = matrices(small.graph)
    assert matrix.kernel == ((5 if case == "one way" else 3), 3)
    np.testing.assert_allclose(small.predict(X), model.predict(X), rtol=1e-4, atol=1e-5)


def test_what_looks_twice_along_one_side_stays() -> None:
    model = sl.load(nn.Sequential(nn.Conv2d(4, 3, 3, bias=False), nn.Conv2d(3, 6, (1, 3))).eval(), X[:2])
    with pytest.raises(SlimlineError, match="Nothing can be merged"):
        sl.plan(model, sl.MergeLayers(heavier=True))


def test_layers_are_chosen() -> None:
    model = torch_branches()
    assert isinstance(plan := sl.plan(model, sl.MergeLayers(layers=("type:linear",), keep=("three",))), MergePlan)
    assert [m.layers for m in plan.merges] == [("one", "two")]
    with pytest.raises(SlimlineError, match="nowhere"):
        sl.plan(model, sl.MergeLayers(layers=("nowhere",)))
