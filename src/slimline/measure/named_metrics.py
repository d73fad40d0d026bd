"""Metrics over a whole set that have a name: what ``Data(metric="f1_macro")`` stands for.

They are scikit-learn's and SciPy's, which the tests hold them to, in forms in which thousands of resamples are scored
soon: each first reduces the outputs to what it needs of a sample.
"""

from __future__ import annotations

import numpy as np
from scipy.special import log_softmax

from slimline.basics.errors import SlimlineError
from slimline.measure.set_metrics import SetMetric
from slimline.methods.outputs import class_axis

Array = np.ndarray
Pair = tuple[Array, Array]


def f1_macro(predicted: Array, labels: Array) -> float:
    """The mean over classes of F1, of class numbers ``(n, …)``; positions with negative labels do not count."""
    counted = labels >= 0
    predicted, labels = predicted[counted], labels[counted]
    classes = 1 + int(max(predicted.max(), labels.max()))
    hits = np.bincount(labels[predicted == labels], minlength=classes)
    each = np.bincount(labels, minlength=classes) + np.bincount(predicted, minlength=classes)
    return float((2 * hits[each > 0] / each[each > 0]).mean())


def miou(intersections: Array, unions: Array) -> float:
    """The mean over classes of intersection over union, of counts ``(n, classes)`` of each sample's positions."""
    overlap, area = intersections.sum(0), unions.sum(0)
    return float((overlap[area > 0] / area[area > 0]).mean())


def auc(scores: Array, truth: Array) -> float:
    """The mean over columns ``(n, columns)`` of the area under the ROC curve; NaN where one is all true or false."""
    positive = truth.sum(0)
    ranks = _ranks(scores)
    above = (ranks * truth).sum(0) - positive * (positive + 1) / 2
    return float((above / (positive * (len(truth) - positive))).mean())


def mean_average_precision(scores: Array, truth: Array) -> float:
    """The mean over columns ``(n, columns)`` of the average precision; NaN where a column has no true sample."""
    return float(np.mean([_average_precision(s, t) for s, t in zip(scores.T, truth.T, strict=True)]))


def _average_precision(scores: Array, truth: Array) -> float:
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], np.cumsum(truth[order])
    ends = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)  # of samples with equal scores
    steps = np.diff(hits[ends], prepend=0)
    return float((steps * hits[ends] / (ends + 1)).sum() / hits[-1])


def neg_perplexity(losses: Array, counts: Array) -> float:
    """Less the exponential of the mean loss, of sums of losses in nats and counts of tokens ``(n,)``."""
    return -float(np.exp(losses.sum() / counts.sum()))


def pearson(outputs: Array, labels: Array) -> float:
    """The mean over columns ``(n, columns)`` of the correlation; NaN where a column is constant."""
    a, b = outputs - outputs.mean(0), labels - labels.mean(0)
    return float(((a * b).sum(0) / np.sqrt((a * a).sum(0) * (b * b).sum(0))).mean())


def spearman(outputs: Array, labels: Array) -> float:
    """The mean over columns ``(n, columns)`` of the correlation of ranks; NaN where a column is constant."""
    return pearson(_ranks(outputs), _ranks(labels))


def _ranks(columns: Array) -> Array:
    """From 1, down each column ``(n, columns)``; equals share their mean."""
    from scipy.stats import rankdata  # slow to import, and every run imports this module

    ranks: Array = rankdata(columns, axis=0)
    return ranks


def _classes(outputs: Array, labels: Array | None) -> Pair:
    """Class numbers predicted and true, of one shape."""
    labels = _integers(labels)
    axis = class_axis(outputs.shape, labels.shape, None)
    _within(labels, outputs.shape[axis])
    return outputs.argmax(axis), labels


