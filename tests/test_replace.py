"""A layer that gives way to two in a row: exact, saved, loaded, trained, pruned and exported, in both frameworks."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

import slimline as sl
from slimline.basics.errors import SlimlineError
from slimline.graph.edits import Edit, Replace
from slimline.graph.matrix import LayerMatrix, matrices
from slimline.graph.operators import Convolution, Linear, Operator

RNG = np.random.default_rng(0)
SIDE = 9


def torch_model() -> tuple[Any, np.ndarray]:
    torch = pytest.importorskip("torch")
    nn = torch.nn
    torch.manual_seed(0)
    net = nn.Sequential()
    net.add_module("stem", nn.Conv2d(3, 6, 3, 2, 1))
    net.add_module("relu", nn.ReLU())
    net.add_module("wide", nn.Conv2d(6, 8, (3, 5), padding="same", dilation=(2, 1)))
    net.add_module("mean", nn.AdaptiveAvgPool2d(1))
    net.add_module("flat", nn.Flatten())
    net.add_module("head", nn.Linear(8, 5))
    return net.eval(), RNG.normal(size=(4, 3, SIDE, SIDE)).astype(np.float32)


def keras_model() -> tuple[Any, np.ndarray]:
    pytest.importorskip("keras")
    from slimline.frameworks.base import adapter

    adapter("keras")
    import keras

    keras.utils.set_random_seed(0)
    layers = keras.layers
    x = inputs = keras.Input((SIDE, SIDE, 3))
    x = layers.Conv2D(6, 3, 2, "same", activation="relu", name="stem")(x)
    x = layers.Conv2D(8, (3, 5), padding="same", dilation_rate=(2, 1), name="wide")(x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(5, name="head")(x)), RNG.normal(size=(4, SIDE, SIDE, 3)).astype(np.float32)


@pytest.fixture(params=["torch", "keras"])
def case(request: pytest.FixtureRequest) -> tuple[sl.Model, np.ndarray]:
    native, x = {"torch": torch_model, "keras": keras_model}[request.param]()
    return sl.load(native, x), x


def factors(model: sl.Model, layer: str) -> tuple[Replace, LayerMatrix]:
    """The layer by its full singular value decomposition: k x k to fewer channels, then 1 x 1."""
    matrix = next(m for m in matrices(model.graph) if m.layer == layer)
    stored = model.parameters()
    (w,) = matrix.matrix(stored[matrix.weight])
    left, values, right = np.linalg.svd(w, full_matrices=False)
    first, second = values[:, None] * right, left
    bias = stored[matrix.bias] if matrix.bias else None
    operators: tuple[Operator, Operator] = (Linear(first), Linear(second, bias))
    if matrix.kernel:
        channels = w.shape[1] // int(np.prod(matrix.kernel))
        shape = (len(values), channels, *matrix.kernel)
        ones = (1,) * len(matrix.kernel)
        operators = (
            Convolution(first.reshape(shape), None, matrix.window),
            Convolution(second.reshape(*second.shape, *ones), bias),
        )
    return Replace(layer, matrix.input, matrix.output, operators), matrix


@pytest.mark.parametrize("layer", ["stem", "wide", "head"])
def test_two_layers_in_the_place_of_one(case: tuple[sl.Model, np.ndarray], layer: str, tmp_path: Path) -> None:
    model, x = case
    change, matrix = factors(model, layer)
    before = model.predict(x)
    parted = model.edited((change,), {"step": "factorise"})
    np.testing.assert_allclose(parted.predict(x), before, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(model.predict(x), before)  # the original stays as it was
    named = [m.layer for m in matrices(parted.graph)]
    place = [m.layer for m in matrices(model.graph)].index(layer)
    assert named[place : place + 2] == [f"{layer}.0", f"{layer}.1"]
    assert matrix.weight not in parted.graph.parameters
    assert f"{layer}.0" in parted.graph.types and layer not in parted.graph.types

    again = sl.load(parted.save(tmp_path / f"model{model.adapter.suffix}"))
    np.testing.assert_allclose(again.predict(x), parted.predict(x), rtol=1e-6, atol=1e-6)
    assert [m.layer for m in matrices(again.graph)] == named

    artifact = sl.export(again, again.usual_target, tmp_path)  # gated: it answers as the model does
    assert artifact.is_file()

    thin = sl.plan(again, sl.ChannelPruning(ratio=0.5, criterion="l2", layers=(f"{layer}.0",)))
    np.testing.assert_allclose(thin.apply(again).predict(x), thin.mask(again).predict(x), rtol=1e-4, atol=1e-5)
    assert thin.parameters < again.graph.size


@pytest.mark.parametrize("layer", ["wide", "head"])
def test_the_parts_are_trained(case: tuple[sl.Model, np.ndarray], layer: str) -> None:
    model, x = case
    change, _ = factors(model, layer)
    parted = model.edited((change,), {"step": "factorise"})
    data = sl.Data(train=(np.repeat(x, 8, 0),), seed=1)
    trained = sl.apply(parted, sl.Distillation(epochs=1, learning_rate=1e-2, batch_size=8), data)
    names = [name for name in trained.graph.trainable if name.startswith(f"{layer}.")]
    assert len(names) == 3
    old, new = parted.parameters(), trained.parameters()
    assert all((old[name] != new[name]).any() for name in names)


@pytest.mark.parametrize("layer", ["wide", "head"])
def test_what_is_said_of_a_model_names_the_parts(case: tuple[sl.Model, np.ndarray], layer: str) -> None:
    model, x = case
    change, _ = factors(model, layer)
    parted = model.edited((change,), {"step": "factorise"})
    parts = {f"{layer}.0", f"{layer}.1"}
    listed = {row["layer"] for row in json.loads(sl.inspect(parted).to_json())["layers"]}
    assert parts <= listed and layer not in listed
    quantized = sl.apply(parted, sl.StaticQuantization(undo=False), sl.Data(calibration=(x,)))
    assert quantized.quantization is not None
    assert parts <= {*quantized.quantization.layers, *quantized.quantization.float_layers}
    answer = model.predict(x)
    np.testing.assert_allclose(quantized.predict(x), answer, atol=0.1 * np.abs(answer).max())


def test_frozen_layers_give_frozen_parts() -> None:
    net, x = torch_model()
    net.head.requires_grad_(False)
    model = sl.load(net, x)
    change, _ = factors(model, "head")
    parted = model.edited((change,), {"step": "factorise"})
    assert {name for name in parted.graph.frozen if name.startswith("head")} == {
        "head.0.weight",
        "head.1.weight",
        "head.1.bias",
    }


def test_a_shared_layer_is_not_replaced_in_one_place() -> None:
    torch = pytest.importorskip("torch")

    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = torch.nn.Linear(4, 4)

        def forward(self, x: Any) -> Any:
            return self.both(self.both(x).relu())

    model = sl.load(Twice(), np.ones((2, 4), np.float32))
    change, _ = factors(model, "both")
    with pytest.raises(SlimlineError, match="shares its weights"):
        model.edited((change,), {"step": "factorise"})


def test_a_quantized_model_is_not_edited(case: tuple[sl.Model, np.ndarray]) -> None:
    model, x = case
    change, _ = factors(model, "head")
    data = sl.Data(calibration=(x,))
    quantized = sl.apply(model, sl.StaticQuantization(undo=False), data)
    with pytest.raises(SlimlineError, match="prune first, then quantize"):
        quantized.edited((change,), {"step": "factorise"})


@pytest.mark.parametrize("layer", ["wide", "head"])
def test_another_shape_than_the_layer_gave_is_refused(case: tuple[sl.Model, np.ndarray], layer: str) -> None:
    model, _ = case
    change, _ = factors(model, layer)
    narrow = change.operators[-1]
    # One output broadcasts over whatever reads it, so only its shape tells.
    bias = None if narrow.bias is None else narrow.bias[:1]
    operators = (change.operators[0], replace(narrow, weight=narrow.weight[:1], bias=bias))
    with pytest.raises(SlimlineError, match=f"What is to replace {layer} gives"):
        model.edited((replace(change, operators=operators),), {"step": "factorise"})


@pytest.mark.parametrize("layer", ["wide", "head"])
def test_operators_that_do_not_fit_are_refused(case: tuple[sl.Model, np.ndarray], layer: str) -> None:
    model, _ = case
    change, _ = factors(model, layer)
    first = replace(change.operators[0], weight=change.operators[0].weight[:-1])
    with pytest.raises(SlimlineError, match=f"What is to replace {layer} does not fit"):
        model.edited((replace(change, operators=(first, change.operators[1])),), {"step": "factorise"})


@pytest.mark.parametrize("framework", ["torch", "keras"])
def test_every_edit_is_carried_out(framework: str) -> None:
    pytest.importorskip(framework)
    table = import_module(f"slimline.frameworks.{framework}.edit").EDITS
    assert set(table) == set(get_args(Edit))
