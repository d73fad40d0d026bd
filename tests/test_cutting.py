"""What layers lose by themselves: smaller kernels and selected inputs, in both frameworks and on their runtimes."""

from __future__ import annotations

import numpy as np
import pytest

import slimline as sl
from slimline.frameworks.base import frameworks
from slimline.graph import cost
from slimline.graph.cuts import Cut, readers
from slimline.plans import CutPlan
from slimline.runtimes.base import runtime
from tests.test_compensation import made

torch = pytest.importorskip("torch")
nn = torch.nn

CONVOLUTIONS = {
    "plain": (nn.Conv2d(3, 4, 3, padding=1), (3, 9, 8)),
    "five": (nn.Conv2d(2, 4, 5, padding=2, bias=False), (2, 9, 8)),
    "valid": (nn.Conv2d(3, 4, 3), (3, 9, 8)),
    "strided": (nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0)), (3, 9, 8)),
    "same": (nn.Conv2d(2, 4, 4, padding="same", dilation=2), (2, 9, 8)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 6, 6)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, padding=1), (4, 6, 6)),
    "one": (nn.Conv1d(3, 5, 5, stride=2, padding=2), (3, 12)),
    "three": (nn.Conv3d(2, 3, (2, 3, 1), padding=(1, 0, 0)), (2, 5, 6, 4)),
}


def keras_convolutions():
    L = pytest.importorskip("keras").layers
    return {
        "plain": (L.Conv2D(4, 3, padding="same"), (9, 8, 3)),
        "five": (L.Conv2D(4, 5, padding="same", use_bias=False), (9, 8, 2)),
        "valid": (L.Conv2D(4, 3), (9, 8, 3)),
        "strided": (L.Conv2D(4, 3, strides=2, padding="same"), (8, 7, 3)),
        "dilated": (L.Conv2D(4, 3, padding="same", dilation_rate=2), (9, 8, 2)),
        "grouped": (L.Conv2D(6, 3, groups=2), (6, 6, 4)),
        "depthwise": (L.DepthwiseConv2D(3, depth_multiplier=2, padding="same"), (6, 6, 4)),
        "causal": (L.Conv1D(5, 3, padding="causal", dilation_rate=2), (12, 3)),
        "one": (L.DepthwiseConv1D(4, padding="same"), (12, 3)),
        "three": (L.Conv3D(3, (2, 3, 1), padding="same", strides=2), (5, 6, 4, 2)),
    }


def alone(framework, kind):
    """A model of one convolution, and inputs."""
    rng = np.random.default_rng(0)
    if framework == "torch":
        layer, shape = CONVOLUTIONS[kind]
        x = rng.normal(size=(3, *shape)).astype(np.float32)
        return sl.load(nn.Sequential(layer).eval(), x[:2]), x
    keras = pytest.importorskip("keras")
    layer, shape = keras_convolutions()[kind]
    inputs = keras.Input(shape)
    return sl.load(keras.Model(inputs, layer(inputs))), rng.normal(size=(3, *shape)).astype(np.float32)


def agree(left, right, x):
    np.testing.assert_allclose(left.predict(x), right.predict(x), atol=2e-6)


KERAS = ("plain", "five", "valid", "strided", "dilated", "grouped", "depthwise", "causal", "one", "three")
CASES = [("torch", kind) for kind in CONVOLUTIONS] + [("keras", kind) for kind in KERAS]


@pytest.mark.parametrize(("framework", "kind"), CASES, ids=["-".join(case) for case in CASES])
def test_any_kernel_within_a_kernel_computes_what_zeros_compute(framework, kind):
    model, x = alone(framework, kind)
    (reader,) = readers(model.graph)
    windows = reader.windows[1:]
    step = max(1, len(windows) // 4)
    for window in [*windows[::step], windows[-1]]:
        plan = CutPlan(model.graph, [Cut(reader, window)])
        small = plan.apply(model)
        agree(plan.mask(model), small, x)
        assert plan.macs == cost.macs(small.graph)
        assert plan.parameters == small.graph.size
        (after,) = readers(small.graph)
        assert after.layer.kernel == tuple(n for _, n, _ in window)


def test_the_outer_ring_goes_without_a_trace():
    """3x3 to 1x1 and 5x5 to 3x3 need neither padding nor cropping of their own."""
    rng = np.random.default_rng(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 5, padding=2), nn.Conv2d(3, 3, 5, padding=2))
    with torch.no_grad():
        for layer, ring in ((net[0], slice(1, 2)), (net[1], slice(1, 4)), (net[2], slice(0, 5, 2))):
            inner = torch.zeros_like(layer.weight)
            inner[:, :, ring, ring] = 1
            layer.weight *= inner
    x = rng.normal(size=(2, 2, 9, 9)).astype(np.float32)
    model = sl.load(net.eval(), x)
    small = sl.apply(
        model, sl.ChannelPruning(target_macs=(6 + 81 + 81) / (54 + 225 + 225), axes=("kernel",), scope="global")
    )
    agree(model, small, x)
    assert [m.layer.kernel for m in readers(small.graph)] == [(1, 1), (3, 3), (3, 3)]
    assert readers(small.graph)[2].layer.window.dilation == (2, 2)
    assert [node.kind for node in small.graph.nodes] == ["conv"] * 3


