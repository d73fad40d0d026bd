"""Per-sample scores: by hand, and in every layout."""

from __future__ import annotations

import numpy as np
import pytest

from slimline.basics.errors import SlimlineError
from slimline.measure import agreement, correct, score


def test_correct_by_hand():
    outputs = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [np.nan, 0.0], [np.inf, 0.0]], np.float32)
    assert correct(outputs, np.array([1, 0, 0, 0, 0])).tolist() == [1, 1, 0, 0, 0]
    assert correct(outputs, np.array([[1], [0], [0], [0], [0]], np.uint8)).tolist() == [1, 1, 0, 0, 0]


def test_accuracy_is_sklearns():
    rng = np.random.default_rng(0)
    from sklearn.metrics import accuracy_score

    outputs, labels = rng.normal(size=(200, 7)), rng.integers(0, 7, 200)
    name, values = score(outputs, labels)
    assert name == "accuracy"
    assert values.mean() == pytest.approx(accuracy_score(labels, outputs.argmax(1)))


def test_dense_outputs_in_both_layouts():
    rng = np.random.default_rng(0)
    outputs, labels = rng.normal(size=(3, 4, 5, 6)), rng.integers(0, 4, (3, 5, 6))
    expected = [np.mean(outputs[i].argmax(0) == labels[i]) for i in range(3)]
    assert correct(outputs, labels).tolist() == pytest.approx(expected)
    assert correct(np.moveaxis(outputs, 1, -1), labels).tolist() == pytest.approx(expected)
    assert correct(np.moveaxis(outputs, 1, -1), labels[..., None]).tolist() == pytest.approx(expected)
    assert agreement(outputs, outputs[:, ::-1], 1).shape == (3,)


def test_ambiguous_class_axis_is_asked_for():
    rng = np.random.default_rng(0)
    outputs, labels = rng.normal(size=(3, 4, 4)), rng.integers(0, 4, (3, 4))
    with pytest.raises(SlimlineError, match="give Data outputs"):
        correct(outputs, labels)
    assert correct(outputs, labels, 1).tolist() == correct(np.moveaxis(outputs, 1, 2), labels, -1).tolist()


def test_agreement_by_hand():
    a = np.array([[1.0, 2], [2, 1], [np.nan, 1]])
    b = np.array([[0.0, 5], [0, 5], [0, 5]])
    assert agreement(a, b).tolist() == [1, 0, 0]
    assert score(a[:2], reference=b[:2])[0] == "agreement"


def test_own_metric():
    def closeness(outputs, labels):
        return -np.abs(outputs[:, 0] - labels)

    name, values = score(np.array([[1.0], [2.0]]), np.array([1.5, 2.0]), metric=closeness)
    assert (name, values.tolist()) == ("closeness", [-0.5, 0.0])
    assert score(np.ones((2, 1)), metric=lambda o, y: o[:, 0])[0] == "metric"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: correct(np.ones((3, 2)), np.ones(3)), "integer labels"),
        (lambda: correct(np.ones((3, 2)), np.ones(4, int)), "do not fit"),
        (lambda: correct(np.ones((3, 1)), np.ones(3, int)), "a metric of your own"),
        (lambda: correct(np.ones(3), np.ones(3, int)), "do not fit"),
        (lambda: correct(np.ones((3, 2)), np.ones((3, 2), int)), "do not fit"),
        (lambda: agreement(np.ones((3, 2)), np.ones((3, 3))), "cannot be compared"),
        (lambda: agreement(np.ones((3, 1)), np.ones((3, 1))), "no known class axis"),
        (lambda: agreement(np.ones((3, 4, 4)), np.ones((3, 4, 4))), "no known class axis"),
        (lambda: score(np.ones((3, 2))), "nothing to score"),
        (lambda: score(np.ones((3, 2)), metric=lambda o, y: o), "give one each"),
        (lambda: score(np.ones((3, 2)), metric=lambda o, y: o[:, 0] / 0), "NaN or infinite"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_mistakes_are_one_sentence(call, said):
    with pytest.raises(SlimlineError, match=said) as caught:
        call()
    assert "\n" not in str(caught.value)
