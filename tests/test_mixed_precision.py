"""Formats by layer against exhaustive search; float is given back where it costs least."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import slimline as sl
from slimline.basics.errors import SlimlineError
from slimline.measure.figures import Latency
from slimline.methods.formats import IntegerGrid
from slimline.steps.base import Context, handler_of, perform
from slimline.steps.mixed_precision import latency as mixed_latency
from slimline.steps.mixed_precision.choose import Accuracy, Control, Option, chosen, options, with_formats
from slimline.steps.mixed_precision.latency import choose

pytest.importorskip("torch")
import torch
from torch import nn

X = np.random.default_rng(0).normal(size=(160, 12)).astype(np.float32)


@pytest.fixture(scope="module")
def model() -> sl.Model:
    torch.manual_seed(0)
    layers = [nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU()]
    return sl.load(nn.Sequential(*layers, nn.Linear(24, 4)).eval(), X[:2])


@pytest.fixture(scope="module")
def data(model: sl.Model) -> sl.Data:
    labels = model.predict(X).argmax(1)
    return sl.Data(calibration=X[:64], selection=(X[64:], labels[64:]))


def bits(small: sl.Model) -> dict[str, int]:
    assert small.quantization is not None
    grids = small.quantization.weights
    return {name: 4 if each.bits == 4 else 8 for name, each in grids.items() if isinstance(each, IntegerGrid)}


def weights(model: sl.Model) -> dict[str, np.ndarray[Any, Any]]:
    return {name: each for name, each in model.parameters().items() if name.endswith("weight")}


def step(**settings: Any) -> sl.MixedPrecision:
    return sl.MixedPrecision(quantization=sl.StaticQuantization(undo=False, rounding="gptq"), **settings)


@pytest.mark.parametrize("size", [0.2, 0.24, 0.3])
def test_formats_are_the_best_of_all_choices_within_the_size(model: sl.Model, data: sl.Data, size: float) -> None:
    every = options(model, step(max_size=size), "onnxruntime", [(X[:64],)])
    assert list(every) == ["0", "2", "4", "6"]
    for small, large in every.values():
        assert small.bytes < large.bytes and small.error > large.error > 0
    whole = 4 * (12 * 40 + 40 * 24 + 24 * 24 + 24 * 4)
    fits = [c for c in itertools.product(*every.values()) if sum(o.bytes for o in c) <= size * whole]
    best = min(sum(o.error for o in c) for c in fits)
    found = chosen(every, step(max_size=size))
    assert sum(o.error for o in found.values()) == pytest.approx(best)
    assert sum(o.bytes for o in found.values()) <= size * whole
    small = sl.apply(model, step(max_size=size), data, target="onnxruntime", progress=False)
    assert bits(small) == {f"{name}.weight": int(o.format[3:]) for name, o in found.items()}


def test_the_smallest_within_an_error() -> None:
    every = {
        "a": [Option("int4", 100, 50, 0.3), Option("int8", 100, 100, 0.01)],
        "b": [Option("int4", 1000, 500, 0.2), Option("int8", 1000, 1000, 0.01)],
    }
    formats = {name: o.format for name, o in chosen(every, step(max_error=0.25)).items()}
    assert formats == {"a": "int8", "b": "int4"}
    with pytest.raises(SlimlineError, match=r"max_error=0.01: a total of 0.02 is the least"):
        chosen(every, step(max_error=0.01))
    with pytest.raises(SlimlineError, match="is the least; raise it, or add formats"):
        chosen(every, step(max_size=0.01))


def test_float_goes_back_to_as_few_layers_as_it_takes(model: sl.Model, data: sl.Data) -> None:
    base = with_formats(sl.StaticQuantization(undo=False), dict.fromkeys(["0", "2", "4", "6"], "int4"), model)
    accuracy = Accuracy(model, data, 64)
    assert accuracy.before == 1.0
    control = Control(model, base, "onnxruntime", [(X[:64],)], accuracy, 0)
    ranked = control.ranked(["0", "2", "4", "6"])
    drops = [accuracy.drop(control.quantized(ranked[:n])) for n in range(4)]
    limit = control.max_drop = drops[2]
    assert drops[0] > limit
    back, before, after = control.run()
    assert back == ranked[: next(n for n, drop in enumerate(drops) if drop <= limit)]
    assert (before, after) == (drops[0], drops[len(back)])
    quantization = sl.StaticQuantization(undo=False)
    mixed = sl.MixedPrecision(formats=("int4",), max_size=0.2, max_drop=limit, quantization=quantization)
    done = perform(mixed, model, Context(None, data, "onnxruntime"))
    small = done.model
    assert small.quantization is not None
    # What is recorded is what came out, and a size that is not kept is said.
    layers = done.record["layers"]
    assert {layer for layer, own in layers.items() if own["format"] == "float32"} == set(back)
    assert sum(own["bytes"] for own in layers.values()) > 0.2 * 4 * sum(w.size for w in weights(small).values())
    assert any("more than max_size=0.2" in note for note in done.record["notes"])
    assert {f"{name}.weight" for name in back} == {"0.weight", "2.weight", "4.weight", "6.weight"} - set(bits(small))
    assert accuracy.drop(small) == pytest.approx(after)


def test_layers_that_an_override_names_keep_their_format(model: sl.Model, data: sl.Data) -> None:
    quantization = sl.StaticQuantization(undo=False, last_layers="int8", overrides={"0": {"weights": "int8"}})
    mixed = sl.MixedPrecision(max_size=0.3, quantization=quantization)
    assert set(options(model, mixed, "onnxruntime", [(X[:64],)])) == {"2", "4"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "has no goal"),
        ({"max_size": 0.2, "max_error": 0.1}, "give one of them"),
        ({"max_size": 0.2, "formats": ("int4", "int4")}, "different formats"),
        ({"max_latency": 0.5, "formats": ("int8",)}, "float32 is not among formats"),
        ({"max_latency": 0.5, "max_size": 0.2}, "max_size and max_latency"),
    ],
)
def test_goals_that_mean_nothing_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SlimlineError, match=said):
        sl.MixedPrecision(**settings)


class Clock:
    """Artifacts of three layers whose conversions the profile does not see: an artifact takes `extra` more for each
    integer layer behind a float one."""

    target, threads, count = "onnxruntime", 1, 0
    short, long = {"a": 1.0, "b": 2.0, "c": 1.0}, {"a": 4.0, "b": 4.0, "c": 2.0}

    def __init__(self, extra: float) -> None:
        self.extra, self.asked = extra, list[tuple[str, ...]]()

    def layers(self) -> list[str]:
        return ["a", "b", "c"]

    def path(self, back: Any) -> Any:
        return "abc" if back is None else "".join(back)

    def batch(self) -> int:
        return 1

    def profiles(self) -> tuple[dict[str, float], dict[str, float]]:
        return {**self.short, "convert": 0.5}, self.long

    def times(self, paths: Any) -> Any:
        self.asked.append(tuple(paths["mixed"]))
        return {name: latency(self._takes(path, name)) for name, path in paths.items()}

    def _takes(self, path: str, name: str) -> float:
        if name == "float":
            return sum(self.long.values())
        costs = sum(self.long[x] if x in path else self.short[x] for x in "abc") + 0.5
        return costs + self.extra * sum(x in path and y not in path for x, y in ("ab", "bc"))


def latency(ms: float) -> Latency:
    samples = tuple(ms * (1 + 0.001 * k) for k in range(9))
    return Latency(median_ms=ms, p10_ms=ms, p90_ms=ms, samples_ms=samples)


ERRORS = {"a": 0.9, "b": 0.5, "c": 0.1}
WITHIN = {x: [Option("int8", 9, 9, e), Option("float32", 9, 36, 0)] for x, e in ERRORS.items()}


@pytest.mark.parametrize(
    ("part", "extra", "asked"),
    [
        (0.96, 0, ["ab"]),
        (0.8, 0, ["a"]),
        (0.5, 0, [""]),
        (0.8, 2.0, ["a", "b", "c"]),  # what the profile took for 7.5 and 6.5 of 10 takes 9.5 and 8.5
    ],
)
def test_the_least_error_within_a_latency(part: float, extra: float, asked: list[str]) -> None:
    clock = Clock(extra)
    answer = choose(clock, WITHIN, part)
    assert ["".join(x) for x in clock.asked] == asked
    assert "".join(x for x, k in answer["options"].items() if k == 1) == asked[-1]
    assert answer["latency"] <= part and answer["timed"] == len(asked)


def test_a_latency_that_nothing_is_within_says_the_least() -> None:
    clock = Clock(0)
    with pytest.raises(SlimlineError, match=r"within max_latency=0.3 on onnxruntime: 0.45 of the float latency"):
        choose(clock, WITHIN, 0.3)
    assert clock.asked == [()]


def test_a_mixed_artifact_within_its_latency(model: sl.Model, data: sl.Data) -> None:
    mixed = step(formats=("int8", "float32"), max_latency=0.999)
    decided = []

    def decide(name: str, answer: Any) -> dict[str, Any]:
        decided.append((name, {**answer(), "latency": 0.9} if name == "mixed-latency" else answer()))
        return decided[-1][1]

    def fake(artifacts: Any, every: Any, part: float, seed: int) -> dict[str, Any]:
        integer, float_ = artifacts.profiles()
        assert integer and float_ and list(every) == ["0", "2", "4", "6"] and part == 0.999
        return {"options": {"0": 1, "2": 0, "4": 0, "6": 1}, "latency": 0.9, "timed": 1}

    with pytest.MonkeyPatch.context() as patch:  # so small a network is no faster in integers
        patch.setattr(mixed_latency, "choose", fake)
        done = perform(mixed, model, Context(None, data, "onnxruntime", decide=decide))
    assert done.model.quantization is not None
    assert done.model.quantization.layers == ("2", "4")
    assert done.record["latency"] == {"latency": 0.9, "timed": 1}
    assert "mixed-latency" in dict(decided)


@pytest.mark.parametrize("target", ["coreml", "executorch", "litert"])
def test_a_target_without_profiles_refuses_before_work(model: sl.Model, target: str) -> None:
    mixed = step(formats=("int8", "float32"), max_latency=0.5)
    said = f"{target} does not tell here what a layer costs: .* the target onnxruntime or openvino"
    with pytest.raises(SlimlineError, match=said):
        handler_of(mixed).check_target(mixed, target, model)


def test_a_target_without_int4_refuses_before_work(model: sl.Model, data: sl.Data) -> None:
    with pytest.raises(SlimlineError, match=r"litert computes with no int4 weights"):
        sl.apply(model, step(max_size=0.2), data, target="litert", progress=False)
