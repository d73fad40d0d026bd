"""Patterns that choose layers: globs, regular expressions, types."""

from __future__ import annotations

import contextlib
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

import slimline as sl
from slimline.basics.errors import SlimlineError
from slimline.recipe.layers import matches, refuse_unmatched, selected

TYPES = {"stem": {"conv", "Conv2d"}, "stages.0.conv": {"conv", "Conv2d"}, "head": {"linear", "Linear"}}


@pytest.mark.parametrize(
    ("pattern", "chosen"),
    [
        ("*", {"stem", "stages.0.conv", "head"}),
        ("stages.*", {"stages.0.conv"}),
        ("re:st.*", {"stem", "stages.0.conv"}),
        ("re:stage", set()),  # the whole name
        (r"re:stages\.\d+\.(conv|norm)", {"stages.0.conv"}),
        ("type:conv2D", {"stem", "stages.0.conv"}),
        ("type:lin*", {"head"}),
        ("type:lstm", set()),
        ("Stem", set()),
    ],
)
def test_what_a_pattern_chooses(pattern: str, chosen: set[str]) -> None:
    assert {name for name in TYPES if matches((name,), (pattern,), TYPES)} == chosen


def test_kept_layers_are_not_selected_whichever_of_their_names_says_so() -> None:
    assert selected(("stem", "value"), ("st*",), ("head",), TYPES)
    assert not selected(("stem", "value"), ("st*",), ("value",), TYPES)
    assert not selected(("stem",), ("*",), ("type:conv",), TYPES)


def test_a_pattern_that_fits_nothing_is_refused_with_what_is_near() -> None:
    refuse_unmatched("layer", ("*", "type:conv2d"), TYPES, TYPES)
    with pytest.raises(SlimlineError, match=r"There is no layer 'hed'; did you mean 'head'"):
        refuse_unmatched("layer", ("hed",), TYPES, TYPES)
    with pytest.raises(SlimlineError, match="did you mean 'type:conv'"):
        refuse_unmatched("layer", ("type:convo",), TYPES, TYPES)


@pytest.mark.parametrize("text", ["(", "[z-a]", "a{2,1}", "(?P<n>a)(?P<n>b)", "*a"])
def test_what_is_no_regular_expression_is_refused_when_the_step_is_made(text: str) -> None:
    with pytest.raises(SlimlineError, match="is no regular expression"):
        sl.ChannelPruning(ratio=0.5, layers=(f"re:{text}",))


@pytest.mark.parametrize("text", ["(a+)+b", "(a|aa)+b", "(a?a?)*b", "(.*a){20}", ".*.*.*.*", "((a{1,50}){1,50}){1,50}"])
def test_what_could_take_for_ever_is_refused(text: str) -> None:
    with pytest.raises(SlimlineError, match="can take for ever"):
        sl.SparsePruning(amount=0.5, keep=(f"re:{text}",))


@given(st.text("ab|()*+?{}[].\\1,2^$", max_size=24))
def test_whatever_is_taken_answers_at_once(text: str) -> None:
    start = time.monotonic()
    with contextlib.suppress(SlimlineError):
        matches(("a" * 200 + "c",), (f"re:{text}",))
    assert time.monotonic() - start < 20


def test_steps_choose_by_type_and_by_regular_expression() -> None:
    torch = pytest.importorskip("torch")
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8), torch.nn.Linear(8, 3))
    model = sl.load(net, torch.zeros(2, 6))
    plan = sl.plan(model, sl.ChannelPruning(ratio=0.5, layers=("re:0|1",)))
    assert {layer for unit in plan.units.units if unit.name in plan.removed for layer in unit.layers} >= {"0"}
    zeros = sl.apply(model, sl.SparsePruning(amount=0.5, layers=("type:linear",), keep=("re:[23]",)))
    assert list(zeros.masks) == ["0.weight"]
