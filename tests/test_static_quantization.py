"""What StaticQuantization can be told, end to end: grids against closed forms, artifacts against simulations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import slimline as sl
from slimline.basics.errors import SlimlineError
from slimline.graph.edits import FoldNorms
from slimline.graph.ends import first_layers, last_layers
from slimline.methods.formats import IntegerGrid
from slimline.model import portions
from slimline.runtimes.base import runtime
from slimline.steps.quantization.preparation import equalized, pairs

pytest.importorskip("torch")
import torch
from torch import nn

rng = np.random.default_rng(0)
X = rng.normal(size=(96, 3, 8, 8)).astype(np.float32)
DATA = sl.Data(calibration=X)


def network() -> Any:
    """Convolutions, a depthwise one among them, and a linear layer."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU(),
        nn.Conv2d(16, 24, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5),
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def model() -> sl.Model:
    return sl.load(network(), X[:2])


def quantized(model: sl.Model, target: str = "onnxruntime", **settings: Any) -> sl.Model:
    step = sl.StaticQuantization(undo=False, **settings)
    return sl.apply(model, step, DATA, target=target, progress=False)


def grids(model: sl.Model, side: str = "activations") -> dict[str, IntegerGrid]:
    assert model.quantization is not None
    return {name: each for name, each in getattr(model.quantization, side).items() if isinstance(each, IntegerGrid)}


def disagreement(model: sl.Model, folder: Path, target: str = "onnxruntime") -> float:
    """The largest difference between the artifact and its simulation, as a part of the largest answer."""
    sl.export(model, target, folder)
    path = next(p for p in folder.iterdir() if p.suffix == runtime(target).suffix)
    answers, simulated = runtime(target).load(path).run((X,)), model.predict(X)
    return float(np.abs(answers - simulated).max() / np.abs(simulated).max())


@pytest.mark.parametrize("observer", ["minmax", "moving_average", "percentile", "mse", "entropy"])
def test_every_observer_gives_a_model_near_the_float_one(model: sl.Model, observer: str) -> None:
    small = quantized(model, observer=observer, percentile=99.9, batch_size=16)
    error = small.predict(X) - model.predict(X)
    assert np.square(error).sum() < 0.02 * np.square(model.predict(X)).sum()


