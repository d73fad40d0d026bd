"""Metrics over the whole set: the named ones against scikit-learn and SciPy, and the bootstrap of their drop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

from slimline import Data, SetMetric, SlimlineError
from slimline.measure.accuracy import metric_name, score
from slimline.measure.certificate import certify
from slimline.measure.named_metrics import NAMED
from slimline.measure.set_certificate import certify_set
from slimline.measure.set_metrics import SetScores


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def value(name: str, outputs: np.ndarray, labels: np.ndarray | None) -> float:
    return score(outputs, labels, metric=NAMED[name])[1].mean()


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 5), st.booleans())
def test_classification_metrics_are_scikit_learns(seed: int, classes: int, tied: bool) -> None:
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, 60)])
    outputs = rng.standard_normal((len(labels), classes)) + 0.7 * np.eye(classes)[labels]
    outputs = np.round(outputs) if tied and classes == 2 else outputs  # logarithms break ties
    probabilities = softmax(outputs)
    assert value("f1_macro", outputs, labels) == pytest.approx(sk.f1_score(labels, outputs.argmax(1), average="macro"))
    assert value("miou", outputs, labels) == pytest.approx(sk.jaccard_score(labels, outputs.argmax(1), average="macro"))
    assert value("perplexity", outputs, labels) == pytest.approx(
        -np.exp(sk.log_loss(labels, probabilities, labels=range(classes)))
    )
    if classes == 2:
        margin = outputs[:, 1] - outputs[:, 0]
        assert value("auc", outputs, labels) == pytest.approx(sk.roc_auc_score(labels, margin))
        assert value("auc", margin[:, None], labels) == pytest.approx(sk.roc_auc_score(labels, margin))
        expected = sk.average_precision_score(labels, margin)
    else:
        logs = outputs - np.log(np.exp(outputs).sum(1, keepdims=True))
        columns = [sk.roc_auc_score(labels == k, logs[:, k]) for k in range(classes)]
        assert value("auc", outputs, labels) == pytest.approx(np.mean(columns))
        expected = np.mean([sk.average_precision_score(labels == k, logs[:, k]) for k in range(classes)])
    assert value("mean_average_precision", outputs, labels) == pytest.approx(expected)


def test_dense_multilabel_and_real_ones(rng: np.random.Generator) -> None:
    labels = rng.integers(-1, 3, (6, 5, 4))
    outputs = rng.standard_normal((6, 3, 5, 4))
    counted, predicted = labels >= 0, outputs.argmax(1)
    jaccard = sk.jaccard_score(labels[counted], predicted[counted], average="macro")
    assert value("miou", outputs, labels) == pytest.approx(jaccard)
    f1 = sk.f1_score(labels[counted], predicted[counted], average="macro")
    assert value("f1_macro", outputs, labels) == pytest.approx(f1)
    assert value("f1_macro", np.moveaxis(outputs, 1, -1), labels) == pytest.approx(f1)
    probabilities = softmax(np.moveaxis(outputs, 1, -1))
    loss = sk.log_loss(labels[counted], probabilities[counted], labels=range(3))
    assert value("perplexity", outputs, labels) == pytest.approx(-np.exp(loss))
    assert value("perplexity", probabilities, labels) == pytest.approx(-np.exp(loss))

    many = rng.integers(0, 2, (40, 3))
    scores = rng.standard_normal((40, 3))
    assert value("auc", scores, many) == pytest.approx(sk.roc_auc_score(many, scores, average="macro"))
    precision = sk.average_precision_score(many, scores, average="macro")
    assert value("mean_average_precision", scores, many) == pytest.approx(precision)

    real = scores[:, :1] + rng.standard_normal((40, 1))
    assert value("pearson", scores[:, :1], real[:, 0]) == pytest.approx(stats.pearsonr(scores[:, 0], real[:, 0])[0])
    assert value("spearman", scores[:, :1], real) == pytest.approx(stats.spearmanr(scores[:, 0], real[:, 0])[0])


def mean_of(outputs: Any, labels: Any) -> float:
    return float(outputs.mean())


def test_wrong_ones_are_refused_in_a_sentence() -> None:
    outputs, labels = np.eye(4), np.arange(4)
    cases: list[tuple[Any, str]] = [
        (lambda o, y: 0.5, "gave one number for 4 samples: give one each, or Data metric=slimline.SetMetric"),
        (SetMetric(lambda o, y: o[:, 0]), r"gave shape \(4,\) for a whole set.*metric=f, without SetMetric"),
        (SetMetric(lambda o, y: None), "returned None for 4 samples"),
        (SetMetric(lambda o, y: float("nan")), "is nan of 4 samples"),
        (SetMetric(lambda o, y: 1 / 0), r"raised ZeroDivisionError .* on outputs \(4, 4\) and labels \(4,\)"),
        (SetMetric(mean_of, lambda o, y: o), r"did not give a pair \(outputs, labels\) with a row for each"),
        (SetMetric(mean_of, lambda o, y: (o[:2], y)), "did not give a pair"),
    ]
    for metric, said in cases:
        with pytest.raises(SlimlineError, match=said):
            score(outputs, labels, metric=metric)
    for name in ("f1_macro", "auc", "perplexity"):
        with pytest.raises(SlimlineError, match="has 3 classes: give positions"):
            value(name, outputs[:, :3], labels)
    for name in NAMED:
        with pytest.raises(SlimlineError, match="label"):
            value(name, outputs, None)
    with pytest.raises(SlimlineError, match="SetMetric got a int: give a function"):
        SetMetric(3)  # type: ignore[arg-type]
    with pytest.raises(SlimlineError, match="f1_macro"):
        Data(test=(outputs, labels), metric="f1_makro")
    with pytest.raises(SlimlineError, match="metric_range is of a sample's score"):
        Data(test=(outputs, labels), metric="f1_macro", metric_range=(0, 1))
    assert metric_name(SetMetric(mean_of)) == "mean_of"


def scores(outputs: Any, labels: Any = None, function: Any = mean_of) -> SetScores:
    found = score(outputs, labels, metric=SetMetric(function))[1]
    assert isinstance(found, SetScores)
    return found


def test_the_bootstrap_of_a_mean_is_that_of_scores_per_sample(rng: np.random.Generator) -> None:
    before = rng.exponential(size=(300, 1))
    after = before - rng.exponential(0.1, size=(300, 1))
    found = certify_set(scores(before), scores(after), 0.2, seed=3, resamples=4000)
    per_sample = certify(before[:, 0], after[:, 0], 0.2, metric="mean", score_range=None)
    assert found.observed_drop == pytest.approx(per_sample.observed_drop)
    width = per_sample.bound - per_sample.lower_bound
    assert found.bound == pytest.approx(per_sample.bound, abs=0.05 * width)
    assert found.lower_bound == pytest.approx(per_sample.lower_bound, abs=0.05 * width)
    assert found == certify_set(scores(before), scores(after), 0.2, seed=3, resamples=4000)
    assert found.verdict == "measured" and found.n == 300
    assert "only the mean of a score per sample can be certified" in found.sentence()
    assert "nominal 95 %" in found.sentence()


def test_groups_are_drawn_as_wholes(rng: np.random.Generator) -> None:
    """Of copies in groups, the interval is as wide as that of the distinct samples."""
    before, after = rng.random((2, 40, 1))
    alone = certify_set(scores(before), scores(after), None, resamples=2000)
    groups = np.repeat(np.arange(40), 5)
    copied = certify_set(scores(before[groups]), scores(after[groups]), None, groups=groups, resamples=2000)
    assert copied.bound == pytest.approx(alone.bound) and copied.lower_bound == pytest.approx(alone.lower_bound)
    assert (copied.n, copied.groups, copied.samples) == (40, 40, 200)
    assert "40 groups of 200 samples, drawn as wholes" in copied.sentence()
    named = np.array([f"g{i}" for i in groups], object)
    assert certify_set(scores(before[groups]), scores(after[groups]), None, groups=named, resamples=9).n == 40


def test_sets_without_a_value_are_left_out_and_counted(rng: np.random.Generator) -> None:
    outputs, labels = rng.random((12, 1)), np.arange(12) < 1  # a third of the resamples have no positive sample
    ticks: list[float] = []
    original, compressed = (score(o, labels, metric=NAMED["auc"])[1] for o in (outputs, 1 - outputs))
    assert isinstance(original, SetScores) and isinstance(compressed, SetScores)
    found = certify_set(original, compressed, None, resamples=500, progress=ticks.append)
    (note,) = found.notes
    assert "auc is not defined of " in note and 120 < int(note.split()[5]) < 230
    assert ticks[-1] == 1 and -1 <= found.lower_bound <= found.bound <= 1


def test_equal_models_lose_nothing_and_structures_are_taken_apart() -> None:
    pair = {"a": np.arange(6.0), "b": np.ones((6, 2))}
    same = SetScores.of(SetMetric(lambda o, y: float(o["a"].mean() + o["b"].mean())), "both", pair, None)
    found = certify_set(same, same, 0.01, resamples=50)
    assert found.observed_drop == found.bound == found.lower_bound == 0
    assert same[[0, 0]].mean() == 1.0 and len(same) == 6


def test_risk_that_earlier_uses_spent_takes_more_resamples() -> None:
    calls: list[int] = []

    def counted(outputs: Any, labels: Any) -> float:
        calls.append(len(outputs))
        return float(outputs.mean())

    values = np.arange(5.0)[:, None]
    certify_set(scores(values, None, counted), scores(values + 1, None, counted), None)
    first = len(calls)
    calls.clear()
    certify_set(scores(values, None, counted), scores(values + 1, None, counted), None, use=1)
    assert first < len(calls) < 2 * 2600
