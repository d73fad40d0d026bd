"""Quantization that has to pay: few artifacts, judged by clocks and gates that are known; and a real one on digits."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import slimline as sl
from slimline.graph.edits import PutTensors
from slimline.measure import Latency, Trial
from slimline.measure.parity import Parity
from slimline.runtimes.base import runtime
from slimline.steps import clock
from slimline.steps.base import Context, perform
from slimline.steps.quantization import undo
from tests import compress_job

LAYERS = tuple(f"block.{i}.conv" for i in range(12))


class Bench:
    """Candidates whose time is the sum of their layers' milliseconds, in float or in integers, and of conversions."""

    target, threads = "onnxruntime", 1

    def __init__(self, integer, float_, conversion=0.0, profile=True, noise=0.0):
        self.integer = dict(zip(LAYERS, integer, strict=False))
        self.float = dict(zip(LAYERS, float_, strict=False))
        self.conversion, self.profile, self.noise = conversion, profile, noise
        self.made, self.timings = {}, 0
        self.rng = np.random.default_rng(0)

    @property
    def count(self):
        return len(self.made)

    def layers(self):
        return tuple(self.integer)

    def path(self, back):
        key = None if back is None else frozenset(back)
        assert key != frozenset(self.integer), "all in float is the float artifact"
        return self.made.setdefault(key, Path(str(len(self.made))))

    def batch(self):
        return 8

    def profiles(self):
        if not self.profile:
            return {}, {}
        named = [
            {f"{name} ({op})": ms for name, ms in of.items()} for of, op in ((self.integer, "Q"), (self.float, "C"))
        ]
        self.path(()), self.path(None)
        return named[0], named[1]

    def ms(self, back):
        if back is None:
            return sum(self.float.values())
        borders = sum((a in back) != (b in back) for a, b in pairwise(LAYERS))
        return sum(self.float[x] if x in back else ms for x, ms in self.integer.items()) + borders * self.conversion

    def times(self, paths):
        self.timings += 1
        backs = {path: back for back, path in self.made.items()}
        noise = self.rng.normal(1, self.noise, (30, len(paths))).clip(0.5)
        return {
            name: Latency.of((self.ms(backs[path]) * noise[:, i]).tolist())
            for i, (name, path) in enumerate(paths.items())
        }


TIMES = st.lists(st.floats(0.1, 10), min_size=1, max_size=12)


@given(TIMES, st.data(), st.booleans())
def test_what_is_decided_is_never_slower_and_costs_a_handful(integer, data, profile):
    float_ = data.draw(st.lists(st.floats(0.1, 10), min_size=len(integer), max_size=len(integer)))
    bench = Bench(integer, float_, profile=profile)
    found = clock.by_the_clock(bench, undo.INTEGERS)
    ms = bench.ms(frozenset(found["back"]))
    assert ms <= bench.ms(frozenset())
    assert bool(found["slower"]) == (ms > bench.ms(None))
    assert len(found["back"]) < len(integer)
    assert bench.count == found["artifacts"] <= (5 if profile else 7)
    assert bench.timings <= 2
    if profile and not found["slower"]:  # as good as putting back each layer that loses, or hardly more than a tie
        best = sum(min(i, f) for i, f in zip(integer, float_, strict=True))
        losing = [i >= f for i, f in zip(integer, float_, strict=True)]
        assert ms <= best * clock.GAIN + 1e-9 or all(losing)
    rows = [Trial.model_validate(row) for row in found["trials"]]
    assert sum(row.chosen for row in rows) == (0 if found["slower"] else 1)
    assert json.loads(json.dumps(found)) == found


def test_a_layer_that_is_slower_goes_back_and_what_gains_does_not():
    bench = Bench([3.0] + [1.0] * 11, [1.0] + [3.0] * 11)
    assert clock.by_the_clock(bench, undo.INTEGERS)["back"] == [LAYERS[0]]


def test_conversions_are_part_of_what_is_timed():
    slow = Bench([2.0, 1.0, 2.0] + [0.5] * 9, [1.0, 1.3, 1.0] + [2.0] * 9, conversion=0.4)
    assert clock.by_the_clock(slow, undo.INTEGERS)["back"] == list(LAYERS[:3]), "with what lies between"
    not_worth = Bench([1.2] + [0.5] * 11, [1.0] + [2.0] * 11, conversion=0.3)
    assert clock.by_the_clock(not_worth, undo.INTEGERS)["back"] == []


