"""Searches by halves find what asking everything would, with few questions."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimline.methods.search import culprits, mildest, strongest


@pytest.mark.parametrize("count", range(1, 40))
@pytest.mark.parametrize("start", [0, 1])
def test_mildest_is_the_first_that_meets_on_every_small_ladder(start, count):
    for edge in range(start, start + count + 1):
        asked = []

        def meets(rung, edge=edge, asked=asked):
            asked.append(rung)
            return rung >= edge

        found = mildest(start, start + count, meets)
        assert found == (edge if edge < start + count else None)
        assert asked[0] == start
        assert len(asked) == len(set(asked)) <= 2 + math.log2(count)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.floats(0, 1))
def test_mildest_of_monotone_costs_is_the_mildest_feasible(costs, limit):
    falling = sorted(costs, reverse=True)
    feasible = [i for i, cost in enumerate(falling) if cost <= limit]
    assert mildest(0, len(falling), lambda i: falling[i] <= limit) == (feasible[0] if feasible else None)


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_mildest_of_a_jumping_cost_still_meets(answers):
    found = mildest(0, len(answers), answers.__getitem__)
    assert answers[found] if found is not None else not answers[0] and not answers[-1]


@given(st.integers(1, 40), st.integers(-1, 45), st.integers(0, 8))
def test_strongest_is_the_last_that_passes_as_far_as_may_be_asked(count, last, most):
    asked: list[int] = []

    def passes(rung):
        if len(asked) > most:
            return None
        asked.append(rung)
        return rung <= last

    found = strongest(0, count, passes)
    assert len(asked) == len(set(asked)) <= most + 1
    if last < 0:
        assert found is None
    else:
        assert found in asked and found <= last
        if most >= 7:
            assert found == min(last, count - 1)


@given(st.integers(1, 40), st.data())
def test_culprits_are_found_and_nothing_else(count, data):
    pool = [f"layer{i}" for i in range(count)]
    bad = set(data.draw(st.lists(st.sampled_from(pool), min_size=1, max_size=4)))
    found = culprits(pool, lambda without: bad <= without, 10_000)
    assert list(found) == [layer for layer in pool if layer in bad]


@given(st.integers(1, 64), st.data(), st.integers(0, 12))
def test_culprits_within_a_bound_are_enough_and_no_more_is_asked(count, data, most):
    pool = [f"layer{i}" for i in range(count)]
    bad = set(data.draw(st.lists(st.sampled_from(pool), min_size=1, max_size=4)))
    asked = []

    def passes(without):
        asked.append(without)
        return bad <= without

    assert bad <= set(culprits(pool, passes, most))
    assert len(asked) <= most


def test_one_culprit_costs_two_questions_a_halving():
    pool = [str(i) for i in range(64)]
    for bad in pool:
        asked = []

        def passes(without, bad=bad, asked=asked):
            asked.append(without)
            return bad in without

        assert culprits(pool, passes, 100) == (bad,)
        assert len(asked) <= 12
