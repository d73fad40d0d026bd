"""Light architectures: the published sizes, the same function in both frameworks, pruned exactly, in their runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slimline as sl
from slimline.basics.errors import SlimlineError
from slimline.graph.cost import macs
from slimline.runtimes.base import runtime
from slimline.zoo import architectures, keras

torch = pytest.importorskip("torch")
from safetensors.torch import save_file  # noqa: E402

from slimline.zoo import torch as zoo  # noqa: E402

SMALL: dict[str, dict[str, Any]] = {
    "mobilenet_v1": {"width": 0.25},
    "mobilenet_v2": {"width": 0.25},
    "mobilenet_v3_large": {"width": 0.25},
    "mobilenet_v3_small": {"width": 0.25},
    "squeezenet": {"width": 0.25, "resolution": 0.17},
    "shufflenet_v1": {"width": 0.25},
    "shufflenet_v2": {"width": 0.25},
    "ghostnet": {"width": 0.25},
    "efficientnet_lite": {"width": 0.25, "depth": 0.5},
    "vit": {"width": 0.25, "resolution": 1 / 7, "depth": 2, "patch": 8},
    "tinybert": {"width": 0.1, "depth": 2, "heads": 3, "length": 7, "vocabulary": 30},
}
"""Settings of one small network of each architecture."""
PRUNABLE = {"shufflenet_v1": {"groups": 1}}
"""Settings with which channels can go: with groups, sums, shuffles and concatenations tie them all together."""


def quick(*names: str) -> list[Any]:
    """All architectures, of which those that are not named are slow to test."""
    return [pytest.param(name, marks=[] if name in names else pytest.mark.slow) for name in SMALL]


def small(name: str) -> dict[str, Any]:
    of_images = {} if name == "tinybert" else {"resolution": 0.145, "in_channels": 2}
    return {"classes": 5, **of_images, **SMALL[name]}


def unsettled(name: str, **settings: Any) -> zoo.Network:
    """A network with statistics of its own signals, and no norm that does nothing; a small one by default."""
    torch.manual_seed(0)
    network = getattr(zoo, name)(**(settings or small(name)))
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(module.weight)
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.LayerNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.2)
    with torch.no_grad():
        network.train()(*map(torch.from_numpy, network.architecture.example(8)))
    return network.eval()


def rows(network: zoo.Network, channels_last: bool = False) -> tuple[np.ndarray, ...]:
    """Inputs of three samples, of which some texts are shorter."""
    inputs = network.architecture.example(3, channels_last)
    if len(inputs) > 1:
        inputs[1][1:, -3:] = 0
    return inputs


def close(mine: Any, other: Any) -> None:
    mine, other = np.asarray(mine), np.asarray(other)
    size = float(np.abs(other).max())
    assert np.ptp(other, axis=0).max() > 0.02 * size  # the samples do not all answer alike
    np.testing.assert_allclose(mine, other, rtol=1e-3, atol=1e-4 * size)


def test_every_architecture_is_here_and_in_both_frameworks() -> None:
    names = {name for name, each in vars(architectures).items() if callable(each)}
    assert names == SMALL.keys()
    for name in names:
        assert getattr(zoo, name).__doc__ == getattr(keras, name).__doc__ == getattr(architectures, name).__doc__


@pytest.mark.parametrize(
    ("name", "settings", "parameters"),
    [
        ("mobilenet_v1", {}, 4_231_976),
        ("mobilenet_v2", {}, 3_504_872),
        ("mobilenet_v3_large", {}, 5_483_032),
        ("mobilenet_v3_small", {}, 2_542_856),
        ("squeezenet", {}, 1_235_496),
        ("shufflenet_v1", {}, 1_865_728),
        ("shufflenet_v1", {"groups": 8}, 2_434_768),
        ("shufflenet_v2", {}, 2_278_604),
        ("shufflenet_v2", {"width": 0.5}, 1_366_792),
        ("ghostnet", {}, pytest.approx(5.18e6, abs=5e3)),  # published with three digits
        ("efficientnet_lite", {}, 4_652_008),
        ("efficientnet_lite", {"width": 1.4, "depth": 1.8}, 13_006_568),
        ("vit", {}, 5_717_416),
        ("tinybert", {"length": 512}, 14_350_248 - 2 * 312 + 313 * 2),  # no segments; a head
    ],
)
def test_parameters_are_those_that_are_published(name: str, settings: dict[str, Any], parameters: int) -> None:
    with torch.device("meta"):
        network = getattr(zoo, name)(**settings)
    assert sum(p.numel() for p in network.parameters()) == parameters


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("mobilenet_v1", 569),
        ("mobilenet_v2", 300),
        ("mobilenet_v3_large", 219),
        ("mobilenet_v3_small", 56),
        ("squeezenet", 349),
        ("shufflenet_v1", 140),
        ("shufflenet_v2", 146),
        ("ghostnet", 141),
        ("efficientnet_lite", 390),  # of B0, whose squeeze-and-excites multiply little
    ],
)
def test_multiplications_are_those_that_are_published(name: str, millions: int) -> None:
    network = getattr(zoo, name)().eval()
    model = sl.load(network, network.architecture.example())
    assert macs(model.graph) == pytest.approx(1e6 * millions, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "theirs", "settings"),
    [
        ("mobilenet_v2", "MobileNetV2", {"alpha": 0.35}),
        ("mobilenet_v3_small", "MobileNetV3Small", {"include_preprocessing": False}),
        ("mobilenet_v3_large", "MobileNetV3Large", {"include_preprocessing": False}),
    ],
)
def test_the_function_is_that_of_keras_applications(
    name: str, theirs: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """At odd sizes, where Keras pads both sides of an image alike, as torch always does."""
    from keras import applications, layers

    options = {"input_shape": (65, 65, 3), "weights": None, "classes": 5, "classifier_activation": None}
    other = getattr(applications, theirs)(**options, **settings)
    mine = {"width": settings.get("alpha", 1.0), "resolution": 65 / 224, "classes": 5}
    save_file(unsettled(name, **mine).state_dict(), tmp_path / "weights.safetensors")
    network = getattr(keras, name)(**mine)
    keras.load_torch_weights(network, tmp_path / "weights.safetensors")
    for layer in (*network.layers, *other.layers):
        if isinstance(layer, layers.BatchNormalization):
            layer.epsilon = 1e-3
    for weight, source in zip(other.weights, network.weights, strict=True):
        weight.assign(np.reshape(source, weight.shape))
    x = np.random.default_rng(0).random((2, 65, 65, 3), dtype=np.float32)
    close(network(x), other(x))


@pytest.mark.parametrize("name", quick("mobilenet_v3_small", "squeezenet", "vit", "tinybert"))
def test_weights_move_across_and_outputs_agree(name: str, tmp_path: Path) -> None:
    network = unsettled(name)
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    twin = getattr(keras, name)(**small(name))
    keras.load_torch_weights(twin, tmp_path / "weights.safetensors")
    with torch.no_grad():
        expected = network(*map(torch.from_numpy, rows(network))).numpy()
    inputs = rows(network, channels_last=True)
    close(twin(list(inputs) if len(inputs) > 1 else inputs[0]), expected)
    state = {key: value for key, value in network.state_dict().items() if "num_batches" not in key}
    assert twin.count_params() == sum(value.numel() for value in state.values())


@pytest.mark.parametrize("name", quick("squeezenet", "tinybert"))
def test_pruned_exactly_in_torch_and_equal_in_onnx_runtime(name: str, tmp_path: Path) -> None:
    network = unsettled(name, **small(name), **PRUNABLE.get(name, {}))
    model = sl.load(network, network.architecture.example())
    plan = sl.plan(model, sl.ChannelPruning(ratio=0.4, criterion="l2"))
    less, masked = plan.apply(model), plan.mask(model)
    assert sum(a.size for a in less.parameters().values()) < 0.8 * sum(a.size for a in model.parameters().values())
    inputs = rows(network)
    (expected,) = masked.outputs(*inputs)
    close(less.outputs(*inputs)[0], expected)
    session = runtime("onnxruntime").load(sl.export(less, "onnxruntime", tmp_path))
    close(session.outputs(inputs)[0], expected)


@pytest.mark.parametrize("name", quick("squeezenet"))
def test_pruned_exactly_in_keras_and_equal_in_litert(name: str, tmp_path: Path) -> None:
    settings = {**small(name), **PRUNABLE.get(name, {})}
    network = unsettled(name, **settings)
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    twin = getattr(keras, name)(**settings)
    keras.load_torch_weights(twin, tmp_path / "weights.safetensors")
    model = sl.load(twin)
    plan = sl.plan(model, sl.ChannelPruning(ratio=0.4, criterion="l2"))
    less, masked = plan.apply(model), plan.mask(model)
    assert sum(a.size for a in less.parameters().values()) < 0.8 * sum(a.size for a in model.parameters().values())
    inputs = rows(network, channels_last=True)
    (expected,) = masked.outputs(*inputs)
    close(less.outputs(*inputs)[0], expected)
    session = runtime("litert").load(sl.export(less, "litert", tmp_path / "artifact"))
    close(session.outputs(inputs)[0], expected)


@pytest.mark.slow
def test_groups_of_shufflenet_say_that_they_cannot_be_pruned() -> None:
    network = unsettled("shufflenet_v1")
    model = sl.load(network, network.architecture.example())
    with pytest.raises(SlimlineError, match="Nothing can be pruned"):
        sl.plan(model, sl.ChannelPruning(ratio=0.4, criterion="l2"))


def test_what_a_mask_hides_does_not_matter() -> None:
    network = unsettled("tinybert")
    tokens, mask = map(torch.from_numpy, rows(network))
    other = tokens.clone()
    other[1:, -3:] = 3
    with torch.no_grad():
        before, after = network(tokens, mask), network(other, mask)
    torch.testing.assert_close(before, after)
    assert not torch.allclose(before[1:], network(other, torch.ones_like(mask))[1:])


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("mobilenet_v1", {"width": 0}, "width is 0: give a number from 0.01 to 16"),
        ("mobilenet_v2", {"width": float("nan")}, "width is nan"),
        ("mobilenet_v2", {"width": True}, "width is True"),
        ("mobilenet_v3_small", {"resolution": "1"}, "resolution is '1'"),
        ("mobilenet_v3_large", {"classes": 0}, "classes is 0: give a whole number from 1"),
        ("squeezenet", {"in_channels": 2.5}, "in_channels is 2.5"),
        ("squeezenet", {"resolution": 0.1}, "makes images of 22 × 22, and this network needs 27 × 27: .* 0.13"),
        ("shufflenet_v1", {"groups": 5}, "groups is 5: give 1, 2, 3, 4 or 8"),
        ("efficientnet_lite", {"depth": 17}, "depth is 17"),
        ("vit", {"patch": 15}, "Patches of 15 do not fill images of 224 × 224"),
        ("vit", {"heads": 0}, "heads is 0"),
        ("tinybert", {"length": -1}, "length is -1"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(name: str, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SlimlineError, match=sentence):
        getattr(architectures, name)(**settings)
