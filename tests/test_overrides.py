"""Layers with settings of their own inside a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import slimline as sl
from slimline.basics.errors import SlimlineError
from slimline.runtimes.base import runtime
from slimline.steps.quantization.calibration import placed

torch = pytest.importorskip("torch")
nn = torch.nn

X = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def model() -> sl.Model:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
    net.append(nn.Linear(16, 3))
    return sl.load(net.eval(), X[:2])


def widths(plan: Any) -> dict[str, int]:
    """What is left of the unit that each layer makes."""
    return {u.layers[0]: u.size - len(plan.removed.get(u.name, ())) for u in plan.units.units}


@pytest.mark.parametrize("scope", ["local", "global", "isomorphic"])
def test_units_of_overridden_layers_lose_their_own_ratio(model: sl.Model, scope: str) -> None:
    step = sl.ChannelPruning(
        ratio=0.5, scope=scope, layers=("0", "2", "4"), keep=(), overrides={"re:0": {"ratio": 0.25}}
    )
    found = sl.plan(model, step)
    assert widths(found)["0"] == 12
    assert sum(widths(found).values()) == 12 + 16
    np.testing.assert_allclose(found.apply(model).predict(X), found.mask(model).predict(X), atol=1e-5)


def test_the_first_pattern_that_fits_counts(model: sl.Model) -> None:
    step = sl.ChannelPruning(ratio=0.5, overrides={"4": {"ratio": 0}, "*": {"ratio": 0.75}})
    assert widths(sl.plan(model, step)) == {"0": 4, "2": 4, "4": 16}


def test_a_target_counts_what_overrides_leave(model: sl.Model) -> None:
    step = sl.ChannelPruning(target_parameters=0.6, overrides={"0": {"ratio": 0}})
    found = sl.plan(model, step)
    assert widths(found)["0"] == 16
    assert 0.5 * model.graph.size < found.parameters <= 0.6 * model.graph.size
    with pytest.raises(SlimlineError, match="Pruning cannot reach"):
        sl.plan(model, sl.ChannelPruning(target_parameters=0.3, overrides={"*": {"ratio": 0}}))


def test_rounds_reach_every_ratio(model: sl.Model) -> None:
    step = sl.ChannelPruning(ratio=0.5, schedule="uniform", rounds=2, overrides={"2": {"ratio": 0.75}})
    small = sl.apply(model, step)
    shapes = {name: array.shape for name, array in small.parameters().items()}
    assert (shapes["0.weight"], shapes["2.weight"], shapes["4.weight"]) == ((8, 6), (4, 8), (8, 4))


@pytest.mark.parametrize("scope", ["local", "row", "global", "erk"])
def test_single_weights_of_overridden_layers(model: sl.Model, scope: str) -> None:
    step = sl.SparsePruning(amount=0.5, scope=scope, overrides={"2": {"amount": 0.25}, "6": {"amount": 0}})
    zeros = {name: int((~mask).sum()) for name, mask in sl.apply(model, step).masks.items()}
    assert zeros["2.weight"] == 64 and zeros["6.weight"] == 0
    assert zeros["0.weight"] + zeros["4.weight"] == (96 + 256) // 2


def test_optimal_brain_surgery_sees_as_many_weights_as_the_largest_amount_needs(model: sl.Model) -> None:
    data = sl.Data(calibration=X)
    step = sl.SparsePruning(amount=0.1, criterion="obs", compensate=True, overrides={"2": {"amount": 0.9}})
    zeros = {name: float((~mask).mean()) for name, mask in sl.apply(model, step, data).masks.items()}
    assert zeros["2.weight"] == pytest.approx(0.9, abs=0.01) and zeros["4.weight"] == pytest.approx(0.1, abs=0.01)


def _scales(model: sl.Model, **fields: Any) -> list[float]:
    """Of the input and of the three values behind it, in the order of the model."""
    data = sl.Data(calibration=X)
    quantized = sl.apply(model, sl.StaticQuantization(undo=False, **fields), data, target="onnxruntime", progress=False)
    assert quantized.quantization is not None
    return [float(each.scale) for each in quantized.quantization.activations.values()]


@pytest.mark.parametrize("pattern", ["2", "3", "re:[23]"], ids=["linear", "relu", "both"])
def test_values_of_overridden_layers_are_observed_in_their_own_way(model: sl.Model, pattern: str) -> None:
    own = {"observer": "percentile", "percentile": 90}
    mse, cut = _scales(model), _scales(model, **own)
    assert len(mse) == 4 and all(a > b for a, b in zip(mse, cut, strict=True))
    assert _scales(model, overrides={pattern: own}) == [mse[0], mse[1], cut[2], mse[3]]


def test_weights_of_overridden_layers_have_a_scale_or_none_of_their_own(model: sl.Model, tmp_path: Path) -> None:
    overrides = {"4": {"weights": "int8"}, "[46]": {"weights": "float32"}, "2": {"granularity": "tensor"}}
    step = sl.StaticQuantization(undo=False, overrides=overrides)
    data = sl.Data(calibration=X)
    quantized = sl.apply(model, step, data, target="onnxruntime", progress=False)
    assert quantized.quantization is not None
    grids = quantized.quantization.weights
    assert {name: each.arrays["scale"].size for name, each in grids.items()} == {
        "0.weight": 16, "2.weight": 1, "4.weight": 16,
    }  # fmt: skip
    weight, plain = model.parameters()["2.weight"], sl.apply(model, sl.StaticQuantization(undo=False), data)
    bits = 8 if "int8" in grids["2.weight"].describe() else 7
    assert float(grids["2.weight"].arrays["scale"]) == pytest.approx(
        np.abs(weight).max() / (2 ** (bits - 1) - 1), rel=1e-6
    )
    assert plain.quantization is not None and grids["4.weight"] == plain.quantization.weights["4.weight"]
    assert quantized.quantization.summary()["weights"] == {
        f"int{bits}, symmetric, per position of axis 0": 2, f"int{bits}, symmetric, per tensor": 1,
    }  # fmt: skip
    artifact = sl.export(quantized, "onnxruntime", tmp_path)
    path = next(tmp_path.rglob("*.onnx"))
    stored = [onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer]
    scales = {grids[name].arrays["scale"].size: grids[name].arrays["scale"].ravel() for name in grids}
    assert any(a.size == 1 and a.dtype == np.float32 and a.ravel()[0] == scales[1][0] for a in stored), artifact
    layers = runtime("onnxruntime").integer_layers(path)
    kept = sl.apply(model, sl.StaticQuantization(undo=False, keep=("6",)), data, target="onnxruntime", progress=False)
    sl.export(kept, "onnxruntime", tmp_path / "kept")
    assert layers == runtime("onnxruntime").integer_layers(next((tmp_path / "kept").rglob("*.onnx")))
    assert layers["2"] == "integer" and layers["6"] != "integer"


def test_a_target_that_takes_one_scale_refuses_more_before_any_work(model: sl.Model) -> None:
    step = sl.StaticQuantization(undo=False, overrides={"2": {"granularity": "channel"}})
    up = sl.load(nn.Sequential(nn.ReLU(), nn.ReLU(), nn.ConvTranspose2d(4, 4, 2)).eval(), np.ones((2, 4, 3, 3), "f"))
    with pytest.raises(
        SlimlineError, match=r"litert takes one scale for the weights of layer 2: leave granularity out"
    ):
        placed(up, step, "litert")
    for target in ("litert", "onnxruntime"):
        assert placed(model, step, target)[1].weights["2.weight"] == 0
    whole = sl.StaticQuantization(overrides={"2": {"granularity": "tensor"}})
    assert placed(model, whole, "litert")[1].weights == {"0.weight": 0, "2.weight": None, "4.weight": 0, "6.weight": 0}


def test_an_input_is_observed_as_the_layer_that_reads_it_and_the_first_pattern_counts(model: sl.Model) -> None:
    mse, widest, cut = (
        _scales(model),
        _scales(model, observer="minmax"),
        _scales(model, observer="percentile", percentile=90),
    )
    overrides = {"0": {"observer": "percentile", "percentile": 90}, "*": {"observer": "minmax"}}
    assert _scales(model, overrides=overrides) == [cut[0], cut[1], *widest[2:]]
    only = _scales(model, observer="percentile", percentile=90, overrides={"4": {"percentile": 100}})
    assert only[:3] == cut[:3] and only[3] > cut[3]
    assert mse[0] != cut[0]


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (lambda: sl.StaticQuantization(overrides={"0": {}}), "says nothing"),
        (lambda: sl.StaticQuantization(overrides={"0": {"percentile": 99}}), "give it observer: percentile too"),
        (
            lambda: sl.StaticQuantization(overrides={"0": {"weights": "float32", "granularity": "tensor"}}),
            "nothing beside weights: float32",
        ),
        (lambda: sl.StaticQuantization(overrides={"0": {"weights": "int9"}}), "weights"),
        (lambda: sl.StaticQuantization(overrides={"0": {"samples": 3}}), "no field in QuantizationOverride"),
        (lambda: sl.StaticQuantization(overrides={"0": {"activations": "int8"}}), "no field in QuantizationOverride"),
        (lambda: sl.StaticQuantization(overrides={"0": {"observer": "max"}}), "did you mean 'minmax'"),
        (lambda: sl.ChannelPruning(ratio=0.5, overrides={"0": {"ratio": 1.5}}), "ratio of ChannelOverride"),
        (
            lambda: sl.ChannelPruning(ratio=0.5, overrides={"0": {"ratio": 0.1, "criterion": "l1"}}),
            "no field in ChannelOverride",
        ),
        (lambda: sl.ChannelPruning(ratio=0.5, overrides={"re:(": {"ratio": 0.1}}), "is no regular expression"),
        (
            lambda: sl.ChannelPruning(ratio=0.5, axes=("inputs",), overrides={"0": {"ratio": 0.1}}),
            "takes no overrides",
        ),
        (
            lambda: sl.SparsePruning(pattern="2:4", overrides={"0": {"amount": 0.1}}),
            "takes overrides only of an amount",
        ),
    ],
)
def test_overrides_that_mean_nothing_are_refused(step: Any, said: str) -> None:
    with pytest.raises(SlimlineError, match=said):
        step()


@pytest.mark.parametrize(
    "step",
    [
        sl.ChannelPruning(ratio=0.5, overrides={"conv9": {"ratio": 0.1}}),
        sl.SparsePruning(amount=0.5, overrides={"conv9": {"amount": 0.1}}),
        sl.StaticQuantization(overrides={"conv9": {"observer": "minmax"}}),
    ],
    ids=["channels", "sparse", "quantization"],
)
def test_a_pattern_that_fits_no_layer_is_refused(model: sl.Model, step: Any) -> None:
    with pytest.raises(SlimlineError, match=r"no layer .*for overrides 'conv9'"):
        sl.apply(model, step, sl.Data(calibration=X))


def test_recipes_write_them_down() -> None:
    from slimline.recipe import parse

    quantization = sl.StaticQuantization(overrides={"head": {"observer": "percentile", "percentile": 99.9}})
    whole = sl.Recipe(steps=(sl.ChannelPruning(ratio=0.5, overrides={"*": {"ratio": 0.3}}), quantization))
    assert parse(whole.dump()) == whole
    recipe = sl.Recipe(steps=(sl.ChannelPruning(ratio=0.5, overrides={"stages.2.*": {"ratio": 0.3}}),))
    assert parse(recipe.dump()) == recipe
    text = "steps:\n  - {step: ChannelPruning, ratio: 0.5, overrides: {'stages.2.*': {ratio: 0.3}}}\n"
    assert parse(text) == recipe
