"""Which strength a budget leaves, asked of estimates that are known: nothing here runs a network but the last tests."""

from __future__ import annotations

import json
from importlib import import_module

import pytest
from hypothesis import given
from hypothesis import strategies as st

import slimline as sl
from slimline.measure import Cost, Part
from slimline.recipe import Budget, Recipe, load_recipe
from slimline.search.fit import Estimate, Fit, Trials, fit
from slimline.search.ladder import RATIOS, Rung, ladder
from tests import compress_job

AUTO = load_recipe("auto")


def rungs_of(count: int, **budget: float) -> tuple[Rung, ...]:
    recipe = AUTO.model_copy(update={"budget": Budget(**budget), "fit": False})
    return tuple(Rung(f"rung {i}", recipe) for i in range(count))


def estimates(latency, width=0.0, **rest):
    """Of rungs by number; keeps which were asked."""
    asked = []

    def estimate(rung):
        number = int(rung.name.split()[1])
        asked.append(number)
        value = latency[number]
        part = Part(value=value, low=value * (1 - width), high=value * (1 + width), confidence=0.95)
        counted = {name: Part.exact(values[number] * 1e6, 1e6) for name, values in rest.items()}
        return Estimate(Cost(latency={1: Part.exact(1, 1), 32: part}, **counted), {"stage/x": {"rung": number}}, 0.5)

    return estimate, asked


@pytest.mark.parametrize("limit", [0.1, 0.2, 0.5, 0.62, 0.9, 1.0])
@pytest.mark.parametrize("width", [0.0, 0.02, 0.3])
@pytest.mark.parametrize("start", [0, 1])
def test_the_mildest_that_surely_meets_the_limits_is_chosen(limit, width, start):
    latency = [1.0 - i / 12 for i in range(12)]
    estimate, asked = estimates(latency, width)
    found = fit(rungs_of(12, max_latency=limit), start, Budget(max_latency=limit), "onnxruntime", estimate)
    sure = [i for i in range(start, 12) if latency[i] * (1 + width) <= limit]
    unclear = [i for i in asked if latency[i] * (1 - width) <= limit < latency[i] * (1 + width)]
    assert found.rung == (sure[0] if sure else min(unclear))
    assert set(found.milder) == {i for i in unclear if i < found.rung}
    assert list(found.milder) == sorted(found.milder, reverse=True)
    assert len(asked) == len(set(asked)) <= 6
    assert len(found.trials) == len(asked), "every trial is kept"
    assert [t.settings["strength"] for t in found.trials if t.chosen] == [f"rung {found.rung}"]
    assert set(found.decisions) == {found.rung, *found.milder}
    assert Fit.of(json.loads(json.dumps(found.model_dump(mode="json"))), 12) == found


@given(
    st.lists(st.floats(0.01, 1), min_size=2, max_size=33),
    st.lists(st.floats(0.01, 1), min_size=33, max_size=33),
    st.floats(0.05, 1),
    st.floats(0.05, 1),
)
def test_of_monotone_costs_the_mildest_feasible_is_chosen_or_all_refused(latency, macs, max_latency, max_macs):
    latency, macs = sorted(latency, reverse=True), sorted(macs, reverse=True)
    budget = Budget(max_latency=max_latency, max_macs=max_macs)
    estimate, asked = estimates(latency, macs=macs)
    rungs = rungs_of(len(latency), max_latency=max_latency)
    feasible = [
        i
        for i, pair in enumerate(zip(latency, macs, strict=False))
        if pair[0] <= max_latency and Part.exact(pair[1] * 1e6, 1e6).value <= max_macs
    ]
    if feasible:
        assert fit(rungs, 0, budget, "litert", estimate).rung == feasible[0]
    else:
        with pytest.raises(sl.SlimlineError, match=r"The budget cannot be met on litert: .* the budget is"):
            fit(rungs, 0, budget, "litert", estimate)
    assert len(asked) <= 7


def test_a_recipe_that_fits_is_not_refused_at_the_edge_and_one_that_does_not_is_with_its_figure():
    rungs = rungs_of(1, max_latency=0.5)
    for latency, width in ((0.5, 0.0), (0.502, 0.02), (0.49, 0.05)):
        estimate, _ = estimates([latency], width)
        assert fit(rungs, 0, Budget(max_latency=0.5), "onnxruntime", estimate).rung == 0
    estimate, _ = estimates([0.62], 0.02)
    said = r"latency reaches 0.62 of the original's \(0.608 to 0.632 with 95 % confidence\), the budget is 0.5"
    with pytest.raises(sl.SlimlineError, match=said):
        fit(rungs, 0, Budget(max_latency=0.5), "onnxruntime", estimate)


