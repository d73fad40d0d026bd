"""The gate lets float noise and one-step roundings through, and nothing worse."""

from __future__ import annotations

import numpy as np
import pytest

from slimline.basics.errors import SlimlineError
from slimline.measure.parity import compare, parity
from slimline.methods.outputs import bare

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


maps = rng.normal(size=(256, 6, 5, 4)).astype(np.float32)
sequences = rng.normal(size=(256, 7, 8)).astype(np.float32)


def _rounding(outputs: np.ndarray) -> np.ndarray:
    """What integers do: a step of the output's grid here and there."""
    step = np.ptp(outputs) / 255
    return outputs + (step * np.random.default_rng(2).integers(-2, 3, outputs.shape)).astype(outputs.dtype)


@pytest.mark.parametrize("outputs", [maps, sequences, logits], ids=["maps", "sequences", "classes"])
@pytest.mark.parametrize("integer", [False, True])
def test_what_is_wrong_anywhere_is_caught_at_any_rank(outputs: np.ndarray, integer: bool) -> None:
    base = _rounding(outputs) if integer else outputs * (1 + 1e-6)
    fair = parity(outputs, base, integer)
    assert fair.passed and fair.agreement is not None and fair.agreement > 0.9

    def spoilt(change: str) -> np.ndarray:
        wrong = base.copy()
        if change == "row":
            wrong[17] = 0
        elif change == "another row":
            wrong[17] = base[18]
        elif change == "channel":
            wrong[:, 3] = 0
        elif change == "last channel":
            wrong[..., 1] = 0
        elif change == "position":
            wrong[(17, slice(None), *(1,) * (outputs.ndim - 2))] *= -1
        elif change == "place of a sequence":
            wrong[17, 2] *= -1
        elif change == "order":
            wrong = np.ascontiguousarray(base[..., ::-1])
        elif change == "axes":
            wrong = np.ascontiguousarray(np.swapaxes(base.reshape(len(base), -1, 2), 1, 2)).reshape(base.shape)
        return wrong

    changes = ["row", "another row", "channel", "last channel", "position", "order", "axes"]
    if outputs.ndim > 2:
        changes.append("place of a sequence")
    for change in changes:
        assert not parity(outputs, spoilt(change), integer).passed, change


def test_a_small_channel_has_a_spread_of_its_own():
    outputs = maps * np.array([1, 1, 0.2, 1, 1, 1], np.float32)[:, None, None]
    wrong = outputs.copy()
    wrong[:, 2] = outputs[:, 2, ::-1, ::-1]
    assert not parity(outputs, wrong, integer=True).passed
    wrong[:, 2] = outputs[:, 2] + 0.15  # less than rounding to the grid of the others may move it, and systematic
    wrong[:, 2, ::2] -= 0.3
    found = parity(outputs, wrong, integer=True, classes=False)
    assert found.mean_error is not None and found.mean_error < 0.05
    assert "index 2 of dimension 1" in found.reason


def test_a_single_number_takes_its_spread_from_other_inputs():
    one = np.array([[1000.0]], np.float32)
    assert parity(one, one + 0.04, integer=True, spread=1.0).passed
    assert not parity(one, one + 0.1, integer=True, spread=1.0).passed
    assert parity(one, one + 3, integer=True, spread=1.0).gross  # little of its size, and much of how it varies
    assert parity(one, one + 0.04, integer=True).gross  # nothing is known of it
    many = np.arange(8.0)[:, None]  # enough for a spread of their own
    assert not parity(many, many + 1, integer=True, spread=100.0).passed


def test_all_outputs_count_and_the_worst_is_told():
    found = compare((logits, maps), (logits, maps))
    assert found.passed and found.outputs == 2
    found = compare((logits, maps), (logits, maps + 1))
    assert not found.passed and found.reason.startswith("output '1': ")
    assert found.output == "1" and [each.passed for each in found.each] == [True, False]
    named = bare(("label", "map"), (logits, maps))
    assert compare((logits, maps), (logits, maps + 1), known=named).reason.startswith("output 'map': ")
    for wrong, said in (
        ((logits,), "1 outputs, the model 2"),
        ((logits, maps.astype(np.float64)), "output '1': the artifact gives float64"),
        ((logits, maps[:5]), "output '1': the artifact gives float32(5, 6, 5, 4)"),
    ):
        found = compare((logits, maps), wrong)
        assert not found.passed and found.gross and said in found.reason
    assert "empty" in compare((logits[:0],), (logits[:0],)).reason


def test_integers_are_equal_or_wrong():
    ids = np.random.default_rng(0).integers(0, 30_000, (200, 5))
    other = ids.copy()
    other[0, 0] += 1
    assert compare((ids,), (ids,)).passed and not compare((ids,), (other,)).passed
    assert compare((ids,), (other,), integer=True).passed
    assert not compare((ids,), (np.where(ids % 20, ids, 0),), integer=True).passed
    assert not compare((ids > 5,), (ids > 15_000,)).passed


def test_equal_infinities_are_no_difference():
    masked = np.where(np.arange(10) % 3, logits, -np.inf).astype(np.float32)
    assert parity(masked, masked).passed
    assert not parity(masked, logits).passed and not parity(masked, -masked).passed


def test_an_unstable_simulation_explains_no_more_than_it_moves_itself() -> None:
    """Roundings of a deep network fall otherwise in every runtime; a wrong layer is not excused by that."""
    rng = np.random.default_rng(2)
    spread = float(logits.std())

    def moved(size: float) -> np.ndarray:
        noise = rng.normal(size=logits.shape) / np.sqrt(2 / np.pi)
        return (logits + size * spread * noise).astype(np.float32)

    artifact, echo = moved(0.08), moved(0.07)
    plain = parity(logits, artifact, integer=True)
    assert not plain.passed and "0.08 of their spread, more than 0.05" in plain.reason and plain.instability is None
    explained = parity(logits, artifact, integer=True, echo=echo)
    assert explained.passed and explained.instability == pytest.approx(0.07, rel=0.05)
    assert "those of the model by itself move by 0.07" in str(explained)
    assert not parity(logits, moved(0.2), integer=True, echo=echo).passed
    assert not parity(logits, artifact, integer=True, echo=logits).passed, "a stable network excuses nothing"
    # However wild the simulation is: what has nothing to do with it is refused.
    wild = parity(logits, moved(1.5), integer=True, echo=moved(3.0))
    assert not wild.passed and wild.gross
    assert not parity(logits, artifact, integer=False, echo=echo).passed, "floats are compared as ever"
    same = compare([logits, logits], [artifact, logits], integer=True, echoes=[echo, echo])
    assert same.passed and [each.instability is not None for each in same.each] == [True, True]