@pytest.mark.parametrize(("observer", "most"), [("mse", 1), ("moving_average", 32)])
def test_activations_are_observed_in_bounded_memory(
    model: sl.Model, observer: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = grids(quantized(model, observer=observer, batch_size=32))
    seen: list[int] = []
    observe = type(model.adapter).observe

    def watched(adapter: Any, native: Any, batches: Any, values: Any, see: Any, *more: Any) -> None:
        def noted(name: str, array: np.ndarray) -> None:
            seen.append(len(array))
            see(name, array)

        observe(adapter, native, batches, values, noted, *more)

    monkeypatch.setattr(type(model.adapter), "observe", watched)
    monkeypatch.setattr(portions, "BYTES", 1)
    after = grids(quantized(model, observer=observer, batch_size=32))
    assert max(seen) == most
    for name, grid in before.items():  # sums in another order
        assert float(after[name].scale) == pytest.approx(float(grid.scale), rel=1e-3)


@pytest.mark.parametrize("activations", ["uint8", "int8"])
def test_symmetric_activations_have_their_zero_in_the_middle(model: sl.Model, activations: str, tmp_path: Path) -> None:
    small = quantized(model, symmetric=True, activations=activations)
    zeros = {int(grid.zero) for grid in grids(small).values()}
    assert zeros == ({0} if activations == "int8" else {0, 128})  # 128: the input, 0: behind a ReLU
    assert disagreement(small, tmp_path) < 0.02


def test_first_and_last_layers_by_rule_and_an_override_before_it(model: sl.Model) -> None:
    assert first_layers(model.graph) == {"0"} and last_layers(model.graph) == {"9"}
    small = quantized(model, first_layers="float32", last_layers="float32")
    assert set(grids(small, "weights")) == {"3.weight", "5.weight"}
    other = quantized(model, first_layers="float32", overrides={"0": {"weights": "int8"}})
    assert "0.weight" in grids(other, "weights")


def test_ends_of_a_network_with_branches() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

        def forward(self, x: Any) -> Any:
            first = self.a(x) + self.b(x)
            return self.c(first).relu(), self.d(first)

    graph = sl.load(Two().eval(), np.zeros((2, 4), np.float32)).graph
    assert first_layers(graph) == {"a", "b"} and last_layers(graph) == {"c", "d"}


def test_one_scale_for_all_weights_but_where_an_override_says_otherwise(model: sl.Model) -> None:
    small = quantized(model, granularity="tensor", overrides={"9": {"granularity": "channel"}})
    sizes = {name: grid.scale.size for name, grid in grids(small, "weights").items()}
    assert sizes == {"0.weight": 1, "3.weight": 1, "5.weight": 1, "9.weight": 5}


def squared_error(one: sl.Model, other: sl.Model) -> float:
    return float(np.square(one.predict(X) - other.predict(X)).sum())


def test_weights_of_four_bits_are_stored_so_and_run_in_integer_kernels(model: sl.Model, tmp_path: Path) -> None:
    small = quantized(model, weights="int4", last_layers="int8", rounding="gptq", granularity="channel")
    weights = grids(small, "weights")
    assert {name for name, grid in weights.items() if grid.bits == 4} == {"0.weight", "3.weight", "5.weight"}
    for name, grid in weights.items():
        stored = small.parameters()[name]
        assert np.allclose(grid.round(stored), stored, atol=1e-7)
    assert disagreement(small, tmp_path) < 0.02
    path = next(tmp_path.glob("*.onnx"))
    held = [t for t in onnx.load(path).graph.initializer if t.data_type == onnx.TensorProto.INT4]
    assert sum(np.prod(t.dims) for t in held) == 16 * 27 + 16 * 9 + 24 * 16
    assert sum(len(t.raw_data) for t in held) == (16 * 27 + 16 * 9 + 24 * 16) // 2
    kinds = runtime("onnxruntime").integer_layers(path)
    assert [kinds[name] for name in ("0", "3", "5", "9")] == ["integer"] * 4


@pytest.mark.parametrize("rounding", ["mse", "gptq", "adaround"])
def test_every_way_of_rounding_beats_the_nearest_code(model: sl.Model, rounding: str) -> None:
    nearest, other = (quantized(model, weights="int4", rounding=each) for each in ("nearest", rounding))
    assert squared_error(other, model) < (0.9 if rounding == "mse" else 0.5) * squared_error(nearest, model)


def test_four_bits_in_the_layers_of_an_override(model: sl.Model) -> None:
    small = quantized(model, overrides={"5": {"weights": "int4"}})
    bits = {name: grid.bits for name, grid in grids(small, "weights").items()}
    assert bits.pop("5.weight") == 4 and set(bits.values()) <= {7, 8}


def test_a_target_that_takes_no_int4_says_which_does(model: sl.Model) -> None:
    with pytest.raises(SlimlineError, match=r"litert computes with no int4 weights .*layer 5.*target onnxruntime"):
        quantized(model, "litert", overrides={"5": {"weights": "int4"}})


def test_what_was_pruned_stays_zero(model: sl.Model) -> None:
    sparse = sl.apply(model, sl.SparsePruning(amount=0.5), DATA, progress=False)
    small = quantized(sparse, weights="int4", rounding="gptq")
    for name, mask in sparse.masks.items():
        if name in grids(small, "weights"):
            assert not small.parameters()[name][~mask].any()


def folded(model: sl.Model) -> sl.Model:
    return replace(model, native=model.edit(FoldNorms()))


def test_equalised_channels_answer_the_same_and_are_alike(model: sl.Model) -> None:
    before = folded(model)
    found = pairs(before.graph)
    assert [(first.layer, second.layer) for _, first, second in found] == [("0", "3"), ("3", "5")]
    after, divisors = equalized(before)
    np.testing.assert_allclose(after.predict(X), model.predict(X), rtol=1e-3, atol=1e-5)
    weights = after.parameters()
    made = np.abs(weights["3.weight"]).reshape(16, -1).max(1)
    read = np.abs(weights["5.weight"]).reshape(24, 16).max(0)
    np.testing.assert_allclose(made, read, rtol=0.02)
    assert set(divisors) == {"3.weight", "5.weight"}


def test_what_is_added_or_clipped_is_not_equalised() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))

        def forward(self, x: Any) -> Any:
            y = self.a(x).relu()
            return self.c(torch.clamp(self.b(y), 0, 6)) + y

    graph = sl.load(Net().eval(), X[:2]).graph
    assert pairs(graph) == []


def uneven() -> sl.Model:
    """Channels of very different ranges, the case that Nagel et al. mend."""
    net = network()
    with torch.no_grad():
        factor = torch.logspace(-1.5, 1.5, 16)
        net[1].weight.mul_(factor)
        net[1].bias.copy_(0.2 * factor)
        net[3].weight.div_(factor.reshape(-1, 1, 1, 1))
    return sl.load(net, X[:2])


def test_equalisation_saves_a_network_of_uneven_channels() -> None:
    net = uneven()
    plain, even = (quantized(net, equalize=each, granularity="tensor") for each in (False, True))
    assert squared_error(even, net) < 0.25 * squared_error(plain, net)


@pytest.mark.parametrize("how", ["empirical", "analytic"])
def test_corrected_biases_leave_the_mean_of_a_layer_where_it_was(how: str) -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 32, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 8, 1))
    x = torch.tensor(X)
    net.train()
    for _ in range(60):  # so that the norm knows its statistics
        net(x)
    model = sl.load(net.eval(), X[:2])
    settings: dict[str, Any] = {"weights": "int4", "first_layers": "int8", "observer": "minmax"}
    plain, mended = (quantized(model, bias_correction=each, **settings) for each in (None, how))
    shifts = [np.abs((each.predict(X) - model.predict(X)).mean((0, 2, 3))).mean() for each in (plain, mended)]
    assert shifts[1] < (0.15 if how == "empirical" else 0.4) * shifts[0]
    both = quantized(model, bias_correction=how, equalize=True, **settings)
    shift = np.abs((both.predict(X) - model.predict(X)).mean((0, 2, 3))).mean()
    assert shift < (0.2 if how == "empirical" else 0.5) * shifts[0]
