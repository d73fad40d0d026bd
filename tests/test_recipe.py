"""Recipes, budgets and presets as data."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from slimline.basics.errors import SlimlineError
from slimline.recipe import Budget, Recipe, check_order, load_recipe, parse, presets
from slimline.recipe.config import Config
from slimline.recipe.registry import configs
from slimline.steps.channels.step import ChannelPruning
from slimline.steps.distillation.step import Distillation
from slimline.steps.quantization.step import StaticQuantization
from slimline.steps.sparse.step import SparsePruning
from slimline.steps.sparse_training.step import SparseTraining

parts = st.floats(0.01, 1)
globs = st.lists(st.text("abc.*?[]: '\"#-\n\té", min_size=1), max_size=3).map(tuple)
prunings = st.builds(
    ChannelPruning,
    ratio=st.floats(0, 0.99),
    criterion=st.sampled_from(["l1", "l2", "taylor", "random"]),
    scope=st.sampled_from(["local", "global", "isomorphic"]),
    round_to=st.integers(1, 64) | st.just("auto"),
    layers=globs,
    keep=globs,
)
distillations = st.builds(
    Distillation,
    loss=st.sampled_from(["kl", "logit-standard", "mse"]),
    learning_rate=st.floats(1e-8, 1),
    patience=st.none() | st.integers(1, 9),
)
trainings = st.builds(
    SparseTraining,
    penalty=st.sampled_from(["l1", "l0"]),
    of=st.sampled_from(["weights", "activations"]),
    strength=st.none() | st.floats(1e-6, 1e3),
    layers=globs,
)
quantizations = st.builds(StaticQuantization, observer=st.sampled_from(["minmax", "percentile", "entropy"]), keep=globs)
recipes = st.builds(
    Recipe,
    steps=st.tuples(trainings, prunings, prunings, distillations, quantizations)
    | st.tuples(prunings)
    | st.tuples(quantizations),
    target=st.none() | st.sampled_from(["onnxruntime", "litert"]),
    budget=st.builds(Budget, max_drop=st.none() | st.floats(0, 1), max_latency=st.none() | parts, max_size=parts),
    seed=st.integers(0, 2**32 - 1),
    batch_sizes=st.lists(st.integers(1, 512), min_size=1, max_size=3).map(tuple),
    description=st.text(max_size=20),
)


@settings(deadline=None, max_examples=40)
@given(recipe=recipes)
def test_yaml_round_trip(recipe: Recipe) -> None:
    assert parse(recipe.dump()) == recipe


def test_the_dump_is_complete_and_versioned() -> None:
    loaded = yaml.safe_load(presets()["balanced"].dump())
    assert loaded["schema"] == 1
    assert loaded["steps"][1]["temperature"] == 4.0
    assert next(iter(loaded["steps"][1])) == "step"
    assert loaded["budget"]["confidence"] == 0.95


@pytest.mark.parametrize("name", presets())
def test_presets_load_and_say_what_they_are(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.description
    assert recipe.steps


def test_every_way_to_name_a_recipe(tmp_path: object) -> None:
    step = ChannelPruning(ratio=0.5)
    assert load_recipe(step).steps == load_recipe([step]).steps == (step,)
    assert load_recipe("auto").steps == presets()["balanced"].steps
    assert load_recipe("auto", None, False).steps == presets()["int8"].steps
    recipe = load_recipe("int8", "litert", seed=5, threads=None)
    assert (recipe.target, recipe.seed, recipe.threads) == ("litert", 5, 1)
    assert load_recipe(recipe, "onnxruntime").target == "litert"


def test_a_yaml_file_of_steps_alone(tmp_path: pytest.TempPathFactory) -> None:
    path = tmp_path / "mine.yaml"  # type: ignore[operator]
    path.write_text("- {step: ChannelPruning, ratio: 0.25}\n- {step: StaticQuantization}\n")
    assert load_recipe(path).steps == (ChannelPruning(ratio=0.25), StaticQuantization())


def magnitude(weight: np.ndarray) -> np.ndarray:
    """A criterion that another process can import."""
    found: np.ndarray = np.abs(weight).sum(axis=2)
    return found


@pytest.mark.parametrize("kind", [ChannelPruning, SparsePruning])
def test_a_criterion_that_no_name_leads_to_is_not_written_down(kind: type) -> None:
    field = {"ratio": 0.5} if kind is ChannelPruning else {"amount": 0.5}
    assert parse(Recipe(steps=(kind(criterion=magnitude, **field),)).dump()).steps[0].criterion.endswith(":magnitude")  # type: ignore[union-attr]
    for nameless in (lambda weight: magnitude(weight), functools.partial(magnitude)):
        with pytest.raises(SlimlineError, match=f"The criterion of {kind.__name__} is .*, which a run .* could not"):
            Recipe(steps=(kind(criterion=nameless, **field),)).dump()


def test_steps_are_frozen() -> None:
    with pytest.raises(ValidationError):
        ChannelPruning(ratio=0.5).ratio = 0.6  # type: ignore[misc]


def test_needs_name_the_first_step_that_asks() -> None:
    recipe = Recipe(steps=(ChannelPruning(ratio=0.5, criterion="taylor"), Distillation(), StaticQuantization()))
    assert recipe.needs() == {"calibration": "ChannelPruning", "train": "Distillation", "selection": "Distillation"}
    assert Recipe(steps=(ChannelPruning(ratio=0.5),)).needs() == {}


PRUNE, RECOVER, QUANTIZE = ChannelPruning(ratio=0.5), Distillation(), StaticQuantization()


@pytest.mark.parametrize(
    ("steps", "done", "why"),
    [
        ([QUANTIZE, PRUNE], [], "ChannelPruning cannot follow StaticQuantization, because"),
        ([PRUNE, QUANTIZE, RECOVER], [], "Distillation cannot follow StaticQuantization, because"),
        ([QUANTIZE, QUANTIZE], [], "StaticQuantization cannot follow StaticQuantization"),
        ([PRUNE], ["StaticQuantization"], "ChannelPruning cannot follow StaticQuantization"),
        ([RECOVER], [], "nothing to recover"),
        ([ChannelPruning(ratio=0.5, schedule="iterative", rounds=2), QUANTIZE], [], "recovers after every round"),
    ],
)
def test_an_order_without_meaning_is_refused(steps: list, done: list[str], why: str) -> None:
    with pytest.raises(SlimlineError, match=why):
        check_order(steps, done)


def test_an_order_with_a_meaning_is_not() -> None:
    check_order([PRUNE, RECOVER, PRUNE, RECOVER, QUANTIZE])
    check_order([RECOVER, QUANTIZE], ["ChannelPruning"])


GIANTS = {
    "text": "x:59" * 3000,
    "lines": "\n\x1b[2J" * 3000,
    "list": ["x"] * 3000,
    "mapping": {"x" * 3000: 1},
    "integer": -(10**5000),
    "bytes": b"\xff" * 3000,
}


@pytest.mark.parametrize("giant", GIANTS.values(), ids=GIANTS.keys())
@pytest.mark.parametrize("config", [Recipe, Budget, *configs().values()], ids=lambda config: config.__name__)
def test_no_value_is_too_large_for_a_sentence(config: type[Config], giant: object) -> None:
    names = [field.alias or name for name, field in config.model_fields.items()]
    for name in [*names, giant]:
        if not isinstance(name, str):
            continue
        try:
            config.model_validate({name: giant})
        except SlimlineError as error:
            assert "\n" not in str(error) and "\x1b" not in str(error) and len(str(error)) < 600, str(error)[:600]
