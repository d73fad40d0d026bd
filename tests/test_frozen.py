"""What the user froze may be sliced and is never trained; a quantized model is not pruned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slimline as sl
from tests import compress_job

FROZEN = {
    "torch": ("stem.weight", "head.weight"),
    "keras": ("stages_0_0_bn1/beta", "stages_0_0_bn1/gamma", "stages_1_0_conv1/kernel", "stem/kernel"),
}
SHORT: dict[str, Any] = {"epochs": 1, "batch_size": 64, "learning_rate": 0.01, "refresh_batches": 1}


def contented(outputs: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
    """Every epoch is as good as the others, so that the last is kept."""
    return np.ones(len(outputs))


@pytest.fixture(scope="module", params=FROZEN)
def framework(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def data(framework: str) -> sl.Data:
    rng = np.random.default_rng(0)
    x = rng.random((128, *((1, 8, 8) if framework == "torch" else (8, 8, 1))), np.float32)
    y = np.arange(128) % 10
    return sl.Data(train=(x, y), test=(x[:60], y[:60]), metric=contented)


@pytest.fixture(scope="module")
def model(framework: str, data: sl.Data) -> sl.Model:
    """Frozen parameters (torch); a frozen layer, a frozen batch norm and a single frozen variable (Keras)."""
    net = compress_job.model(framework)
    if framework == "torch":
        for name in FROZEN["torch"]:
            net.get_parameter(name).requires_grad = False
    else:
        for name in ("stem", "stages_0_0_bn1"):
            net.get_layer(name).trainable = False
        net.get_layer("stages_1_0_conv1").kernel.trainable = False
    return sl.load(net, data.example())


@pytest.fixture(scope="module")
def small(model: sl.Model) -> sl.Model:
    return sl.apply(model, sl.ChannelPruning(ratio=0.5))


def test_frozen_weights_are_sliced_counted_and_stay_frozen(
    framework: str, model: sl.Model, small: sl.Model, tmp_path: Path
) -> None:
    assert model.graph.frozen == set(FROZEN[framework])
    assert model.graph.frozen < model.graph.trainable
    assert any(small.graph.values[n].shape != model.graph.values[n].shape for n in FROZEN[framework])
    again = sl.load(small.save(tmp_path / f"small{model.adapter.suffix}"))
    masked = sl.plan(model, sl.ChannelPruning(ratio=0.5)).mask(model)
    for made in (small, again, masked, sl.finalize(small), sl.load(again.save(tmp_path / f"b{model.adapter.suffix}"))):
        assert made.graph.frozen == model.graph.frozen
        assert made.graph.trainable == model.graph.trainable


@pytest.mark.parametrize(
    "steps",
    [
        [sl.Distillation(**SHORT)],
        [sl.SparseTraining(**SHORT)],
        [sl.SparseTraining(penalty="l1", **SHORT)],
        [sl.SparseTraining(penalty="l0", **SHORT)],
        [sl.SparseTraining(penalty="batch_norm", **SHORT)],
        [sl.SparsePruning(amount=0.5, schedule="polynomial"), sl.Distillation(**SHORT)],
        [sl.SparsePruning(amount=0.5)],
    ],
    ids=lambda steps: "-".join(f"{s.step}{getattr(s, 'penalty', '')}" for s in steps),
)
def test_nothing_that_trains_or_zeroes_moves_them(small: sl.Model, data: sl.Data, steps: list[Any]) -> None:
    done = sl.apply(small, steps, data)
    before, after = small.parameters(), done.parameters()
    for name in small.graph.frozen:
        np.testing.assert_array_equal(after[name], before[name])
    assert any(not np.array_equal(after[name], before[name]) for name in small.graph.learning)
    assert done.graph.frozen == small.graph.frozen


def test_a_network_that_is_frozen_whole_is_not_trained(framework: str, data: sl.Data) -> None:
    net = compress_job.model(framework)
    if framework == "torch":
        net.requires_grad_(False)
    else:
        net.trainable = False
    model = sl.load(net, data.example())
    assert model.graph.frozen == model.graph.trainable
    assert sl.apply(model, sl.ChannelPruning(ratio=0.5, criterion="taylor", loss="norm"), data).graph.size > 0
    with pytest.raises(sl.SlimlineError, match="Distillation has nothing to train, as all weights are frozen"):
        sl.apply(model, [sl.ChannelPruning(ratio=0.5), sl.Distillation(**SHORT)], data)
    with pytest.raises(sl.SlimlineError, match="are frozen"):
        sl.apply(model, sl.SparsePruning(amount=0.5))


def test_a_quantized_model_is_not_pruned_by_any_road(model: sl.Model, data: sl.Data) -> None:
    plans = [sl.plan(model, sl.ChannelPruning(ratio=0.5)), sl.plan(model, sl.DepthPruning(blocks=("*",)))]
    plans.append(sl.plan(model, sl.ChannelPruning(ratio=0.2, axes=("inputs",))))
    plans.append(sl.plan(model, sl.ActivationPruning(sparsity=0.5), data))
    quantized = sl.apply(model, sl.StaticQuantization(undo=False, samples=32), data)
    for plan in plans:
        for do in (plan.mask, plan.apply):
            with pytest.raises(sl.SlimlineError, match="prune first, then quantize"):
                do(quantized)
    for step in (sl.ChannelPruning(ratio=0.5), sl.DepthPruning(blocks=("*",)), sl.ActivationPruning(sparsity=0.5)):
        with pytest.raises(sl.SlimlineError, match="prune first, then quantize"):
            sl.plan(quantized, step, data)
    unmarked = sl.Model(quantized.adapter, quantized.native, quantized.example, (), quantized.quantization)
    for step in (sl.ChannelPruning(ratio=0.5), sl.SparsePruning(amount=0.5)):
        for before, frozen in (("StaticQuantization", quantized), ("quantization", unmarked)):
            with pytest.raises(sl.SlimlineError, match=f"cannot follow {before}, because"):
                sl.apply(frozen, step, data)