@pytest.mark.parametrize("noise", [0.05, 0.2])
def test_a_clock_that_cannot_tell_puts_nothing_back(noise):
    bench = Bench([1.0] * 12, [1.0] * 12, noise=noise)
    found = clock.by_the_clock(bench, undo.INTEGERS)
    assert found["back"] == [] and not found["slower"]


def test_integers_that_do_not_pay_at_all_are_said_with_how_much():
    found = clock.by_the_clock(Bench([7.0] * 12, [1.0] * 12), undo.INTEGERS)
    assert found["slower"].endswith("times as long as in float on onnxruntime")
    assert not any(row["chosen"] for row in found["trials"])


def test_without_a_profile_groups_that_lose_are_put_back_together():
    bench = Bench(
        [3.0, 1.0, 1.0, 1.0, 3.0, 3.0, 3.0, 3.0] + [1.0] * 4, [1.0] + [3.0] * 3 + [1.0] * 4 + [3.0] * 4, profile=False
    )
    assert clock.by_the_clock(bench, undo.INTEGERS)["back"] == [LAYERS[0], *LAYERS[5:9]]


@given(st.integers(1, 80))
def test_groups_without_a_profile_are_few_and_cover_all_layers(count):
    layers = [f"layer{i}" for i in range(count)]
    found = clock.choices(layers, {}, {})
    assert len(found) <= clock.GROUPS
    covered = [layer for back in found.values() for layer in back]
    assert covered == (layers if count > 1 else []), "and one layer alone has nothing to choose"


def test_a_profile_is_read_by_the_longest_name():
    layers = ["conv", "conv_2", "head.1", "tail", "head.10"]
    integer = {
        "conv (QLinearConv)": 1.0,
        "conv_2 (QLinearConv)": 9.0,
        "head.1_token_3 (Q)": 1.0,
        "tail (Q)": 1.0,
        "head.10 (Q)": 9.0,
    }
    float_ = dict.fromkeys(["conv (Conv)", "conv_2 (Conv)", "head.1 (Gemm)", "tail (Gemm)", "head.10 (Gemm)"], 5.0)
    assert clock.choices(layers, integer, float_) == {"losing": ("conv_2", "head.10")}


class Gate:
    """Artifacts that disagree while any of these layers is in integers."""

    def __init__(self, wrong, layers=LAYERS):
        self.wrong, self._layers, self.asked = set(wrong), layers, []

    @property
    def count(self):
        return len(self.asked)

    def layers(self):
        return self._layers

    def parity(self, back):
        self.asked.append(frozenset(back))
        passed = self.wrong <= set(back)
        figures = {"max_error": 1.0, "relative_error": 1.0, "mean_error": 1.0, "agreement": None}
        return Parity(passed=passed, integer=True, n=8, reason="" if passed else "outputs differ", **figures)


@given(st.sets(st.sampled_from(LAYERS)), st.sets(st.sampled_from(LAYERS)))
def test_layers_that_are_wrong_are_found_by_few_artifacts(wrong, back):
    gate = Gate(wrong)
    found = undo._agreeing(gate, dict.fromkeys(sorted(back, key=LAYERS.index), "slow"))
    assert gate.count <= undo.PARITY_TRIALS + 1
    if wrong <= back:
        assert found["back"] == [] and gate.count == 1
    elif found["back"] is not None:
        assert wrong <= {*back, *found["back"]}
        assert {*back, *found["back"]} != set(LAYERS)
        if len(wrong - back) == 1:
            assert set(found["back"]) == wrong - back


def test_no_choice_that_agrees_is_none():
    assert undo._agreeing(Gate(LAYERS), {})["back"] is None
    many = [f"layer{i}" for i in range(300)]
    gate = Gate(many, many)
    assert undo._agreeing(gate, {})["back"] is None
    assert gate.count <= undo.PARITY_TRIALS + 1


@pytest.fixture(scope="module")
def context():
    data = compress_job.data("torch")
    model = sl.load(compress_job.model("torch"), data.example())
    return Context(model, data.check(model.inputs), "onnxruntime", batch_sizes=(1, 16), threads=2)


STEP = sl.StaticQuantization(samples=64, batch_size=32)


def journalled(context):
    kept = {}

    def decide(name, choose):
        if name not in kept:
            kept[name] = json.loads(json.dumps(choose()))
        return kept[name]

    return kept, replace(context, decide=decide)


