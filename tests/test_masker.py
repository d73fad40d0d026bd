"""Masks that change while a network trains, on arrays alone."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import numpy as np
import pytest

from slimline.basics.errors import SlimlineError
from slimline.methods.schedules import sparsity
from slimline.methods.sparsity import Axes
from slimline.steps.sparse.masker import Masker
from slimline.steps.sparse.step import SparsePruning

SHAPES = {"a": (6, 8), "b": (4, 16)}
LAYOUTS = {name: Axes((1, *shape), (0, 1, 2), 1) for name, shape in SHAPES.items()}


def run(total=40, weights=None, gradients=None, old=None, **fields):
    """A masker, and what it said after every step; weights grow at random and are held at zero."""
    rng = np.random.default_rng(0)
    masker = Masker(SparsePruning(**{"amount": 0.75, **fields}), LAYOUTS, SHAPES, total, 0, old)
    held = weights or {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    slopes = gradients or {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    said = []
    for _ in range(total):
        changed = masker.advance(partial(dict, held), partial(dict, slopes))
        held = {n: np.where(masker.masks[n], w + 0.01 * rng.normal(size=w.shape), 0) for n, w in held.items()}
        said.append((changed, masker.sparsity, masker.complete, dict(masker.masks)))
    return masker, said


@pytest.mark.parametrize("schedule", ["polynomial", "exponential", "constant"])
@pytest.mark.parametrize("scope", ["local", "row", "global", "erk"])
def test_the_formula_is_followed_and_nothing_comes_back(schedule, scope):
    masker, said = run(schedule=schedule, scope=scope, begin=0.25, end=0.75, frequency=4)
    assert [i + 1 for i, (changed, *_) in enumerate(said) if changed] == [10, 14, 18, 22, 26, 30]
    for step in (10, 18, 30):
        expected = sparsity(schedule, (step - 10) / 20, 0.75)
        assert said[step - 1][1] == pytest.approx(expected, abs=0.07)
    for (*_, before), (*_, after) in pairwise(said):
        assert all(not (after[n] & ~before[n]).any() for n in SHAPES)
    assert masker.sparsity == pytest.approx(0.75, abs=0.01)
    first = next(i for i, (_, _, settled, _) in enumerate(said) if settled)
    assert first + 1 == (10 if schedule == "constant" else 30)


def test_the_lowest_go():
    weights = {name: np.arange(1.0, np.prod(shape) + 1).reshape(shape) for name, shape in SHAPES.items()}
    masker = Masker(SparsePruning(amount=0.5, schedule="constant"), LAYOUTS, SHAPES, 10, 0)
    assert masker.advance(lambda: weights, dict)
    assert masker.masks["a"].tolist() == (weights["a"] > 24).tolist()


def test_rigl_exchanges_the_lowest_for_the_steepest():
    step = SparsePruning(amount=0.5, schedule="constant", regrow=0.5, begin=1, end=9, frequency=4)
    masker = Masker(step, LAYOUTS, SHAPES, 10, 0)
    weights = {n: np.arange(1.0, np.prod(s) + 1).reshape(s) for n, s in SHAPES.items()}
    slopes = {n: -np.arange(float(np.prod(s)))[::-1].reshape(s) for n, s in SHAPES.items()}  # steepest where it is low
    for _ in range(4):
        masker.advance(lambda: weights, lambda: slopes)
    before = masker.masks["a"]
    weights = {n: np.where(masker.masks[n], w, 0) for n, w in weights.items()}
    assert masker.advance(lambda: weights, lambda: slopes)
    after = masker.masks["a"]
    assert before.sum() == after.sum() == 24
    # In the middle of the cosine a quarter of the 24 that stay is exchanged: half of half.
    assert (before & ~after).sum() == (after & ~before).sum() == 6
    assert after.ravel()[:6].all()
    assert not after.ravel()[24:30].any()
    assert masker.gradient


def test_acdc_takes_turns_and_ends_sparse():
    _, said = run(schedule="acdc", begin=8, end=32, frequency=8)
    found = [round(s, 2) for _, s, *_ in said]
    assert found[:7] == [0] * 7
    assert found[7:15] == [0.75] * 8
    assert found[15:23] == [0] * 8
    assert found[23:31] == [0.75] * 8
    assert found[31:] == [0.75] * 9


def test_n_of_m_comes_gradually():
    masker, said = run(amount=None, pattern="2:8", schedule="polynomial", end=0.5)
    for name in SHAPES:
        assert (masker.masks[name].reshape(-1, 8).sum(1) == 2).all()
    kept = [int(masks["a"].reshape(-1, 8).sum(1)[0]) for *_, masks in said]
    assert kept == sorted(kept, reverse=True)
    assert set(kept) >= {2, 4, 6}


def test_older_masks_stay():
    old = {"a": np.random.default_rng(1).random(SHAPES["a"]) < 0.5}
    for fields in ({"schedule": "polynomial"}, {"schedule": "acdc"}, {"schedule": "constant", "regrow": 0.3}):
        _, said = run(old=old, **fields)
        assert all(not (masks["a"] & ~old["a"]).any() for *_, masks in said)


def test_it_goes_on_from_its_state():
    step = SparsePruning(amount=0.75, schedule="polynomial", criterion="taylor", frequency=3)
    rng = np.random.default_rng(0)
    weights, slopes = ({n: rng.normal(size=s) for n, s in SHAPES.items()} for _ in range(2))
    whole, first, second = (Masker(step, LAYOUTS, SHAPES, 30, 0) for _ in range(3))
    for _ in range(30):
        whole.advance(lambda: weights, lambda: slopes)
    for _ in range(11):
        first.advance(lambda: weights, lambda: slopes)
    second.restore(first.state())
    assert second.sparsity == first.sparsity
    for _ in range(19):
        second.advance(lambda: weights, lambda: slopes)
    for name in SHAPES:
        np.testing.assert_array_equal(second.masks[name], whole.masks[name])


@pytest.mark.parametrize(
    ("fields", "total", "sentence"),
    [
        ({"schedule": "polynomial"}, None, "unknown length"),
        ({"schedule": "polynomial", "begin": 0, "end": 50}, 40, "train longer or end earlier"),
        ({"schedule": "polynomial", "begin": 30, "end": 0.5}, 40, "swap them"),
        ({"schedule": "oneshot"}, 40, "apply it"),
    ],
)
def test_times_without_a_meaning_are_refused(fields, total, sentence):
    with pytest.raises(SlimlineError, match=sentence):
        Masker(SparsePruning(amount=0.5, **fields), LAYOUTS, SHAPES, total, 0)
