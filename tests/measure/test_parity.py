"""The gate lets float noise and one-step roundings through, and nothing worse."""

from __future__ import annotations

import numpy as np
import pytest

from slimline.errors import SlimlineError
from slimline.measure.parity import parity

rng = np.random.default_rng(0)
logits = rng.normal(0, 3, (500, 10)).astype(np.float32)


def test_equal_outputs():
    found = parity(logits, logits)
    assert found.passed and found.max_error == 0 and found.agreement == 1 and found.n == 500


def test_float_tolerance_is_relative_to_the_largest():
    largest = np.abs(logits).max()
    for scale in (1e-6, 1.0, 1e6):
        wrong = logits.copy()
        wrong[3, 4] += 0.9e-3 * largest
        assert parity(scale * logits, scale * wrong).passed
        wrong[3, 4] += 0.2e-3 * largest
        found = parity(scale * logits, scale * wrong)
        assert not found.passed and found.relative_error == pytest.approx(1.1e-3, rel=1e-3)
        assert "differs by 0.0011" in found.reason


def test_figures_by_hand():
    found = parity(np.array([[0.0, 2.0], [0.0, 2.0]]), np.array([[0.0, 2.0], [3.0, 2.0]]), integer=True)
    assert (found.max_error, found.relative_error, found.mean_error, found.agreement) == (3.0, 1.5, 0.75, 0.5)
    assert "50.0 % of the classes stay" in found.reason and "0.75 of their spread" in found.reason


def test_one_step_of_an_integer_grid_passes():
    rng = np.random.default_rng(1)
    step = (logits.max() - logits.min()) / 255
    rounded = np.round(logits / step) * step
    nudged = rounded + step * (rng.random(logits.shape) < 0.3)
    assert parity(rounded, nudged, integer=True).passed
    assert not parity(rounded, nudged, integer=False).passed


def test_near_ties_may_flip_and_clear_classes_may_not():
    reference = np.tile([[1.0, 0.0, 5.0, 5.01]], (100, 1))
    flipped = reference.copy()
    flipped[:50, 2] += 0.02
    found = parity(reference, flipped, integer=True)
    assert found.passed and found.agreement == 0.5
    flipped[50:53, 0] = 6.0
    found = parity(reference, flipped, integer=True)
    assert not found.passed and found.reason == "97.0 % of the classes stay, fewer than 99 %"


def test_a_wrong_integer_artifact_fails():
    assert not parity(logits, np.roll(logits, 1, axis=1), integer=True).passed
    assert not parity(logits, logits + 1, integer=True).passed  # every class agrees, the outputs do not


def test_regression_leaves_the_agreement_out():
    rng = np.random.default_rng(1)
    close = logits + rng.normal(0, 0.1, logits.shape).astype(np.float32)
    found = parity(logits, close, integer=True, classes=False)
    assert found.agreement is None and found.passed
    assert parity(np.ones((4, 1)), np.ones((4, 1)), integer=True).agreement is None


def test_nan_fails():
    broken = logits.copy()
    broken[0, 0] = np.nan
    assert "artifact's outputs are not all finite" in parity(logits, broken).reason
    assert "model's outputs are not all finite" in parity(broken, logits).reason
    assert parity(logits, broken).model_dump_json()


def test_shapes_must_be_equal():
    with pytest.raises(SlimlineError, match="must be the same"):
        parity(logits, logits[:5])
    with pytest.raises(SlimlineError, match="at least one row"):
        parity(logits[:0], logits[:0])