def _overlaps(outputs: Array, labels: Array | None) -> Pair:
    """Of each sample and class, the positions in both and in either."""
    predicted, labels = _classes(outputs, labels)
    classes = 1 + int(max(predicted.max(), labels.max()))
    intersections, unions = np.zeros((2, len(labels), classes), np.int64)
    for row, (p, y) in enumerate(zip(predicted, labels, strict=True)):
        counted = y >= 0
        p, y = p[counted], y[counted]
        intersections[row] = np.bincount(y[p == y], minlength=classes)
        unions[row] = np.bincount(y, minlength=classes) + np.bincount(p, minlength=classes) - intersections[row]
    return intersections, unions


def _columns(outputs: Array, labels: Array | None) -> Pair:
    """Scores and truth ``(n, columns)``: of the second of two classes, of each of more, or of each label of many."""
    labels = _integers(labels)
    scores = outputs.reshape(len(outputs), -1)
    if labels.shape == outputs.shape or scores.shape[1] == 1:
        truth = labels.reshape(scores.shape)
        if not np.isin(truth, (0, 1)).all():
            raise SlimlineError("Labels of an output of its own must be 0 or 1: give class numbers of shape (n,) else.")
        return scores, truth.astype(bool)
    class_axis(outputs.shape, labels.shape, 1)
    _within(labels, scores.shape[1])
    if scores.shape[1] == 2:
        return scores[:, 1:] - scores[:, :1], labels[:, None] == 1
    return _log_probabilities(scores), labels[:, None] == np.arange(scores.shape[1])


def _losses(outputs: Array, labels: Array | None) -> Pair:
    """The sum of the negative log-probabilities of each sample's labels, and how many they are."""
    labels = _integers(labels)
    axis = class_axis(outputs.shape, labels.shape, None)
    _within(labels, outputs.shape[axis])
    logs = _log_probabilities(np.moveaxis(outputs, axis, -1))
    counted = labels >= 0
    losses = -np.take_along_axis(logs, np.where(counted, labels, 0)[..., None], -1)[..., 0] * counted
    return losses.reshape(len(labels), -1).sum(1), counted.reshape(len(labels), -1).sum(1)


def _values(outputs: Array, labels: Array | None) -> Pair:
    """Real numbers ``(n, columns)``."""
    if labels is None or labels.size != outputs.size:
        labelled = "no labels" if labels is None else f"labels {labels.shape}"
        raise SlimlineError(f"A correlation of outputs {outputs.shape} with {labelled}: give a label for each output.")
    return outputs.reshape(len(outputs), -1).astype(float), labels.reshape(len(outputs), -1).astype(float)


def _log_probabilities(scores: Array) -> Array:
    """Of logits, or of what already are probabilities of classes on the last axis."""
    scores = scores.astype(np.float64)
    if (scores >= 0).all() and np.allclose(scores.sum(-1), 1, atol=1e-3):
        return np.asarray(np.log(np.maximum(scores, np.finfo(np.float32).tiny)))
    return np.asarray(log_softmax(scores, axis=-1))


def _integers(labels: Array | None) -> Array:
    if labels is None or labels.dtype.kind not in "iub":
        kind = "none" if labels is None else str(labels.dtype)
        raise SlimlineError(f"This metric needs integer labels, and they are {kind}: give class numbers.")
    return labels.astype(np.int64)


def _within(labels: Array, classes: int) -> None:
    if labels.max() >= classes:
        raise SlimlineError(
            f"The labels go up to {labels.max()}, but the model has {classes} classes: give positions that do not "
            "count a negative label."
        )


NAMED = {
    "f1_macro": SetMetric(f1_macro, digest=_classes),
    "miou": SetMetric(miou, digest=_overlaps),
    "auc": SetMetric(auc, digest=_columns),
    "mean_average_precision": SetMetric(mean_average_precision, digest=_columns),
    "perplexity": SetMetric(neg_perplexity, digest=_losses),
    "pearson": SetMetric(pearson, digest=_values),
    "spearman": SetMetric(spearman, digest=_values),
}
"""By the name that `Data` takes. Higher is better, so perplexity is scored as its negative."""
