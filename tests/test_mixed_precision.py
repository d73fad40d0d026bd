"""Formats by layer against exhaustive search; float is given back where it costs least."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import slimline as sl
from slimline.basics.errors import SlimlineError
from slimline.methods.formats import IntegerGrid
from slimline.steps.base import Context, perform
from slimline.steps.mixed_precision.choose import Accuracy, Control, Option, chosen, options, with_formats

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
    ],
)
def test_goals_that_mean_nothing_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SlimlineError, match=said):
        sl.MixedPrecision(**settings)


def test_a_target_without_int4_refuses_before_work(model: sl.Model, data: sl.Data) -> None:
    with pytest.raises(SlimlineError, match=r"litert computes with no int4 weights"):
        sl.apply(model, step(max_size=0.2), data, target="litert", progress=False)