def test_what_was_decided_is_not_asked_again_and_gives_the_same_model(context, monkeypatch):
    package = import_module("slimline.measure")

    calls = []
    real = package.measure_latency

    def watched(paths, rows, batches, threads, *rest):
        calls.append((batches, threads, len(rows[0])))
        return real(paths, rows, batches, threads, 0.02, 3)

    monkeypatch.setattr(package, "measure_latency", watched)
    kept, deciding = journalled(context)
    first = perform(STEP, context.teacher, deciding)
    assert len(calls) <= 2
    assert all(threads == 2 and batches == (16,) and rows == 16 for batches, threads, rows in calls), "the recipe's own"
    assert [name.partition("-")[0] for name in kept] == ["weight", "undo", "parity"]
    undoing = first.record["undoing"]
    assert undoing["artifacts"] <= 5 and undoing["seconds"] > 0
    assert (undoing["batch"], undoing["threads"]) == (16, 2)

    monkeypatch.setattr(package, "measure_latency", lambda *_: pytest.fail("timed again"))
    monkeypatch.setattr(undo.Artifacts, "parity", lambda *_: pytest.fail("compared again"))
    again = perform(STEP, context.teacher, deciding)
    assert again.record == first.record
    assert again.model.quantization == first.model.quantization
    assert again.model.history == first.model.history


def test_the_same_shapes_are_the_same_question_whatever_the_weights(context):
    model = context.teacher
    trained = replace(
        model,
        native=model.edit(PutTensors({k: v + 1 for k, v in model.parameters().items() if v.dtype.kind == "f"})),
    )
    narrow = sl.apply(model, sl.ChannelPruning(ratio=0.5))

    def ask(m, step=STEP, **more):
        asked = replace(context, **more)
        return clock.question(undo.StaticArtifacts(m, step, asked), asked)

    assert ask(trained) == ask(model) == ask(model, STEP.model_copy(update={"samples": 9}))
    others = [
        ask(narrow),
        ask(model, threads=1),
        ask(model, batch_sizes=(1,)),
        ask(model, STEP.model_copy(update={"keep": ("stem",)})),
    ]
    assert len({ask(model), *others}) == 5


def test_a_carried_decision_is_obeyed_and_an_estimate_asks_no_gate(context, monkeypatch):
    monkeypatch.setattr(undo.Artifacts, "parity", lambda *_: pytest.fail("an estimate's weights are not trained"))
    name = clock.question(undo.StaticArtifacts(context.teacher, STEP, context), context)
    record = {"seconds": 1.0, "artifacts": 2, "batch": 16, "threads": 2, "trials": [], "slower": "", "back": ["stem"]}
    carried = replace(context, decide=lambda asked, choose: {name: record, "weight-bits": {"bits": 8}}[asked])
    found = undo.quantize_what_pays(context.teacher, STEP, carried, gate=False)
    assert "stem" not in found.model.quantization.layers
    assert found.refused == [{"what": "stem", "reason": undo.SLOWER}]
    slower = {**record, "slower": "in integers it takes twice as long"}
    whole = replace(context, decide=lambda asked, choose: slower if asked == name else choose())
    found = undo.quantize_what_pays(context.teacher, STEP, whole, gate=False)
    assert found.model is context.teacher
    assert found.refused[0]["what"] == "StaticQuantization"


@pytest.mark.parametrize("what", ["weight-bits", "undo"])
@pytest.mark.parametrize("record", [{}, {"back": "stem"}, {"back": ["stem"], "slower": 1}, {"back": [], "slower": ""}])
def test_a_journal_that_was_changed_is_refused_in_a_sentence(context, record, what):
    carried = replace(context, decide=lambda asked, choose: record if asked.startswith(what) else choose())
    with pytest.raises(sl.SlimlineError, match=r"What the run's journal holds of .* is damaged: start a new run"):
        undo.quantize_what_pays(context.teacher, STEP, carried)


@pytest.mark.parametrize("bits", [7, 8])
def test_weights_have_the_bits_that_the_processor_bears_and_the_record_says_so(context, monkeypatch, bits):
    monkeypatch.setattr(type(runtime("onnxruntime")), "weight_bits", property(lambda self: bits))
    done = perform(STEP.model_copy(update={"undo": False}), context.teacher, context)
    assert {grid.high for grid in done.model.quantization.weights.values()} == {2 ** (bits - 1) - 1}
    assert done.record["weight_bits"] == bits
    assert ("VNNI" in " ".join(done.record.get("notes", ()))) == (bits == 7)
