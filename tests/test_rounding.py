"""Rounding to multiples that are measured: the logic with a timer of our own, and that the runtimes' samples run."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import slimline as sl
from slimline.graph.units import Units
from slimline.methods.structured import around, smallest_good
from slimline.plans import Plan
from slimline.runtimes.base import Layer, runtime
from slimline.steps import base as steps
from slimline.steps.channels import rounding
from slimline.steps.channels.rounding import choose

torch = pytest.importorskip("torch")
nn = torch.nn


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1, dilation=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1, groups=64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 48),
        nn.ReLU(),
        nn.Linear(48, 5),
    )
    return sl.load(net.eval(), np.zeros((2, 3, 8, 8), np.float32))


def blocks_of(size):
    """A machine that computes in blocks of `size` channels: an unfilled one costs as much as a full one."""

    def full(width):
        return -(-width // size) * size

    def timer(target, layers):
        assert target == "onnxruntime"
        return [
            1e-9 * len(x.chain) * x.macs * full(x.inputs) * full(x.outputs) / (x.inputs * x.outputs) for x in layers
        ]

    return timer


@given(width=st.floats(1, 256), size=st.integers(1, 256), multiple=st.sampled_from([1, 2, 4, 8, 16, 32]))
def test_widths_around_are_odd_multiples_next_to_the_width(width, size, multiple):
    below, above = around(min(width, size), size, multiple)
    assert 1 <= below <= above <= size
    if size >= multiple:
        every = np.arange(multiple, size + 1, 2 * multiple)
        assert {below, above} <= set(every.tolist())
        distance = np.sort(np.abs(every - min(width, size)))
        assert min(abs(below - min(width, size)), abs(above - min(width, size))) == pytest.approx(distance[0])


def test_the_smallest_good_key():
    assert smallest_good({1: 2.0, 8: 1.05, 16: 1.0}, 0.1) == 8
    assert smallest_good({1: 2.0, 8: 1.2, 16: 1.0}, 0.1) == 16


@pytest.mark.parametrize(("size", "expected"), [(1, 1), (8, 8), (16, 16)])
def test_the_blocks_of_the_machine_are_found(model, size, expected):
    found = choose(Units(model.graph), sl.ChannelPruning(ratio=0.3, round_to="auto"), "onnxruntime", blocks_of(size))
    assert found.multiple == expected
    assert list(found.picoseconds) == ["2", "0"]  # the heaviest
    assert found.picoseconds["2"][16] == pytest.approx(1000)


def test_only_widths_that_change_are_varied(model):
    seen = []

    def timer(target, layers):
        seen.extend(layers)
        return [1.0] * len(layers)

    choose(Units(model.graph), sl.ChannelPruning(target_macs=0.25, round_to="auto"), "onnxruntime", timer)
    assert {x.inputs for x in seen if x.inputs < 4} == {3}  # those of the image
    assert all(x.places == (8, 8) and x.kernel == (3, 3) for x in seen)
    assert {x.outputs for x in seen} >= {31, 33, 16, 48}  # half of 64 is left


def test_a_multiple_with_which_nothing_would_go_is_left_out():
    narrow = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = sl.load(nn.Sequential(narrow, nn.Linear(32, 5)).eval(), np.zeros((2, 3, 8, 8), np.float32))
    for ratio, most in ((0.3, 16), (0.2, 8)):  # 22 of 32 are nearer to 16 than to 32, 26 are not
        step = sl.ChannelPruning(ratio=ratio, round_to="auto")
        found = choose(Units(model.graph), step, "onnxruntime", blocks_of(32))
        assert max(found.picoseconds["0.2"]) == most
        assert sl.plan(model, step.model_copy(update={"round_to": most})).parameters < model.graph.size


def test_the_choice_is_made_once_and_recorded(model, monkeypatch):
    calls = []

    def measured(target, layers):
        calls.append(target)
        return blocks_of(16)(target, layers)

    monkeypatch.setattr(rounding, "measured", measured)
    plan = sl.plan(model, sl.ChannelPruning(ratio=0.3, round_to="auto"))
    assert plan.rounding["multiple"] == 16
    assert [plan.shape(f"{k}.weight")[0] for k in (0, 7)] == [48, 32]
    again = Plan.from_json(plan.to_json(), model)
    assert again.rounding == plan.rounding
    assert again.removed == plan.removed
    assert "multiples of 16, measured on onnxruntime" in str(again)
    assert len(calls) == 1

    step = sl.ChannelPruning(ratio=0.5, round_to="auto", schedule="uniform", rounds=2)
    kept: dict = {}

    def decide(name, choose):
        return kept[name] if name in kept else kept.setdefault(name, choose())

    context = steps.Context(model, None, "onnxruntime", decide=decide)
    done = steps.perform(step, model, context)
    assert done.record["round_to"] == 16
    assert done.record["plan"]["rounding"]["picoseconds"]["2"]["1"] > 1000
    assert done.model.history[-1]["round_to"] == 16
    resumed = steps.perform(step, model, context)  # as after a kill: what was measured stays
    assert json.dumps(resumed.record) == json.dumps(done.record)
    assert len(calls) == 2


def test_a_model_without_a_layer_to_time_is_refused():
    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.up = nn.Embedding(10, 8), nn.ConvTranspose1d(8, 8, 2)
            self.out = nn.ConvTranspose1d(8, 3, 2)

        def forward(self, x):
            return self.out(self.up(self.table(x).transpose(1, 2)))

    found = sl.load(Embedded().eval(), np.zeros((2, 4), np.int64))
    with pytest.raises(sl.SlimlineError, match="give a number"):
        sl.plan(found, sl.ChannelPruning(ratio=0.5, round_to="auto"))


@pytest.mark.parametrize("given", [0, -4, True, 1.5, "automatic"])
def test_a_multiple_that_is_none_is_refused(given):
    with pytest.raises(sl.SlimlineError, match=r"round_to of ChannelPruning is .* but must be 1 or more, or auto"):
        sl.ChannelPruning(ratio=0.5, round_to=given)


LAYERS = (
    Layer(5, 6, (4, 4), (3, 3), (1, 1)),
    Layer(5, 5, (4, 4), (3, 3), (2, 2), depthwise=True),
    Layer(5, 6, (9,), (3,), (1,)),
    Layer(5, 6, (2,)),
)


@pytest.mark.parametrize("target", ["onnxruntime", "litert", "openvino"])
def test_samples_run_on_the_targets(target, tmp_path):
    found = runtime(target)
    if found.available():
        pytest.skip(found.available())
    if target == "litert":
        pytest.importorskip("tensorflow")
    assert len(rounding.measured(target, LAYERS)) == len(LAYERS)
    assert min(rounding.measured(target, LAYERS)) > 0
    path = tmp_path / f"layer{found.suffix}"
    found.sample(LAYERS[0], path)
    ((_, shape, _),) = found.input_specs(path)
    x = np.ones([n or 2 for n in shape], np.float32)
    assert found.load(path).run((x,)).shape == x.shape


def test_a_multiple_wider_than_all_layers_is_left_out():
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    model = sl.load(net, np.zeros((2, 6), np.float32))
    found = choose(Units(model.graph), sl.ChannelPruning(ratio=0.5, round_to="auto"), "onnxruntime", blocks_of(1))
    assert list(found.picoseconds["0"]) == [1, 2, 4]