def test_a_refusal_names_the_best_that_was_measured():
    estimate, _ = estimates([0.9, 0.8, 0.7, 0.6])
    with pytest.raises(sl.SlimlineError, match=r"latency reaches 0\.6 of"):
        fit(rungs_of(4), 0, Budget(max_latency=0.5), "onnxruntime", estimate)


def test_without_such_limits_nothing_is_measured():
    estimate, asked = estimates([1.0] * 4)
    assert fit(rungs_of(4), 1, Budget(max_drop=0.01), "onnxruntime", estimate) == Fit(rung=1)
    assert not asked


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"rung": -1},
        {"rung": "x"},
        {"rung": 4},
        {"rung": 3, "milder": [9]},
        {"rung": 0, "milder": 1},
        {"rung": 0, "trials": [{}]},
        {"rung": 0, "decisions": {"0": [1]}},
        {"rung": 0, "decisions": {"0": {"x": 1}}},
        {"rung": 0, "more": 1},
    ],
)
def test_a_journal_that_was_changed_is_refused_in_a_sentence(record):
    with pytest.raises(sl.SlimlineError, match=r"journal .*: start a new run"):
        Fit.of(record, 4)


def test_the_ladder_begins_with_nothing_and_with_no_pruning():
    rungs = ladder(AUTO)
    assert [step.step for step in rungs[0].recipe.steps] == []
    assert [step.step for step in rungs[1].recipe.steps] == ["StaticQuantization"]
    assert [rung.ratio for rung in rungs[2:]] == list(RATIOS)
    for rung in rungs:
        assert not rung.recipe.fit
        assert rung.recipe.budget == AUTO.budget
        assert sl.recipe.recipe.parse(rung.recipe.dump()) == rung.recipe


def test_ladders_of_other_recipes():
    assert ladder(Recipe(steps=AUTO.steps))[0].recipe.steps == AUTO.steps
    assert len(ladder(Recipe(steps=AUTO.steps))) == 1
    int8 = ladder(load_recipe("auto", None, False))
    assert [[s.step for s in rung.recipe.steps] for rung in int8] == [[], ["StaticQuantization"]]
    floats = ladder(load_recipe("prune").model_copy(update={"fit": True}))
    assert [rung.ratio for rung in floats] == [None, *RATIOS], "without pruning nothing is left to recover"
    trained = ladder(
        Recipe(
            steps=(
                sl.DepthPruning(blocks=1),
                sl.SparseTraining(penalty="growing"),
                sl.ChannelPruning(target_macs=0.5),
                sl.Distillation(),
                sl.StaticQuantization(),
            ),
            fit=True,
        )
    )
    assert [s.step for s in trained[1].recipe.steps] == ["DepthPruning", "Distillation", "StaticQuantization"]
    assert trained[17].recipe.steps[2] == sl.ChannelPruning(ratio=0.5)


@pytest.fixture(scope="module")
def tiny():
    data = compress_job.data("torch")
    model = sl.load(compress_job.model("torch"), data.example())
    return model, data.check(model.inputs)


def test_estimates_use_the_recipe_s_own_batches_and_threads_and_hand_on_what_the_clock_decided(tiny, monkeypatch):
    package = import_module("slimline.measure")

    calls = []
    real = package.measure_latency

    def watched(paths, rows, batches, threads=1, *rest, **more):
        calls.append((sorted(paths), tuple(batches), threads))
        return real(paths, rows, batches, threads, 0.01, 3)

    monkeypatch.setattr(package, "measure_latency", watched)
    recipe = Recipe(
        steps=(sl.ChannelPruning(ratio=0.5), sl.Distillation(), sl.StaticQuantization()),
        target="onnxruntime",
        budget=Budget(max_latency=1.0),
        batch_sizes=(1, 4, 16),
        threads=2,
    )
    with Trials(*tiny, recipe) as trials:
        found = trials(ladder(recipe)[0])
        asked = len(calls)
        again = trials(ladder(recipe)[0])
    assert (["after", "before"], (1, 4, 16), 2) in calls
    assert all(threads == 2 and batches in ((1, 4, 16), (16,)) for _, batches, threads in calls)
    assert len(calls) == asked and again.cost == found.cost, "the same shapes are measured once"
    assert set(found.cost.latency) == {1, 4, 16}
    assert found.cost.macs.value < 0.35
    bits, name = found.decisions
    assert bits == "03-StaticQuantization/weight-bits" and name.startswith("03-StaticQuantization/undo-")


def test_a_limit_on_macs_needs_no_artifact(tiny, monkeypatch):
    recipe = Recipe(steps=(sl.ChannelPruning(ratio=0.5),), target="onnxruntime", budget=Budget(max_macs=0.5))
    with Trials(*tiny, recipe) as trials:
        monkeypatch.setattr(trials.runtime, "lower", lambda *_: pytest.fail("an artifact was made"), raising=False)
        assert trials(ladder(recipe)[0]).cost.size is None