@pytest.mark.parametrize("framework", ["torch", "keras"])
@pytest.mark.parametrize(("axis", "kind"), [("kernel", "residual"), ("inputs", "residual"), ("inputs", "attention")])
def test_cuts_of_a_network_save_and_serve(framework, axis, kind, tmp_path):
    model, x = made(framework, kind)
    plan = sl.plan(model, sl.ChannelPruning(ratio=0.5, axes=(axis,)))
    small = plan.apply(model)
    agree(plan.mask(model), small, x[:8])
    assert plan.macs == cost.macs(small.graph) < cost.macs(model.graph)
    assert plan.parameters == small.graph.size < model.graph.size
    again = CutPlan.from_json(plan.to_json(), model)
    assert again.summary() == plan.summary()
    assert str(again) == str(plan)
    agree(sl.load(small.save(tmp_path / f"small{small.adapter.suffix}")), small, x[:8])
    target = frameworks()[framework].target
    artifact = sl.export(small, target, tmp_path)
    np.testing.assert_allclose(runtime(target).load(artifact).run((x[:8],)), small.predict(x[:8]), atol=1e-5)
    units = sl.plan(small, sl.ChannelPruning(ratio=0.3))  # what follows sees an ordinary model
    agree(units.mask(small), units.apply(small), x[:8])


@pytest.mark.parametrize("framework", ["torch", "keras"])
@pytest.mark.parametrize(("axis", "target"), [("kernel", 0.5), ("inputs", 0.8)])
def test_obs_meets_its_target_and_repairs(framework, axis, target):
    model, x = made(framework, "residual")
    data = sl.Data(calibration=x[:32], test=(x, np.arange(len(x)) % 5))
    step = sl.ChannelPruning(target_macs=target, axes=(axis,), criterion="obs", scope="global")
    plan = sl.plan(model, step, data)
    assert plan.macs <= target * cost.macs(model.graph)
    broken, repaired = plan.apply(model), sl.apply(model, step, data)
    error = [np.square(m.predict(x[32:]) - model.predict(x[32:])).mean() for m in (broken, repaired)]
    assert error[1] < 0.5 * error[0]
    assert repaired.graph.size == broken.graph.size


@pytest.mark.parametrize("criterion", ["l1", "l2", "taylor", "random"])
@pytest.mark.parametrize("axis", ["kernel", "inputs"])
def test_criteria_choose_by_their_formula(criterion, axis):
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 3, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    x = rng.normal(size=(6, 4, 5, 5)).astype(np.float32)
    model = sl.load(net, x[:2])
    data = sl.Data(calibration=(x, np.arange(6) % 3), test=(x, np.arange(6) % 3))
    plan = sl.plan(model, sl.ChannelPruning(ratio=0.5, axes=(axis,), criterion=criterion), data)
    (cut,) = plan.cuts
    weight = net[0].weight
    nn.functional.cross_entropy(net(torch.from_numpy(x)), torch.arange(6) % 3).backward()
    value = {"l1": weight.abs(), "l2": weight.square(), "taylor": (weight * weight.grad).abs()}.get(criterion)
    if axis == "inputs":
        assert len(cut.channels) == 2
        if value is not None:
            best = np.argsort(-value.detach().numpy().sum((0, 2, 3)))[:2]
            assert cut.channels == tuple(sorted(best.tolist()))
        return
    (first, n, s), (left, m, t) = cut.window
    assert n * m <= 5
    if value is not None:
        each = value.detach().numpy().sum((0, 1))
        kept = each[first : first + n * s : s, left : left + m * t : t].sum() / each.sum()
        smaller = [each[a : a + 2, b : b + 2].sum() / each.sum() for a in (0, 1) for b in (0, 1)]
        assert cut.error == pytest.approx(1 - kept, rel=1e-4)
        assert kept >= max(smaller) - 1e-6


