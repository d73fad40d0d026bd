"""Limits as people write them: what they mean, in one spelling, and what is refused."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

import slimline as sl
from slimline.basics.quantities import SIZE, TIME
from slimline.recipe import Budget, Recipe, parse

IN_MS = {"ns": Fraction(1, 10**6), "us": Fraction(1, 1000), "µs": Fraction(1, 1000), "ms": 1, "s": 1000}
IN_BYTES = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
DECIMALS = st.decimals("0.001", 10**5, places=3).map(lambda d: format(d.normalize(), "f"))


@pytest.mark.parametrize(
    ("field", "written", "kept"),
    [
        ("max_latency", "5 ms", "5 ms"),
        ("max_latency", "250us", "0.25 ms"),
        ("max_latency", " 1.5  s ", "1500 ms"),
        ("max_latency", "3 \N{MICRO SIGN}s", "0.003 ms"),
        ("max_latency", "3 \N{GREEK SMALL LETTER MU}s", "0.003 ms"),
        ("max_latency", "1e-3 s", "1 ms"),
        ("max_latency", "0.2", 0.2),
        ("max_latency", 1, 1.0),
        ("max_latency", None, None),
        ("max_size", "2 MB", "2 MB"),
        ("max_size", "0.8MB", "800 kB"),
        ("max_size", "12000 B", "12 kB"),
        ("max_size", "3 MiB", "3.145728 MB"),
        ("max_size", "999 B", "999 B"),
        ("max_size", "1.0009 kB", "1 kB"),
        ("max_memory", "1.5 GiB", "1.610612736 GB"),
        ("max_memory", 0.5, 0.5),
    ],
)
def test_a_limit_is_kept_in_one_spelling(field, written, kept):
    budget = Budget(**{field: written})
    assert getattr(budget, field) == kept and type(getattr(budget, field)) is type(kept)
    assert budget == Budget(**{field: kept})


def test_budgets_that_mean_the_same_are_equal():
    same = [Budget(max_latency=text, max_size="2 MB") for text in ("5 ms", "5.0ms", "0.005 s", "5000 us", "5e6 ns")]
    assert all(budget == same[0] and hash(budget) == hash(same[0]) for budget in same)
    assert Budget(max_size="2000 kB") == Budget(max_size="2 MB") != Budget(max_size="2 MiB")


@given(DECIMALS, st.sampled_from([*IN_MS]), DECIMALS, st.sampled_from([*IN_BYTES]))
def test_what_is_written_means_what_it_says_and_goes_through_yaml(time, time_unit, size, size_unit):
    milliseconds, bytes_ = Fraction(time) * IN_MS[time_unit], int(Fraction(size) * IN_BYTES[size_unit])
    small, few = milliseconds < Fraction(1, 10**6), bytes_ < 1
    texts = {"max_latency": f"{time} {time_unit}", "max_size": f"{size} {size_unit}"}
    for field, refused in (("max_latency", small), ("max_size", few)):
        if refused:
            with pytest.raises(sl.SlimlineError, match=f"^{field} is "):
                Budget(**{field: texts.pop(field)})
    budget = Budget(**texts)
    if "max_latency" in texts:
        assert TIME.read(budget.max_latency) == float(milliseconds)
    if "max_size" in texts:
        assert SIZE.read(budget.max_size) == bytes_
    recipe = Recipe(steps=(sl.StaticQuantization(),), budget=budget)
    assert parse(recipe.dump()) == recipe
    assert Budget.model_validate_json(budget.model_dump_json()) == budget


@given(st.floats(1e-6, 1e15), st.integers(1, 10**15))
def test_every_quantity_is_read_back_as_it_was_written(milliseconds, bytes_):
    assert TIME.read(TIME.write(milliseconds)) == milliseconds
    assert SIZE.read(SIZE.write(bytes_)) == bytes_
    assert SIZE.read(SIZE.write(bytes_, 3)) == pytest.approx(bytes_, rel=0.006)


NO_TIMES = (
    *("5 parsecs", "5", "", "ms", "-1 ms", "0 ms", "0.0 s", "1e99 s", "nan ms", "5 MS", "1_000 ms", "٣ ms", "5 ms 3"),
    *("inf", "2 MB", "1e-9 ns", "9" * 50 + " ns", "5\nms\x1b[2J", "0x5 ms"),
)


@pytest.mark.parametrize("text", NO_TIMES)
def test_what_is_no_time_is_refused_in_one_sentence(text):
    with pytest.raises(sl.SlimlineError) as error:
        Budget(max_latency=text)
    said = str(error.value)
    assert said.startswith("max_latency is ") and said.isprintable()
    assert said.endswith(": give a part of the original's such as 0.2, or a time such as '5 ms'.")


@pytest.mark.parametrize("field", ["max_size", "max_memory"])
@pytest.mark.parametrize("text", ["2 mb", "5 ms", "0.5 B", "2 MBit", "1e30 GB", 1.5, 2])
def test_what_is_no_size_is_refused_in_one_sentence(field, text):
    said = f"^{field} is .*: give a part of the original's such as 0.2, or a size such as '2 MB'.$"
    with pytest.raises(sl.SlimlineError, match=said):
        Budget(**{field: text})


@pytest.mark.parametrize("value", [0, -0.5, float("nan"), "0", "nan", [1], {}])
def test_numbers_that_are_no_parts_stay_refused(value):
    for field in ("max_latency", "max_size", "max_memory"):
        with pytest.raises(sl.SlimlineError, match=f"^{field} of Budget is"):
            Budget(**{field: value})


def test_multiply_accumulates_have_no_unit():
    with pytest.raises(sl.SlimlineError, match="max_macs of Budget is '5 ms' but must be a valid number"):
        Budget(max_macs="5 ms")


def test_a_recipe_in_yaml_takes_units():
    recipe = parse("steps: [{step: StaticQuantization}]\nbudget: {max_latency: 1.5 s, max_size: 800 kB}")
    assert recipe.budget == Budget(max_latency="1500 ms", max_size="0.8 MB")
    with pytest.raises(sl.SlimlineError, match="max_latency is '5 parsecs': give"):
        parse("steps: []\nbudget: {max_latency: 5 parsecs}")