def test_masks_of_single_weights_are_cut_too():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 6, 6)).astype(np.float32)
    model = sl.load(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval(), x)
    sparse = sl.apply(model, sl.SparsePruning(amount=0.5))
    small = sl.apply(sparse, sl.ChannelPruning(ratio=0.5, axes=("kernel",)))
    for name, array in small.parameters().items():
        if name in small.masks:
            assert small.masks[name].shape == array.shape
            assert not array[~small.masks[name]].any()


def test_inputs_that_one_layer_alone_reads_are_left_to_their_maker():
    model, _ = made("torch", "residual")
    plan = sl.plan(model, sl.ChannelPruning(ratio=0.5, axes=("inputs",)))
    assert {cut.reader.layer.layer for cut in plan.cuts} == {"stem.0", "a.0", "head"}
    assert "b.0 keeps its input channels: only it reads those of a.0" in plan.notes[0]
    with pytest.raises(sl.SlimlineError, match=r"There are no inputs to prune: b\.0 keeps its input channels"):
        sl.plan(model, sl.ChannelPruning(ratio=0.5, axes=("inputs",), layers=("b.0",)))


def test_several_rounds_and_a_plan_of_another_model():
    model, x = made("torch", "residual")
    data = sl.Data(calibration=x, test=(x, np.arange(len(x)) % 5))
    step = sl.ChannelPruning(target_macs=0.5, axes=("kernel",), criterion="obs", schedule="uniform", rounds=2)
    small = sl.apply(model, step, data)
    assert cost.macs(small.graph) <= 0.5 * cost.macs(model.graph)
    plan = sl.plan(model, sl.ChannelPruning(ratio=0.5, axes=("kernel",)))
    with pytest.raises(sl.SlimlineError, match="which the model does not have like this: plan again"):
        CutPlan.from_json(plan.to_json(), plan.apply(model))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"axes": ("kernel", "filters")}, "takes no other axes: let a step of its own prune kernel"),
        ({"axes": ("inputs", "kernel")}, "takes no other axes"),
        ({"axes": ("kernel",), "criterion": "batch_norm"}, "takes no criterion batch_norm: choose one of l1, l2"),
        ({"axes": ("kernel",), "criterion": np.abs}, "takes no criterion .*absolute"),
        ({"axes": ("inputs",), "scope": "isomorphic"}, "takes no scope isomorphic"),
        ({"axes": ("kernel",), "round_to": 8}, "takes no round_to: 8: leave it out"),
        ({"axes": ("inputs",), "round_to": "auto"}, "takes no round_to: auto: give a number"),
        ({"axes": ("width",)}, "There is no ChannelPruning with axes 'width'; did you mean 'head_width'"),
    ],
)
def test_settings_that_do_not_go_together(fields, said):
    with pytest.raises(sl.SlimlineError, match=said):
        sl.ChannelPruning(ratio=0.5, **fields)


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (sl.ChannelPruning(ratio=0.5, axes=("kernel",), layers=("nothing",)), "There is no layer for layers"),
        (sl.ChannelPruning(ratio=0.5, axes=("kernel",), layers=("head",)), "There is no kernel to prune"),
        (sl.ChannelPruning(target_macs=0.01, axes=("kernel",)), "cannot reach 1% of the MACs: at most"),
        (sl.ChannelPruning(target_macs=0.01, axes=("kernel",), scope="global"), "cannot reach 1% of the MACs: at most"),
        (sl.ChannelPruning(ratio=0.5, axes=("kernel",), criterion="obs"), "needs data"),
    ],
)
def test_what_cannot_be_done_is_said(step, said):
    model, _ = made("torch", "residual")
    with pytest.raises(sl.SlimlineError, match=said):
        sl.plan(model, step)


def test_a_keras_model_of_open_size_says_why():
    rng = np.random.default_rng(0)
    keras = pytest.importorskip("keras")
    L = keras.layers
    inputs = keras.Input((None, None, 3))
    y = L.Conv2D(4, 3, strides=2, padding="same")(inputs)
    y = L.Conv2D(4, 3, padding="same")(y)
    model = sl.load(keras.Model(inputs, L.GlobalAveragePooling2D()(y)), np.zeros((2, 9, 9, 3), np.float32))
    x = rng.normal(size=(2, 12, 7, 3)).astype(np.float32)
    (_, second) = readers(model.graph)
    plan = sl.plan(model, sl.ChannelPruning(ratio=0.5, axes=("kernel",), layers=(second.layer.layer,)))
    agree(plan.mask(model), plan.apply(model), x)
    with pytest.raises(sl.SlimlineError, match="pads by the size of its input, which is open"):
        sl.plan(model, sl.ChannelPruning(ratio=0.5, axes=("kernel",))).apply(model)
