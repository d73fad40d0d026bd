"""What an artifact answers, and per-sample scores of the answers: what the certificate is made of.

A score is a number per sample, the higher the better. One sample is one row of the data: where a row has many
predictions (the pixels of a segmentation), its score is their mean, because they are not independent.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from slimline.basics.arrays import as_array
from slimline.basics.errors import SlimlineError, raised
from slimline.measure.process import Artifact, Worker
from slimline.measure.set_metrics import SetMetric, SetScores

Scores = np.ndarray | SetScores
"""A score per sample ``(n,)``, or what stands in its place where the metric is of the whole set."""

Metric = SetMetric | Callable[[np.ndarray, np.ndarray | None], np.ndarray]
"""The user's own: outputs ``(n, …)`` and labels or None to scores ``(n,)``, the higher the better, or a `SetMetric`."""

_CHUNK_BYTES = 2**26


def outputs(
    artifact: Path | Artifact,
    inputs: tuple[np.ndarray, ...],
    batch: int = 32,
    threads: int = 1,
    progress: Callable[[float], None] | None = None,
) -> np.ndarray:
    """The outputs ``(n, …)`` of an artifact, run by its runtime in a fresh process.

    Parameters
    ----------
    inputs : one array ``(n, …)`` per input of the model.
    batch : rows a run; the last run may have fewer.
    progress : called with the part done, in (0, 1].
    """
    lengths = {len(x) for x in inputs}
    if len(lengths) != 1 or lengths == {0}:
        said = " and ".join(str(n) for n in sorted(lengths)) or "no"
        raise SlimlineError(f"The inputs have {said} rows: give each input the same number of rows, at least one.")
    rows = lengths.pop()
    # Through files of bounded size, whatever the data set's.
    row_bytes = max(1, sum(x.nbytes for x in inputs) // rows)
    chunk = max(1, _CHUNK_BYTES // row_bytes // batch) * batch
    parts = []
    with Worker(artifact, threads) as worker:
        for start in range(0, rows, chunk):
            parts.append(worker.predict(tuple(x[start : start + chunk] for x in inputs), batch))
            if progress is not None:
                progress(min(1.0, (start + chunk) / rows))
    found = np.concatenate(parts)
    if len(found) != rows:
        raise SlimlineError(
            f"{Artifact.of(artifact).path} answers {len(found)} rows for {rows}: its first output needs a row per "
            "sample."
        )
    return found


def correct(outputs: np.ndarray, labels: np.ndarray, class_axis: int | None = None) -> np.ndarray:
    """Which samples are classified correctly, ``(n,)`` float64: 1 or 0, or the part of a sample's positions.

    Parameters
    ----------
    outputs : scores of the classes, ``(n, classes)``, ``(n, classes, …)`` or ``(n, …, classes)``.
    labels : integers ``(n,)`` or ``(n, …)``; a last dimension of one is dropped where the outputs want that.
    class_axis : which axis of `outputs` counts classes; None finds the one whose removal gives the labels' shape.

    Where the class scores at a position are not all finite, the position counts as wrong.
    """
    if not np.issubdtype(labels.dtype, np.integer):
        raise SlimlineError(
            f"Accuracy needs integer labels, not {labels.dtype}: give class indices or your own metric."
        )
    if labels.ndim == outputs.ndim and labels.shape[-1] == 1:
        labels = labels[..., 0]
    axis = class_axis_of(outputs.shape, labels.shape, class_axis)
    right = (outputs.argmax(axis) == labels) & np.isfinite(outputs).all(axis)
    return _row_means(right)


def agreement(outputs: np.ndarray, reference: np.ndarray, class_axis: int | None = None) -> np.ndarray:
    """Which samples get the same class as in `reference`, of the same shape ``(n, …)``; scores as of `correct`.

    `class_axis` is needed only where the outputs have more than two dimensions.
    """
    if outputs.shape != reference.shape:
        raise SlimlineError(
            f"Outputs of shape {outputs.shape} cannot be compared with some of shape {reference.shape}."
        )
    if class_axis is None and outputs.ndim == 2:
        class_axis = 1
    if class_axis is None or outputs.shape[class_axis] < 2:
        raise SlimlineError(
            f"Outputs of shape {outputs.shape} have no known class axis: give labels, or a metric of your own."
        )
    finite = np.isfinite(outputs).all(class_axis) & np.isfinite(reference).all(class_axis)
    return _row_means((outputs.argmax(class_axis) == reference.argmax(class_axis)) & finite)


def score(
    outputs: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    reference: np.ndarray | None = None,
    metric: Metric | None = None,
    class_axis: int | None = None,
) -> tuple[str, Scores]:
    """The name of the metric that fits, and the scores ``(n,)``: bool where they can only be 0 or 1, else float64.
    `SetScores` of a metric over the whole set.

    The user's `metric` where there is one, else ``accuracy`` where there are labels, else ``agreement`` with
    the outputs of the original, `reference`.
    """
    if metric is not None:
        return metric_name(metric), evaluate(metric, outputs, labels)
    if labels is not None:
        values, name = correct(outputs, labels, class_axis), "accuracy"
    elif reference is not None:
        values, name = agreement(outputs, reference, class_axis), "agreement"
    else:
        raise SlimlineError(
            "There is nothing to score the outputs by: give labels, the original's outputs, or a metric."
        )
    return name, values.astype(bool) if outputs.ndim == 2 else values


def evaluate(metric: Metric, outputs: np.ndarray, labels: np.ndarray | None) -> Scores:
    """The user's scores ``(n,)``, bool if that is what came, else float64; it is given copies, which it may change.
    `SetScores` of a metric over the whole set.

    Raises
    ------
    SlimlineError : whatever the function raises or returns that is not a finite number per sample, or for the set.
    """
    name, n = f"The metric {metric_name(metric)}", len(outputs)
    if isinstance(metric, SetMetric):
        return SetScores.of(metric, metric_name(metric), outputs, labels)
    try:
        raw = metric(outputs.copy(), None if labels is None else labels.copy())
    except SlimlineError:
        raise
    except Exception as e:
        raise SlimlineError(f"{name} {raised(e)} on outputs {outputs.shape} and {_of(labels)}.") from e
    if raw is None:
        raise SlimlineError(f"{name} returned None for {n} samples: return a number for each.")
    values = as_array(raw, name, exact=True)
    if values.ndim == 0:
        raise SlimlineError(
            f"{name} gave one number for {n} samples: give one each, or Data metric=slimline.SetMetric(f) if it is a "
            "metric of the whole set."
        )
    if values.shape != (n,):
        raise SlimlineError(f"{name} gave shape {values.shape} for {n} samples: give one each.")
    if values.dtype.kind == "b":
        return values
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise SlimlineError(f"{name} gave NaN or infinite scores: return a finite number per sample.")
    return values


def _of(labels: np.ndarray | None) -> str:
    return "no labels" if labels is None else f"labels {labels.shape}"


def metric_name(metric: Metric | None) -> str:
    """What the scores of `metric` are called: its own name, or its class's; ``metric`` where it has none."""
    if metric is None:
        return "accuracy"
    named: object = metric.function if isinstance(metric, SetMetric) else metric
    while isinstance(named, functools.partial):
        named = named.func
    name = getattr(named, "__name__", None) or type(named).__name__
    return name if isinstance(name, str) and name.isidentifier() else "metric"


def class_axis_of(outputs: tuple[int, ...], labels: tuple[int, ...], given: int | None) -> int:
    fitting = [a for a in range(1, len(outputs)) if (*outputs[:a], *outputs[a + 1 :]) == labels]
    if given is not None:
        fitting = [a for a in fitting if a == given % len(outputs)]
    else:
        fitting = [a for a in fitting if a in (1, len(outputs) - 1)]
    if not fitting:
        raise SlimlineError(
            f"Labels of shape {labels} do not fit outputs of shape {outputs}: the labels must have the outputs' shape "
            "without the class axis."
        )
    if len(fitting) > 1:
        raise SlimlineError(f"In outputs of shape {outputs} axis 1 or the last may count classes: give class_axis.")
    if outputs[fitting[0]] < 2:
        raise SlimlineError(
            f"Outputs of shape {outputs} name a single class, so accuracy means nothing: give a metric of your own, "
            "such as lambda outputs, labels: (outputs[:, 0] > 0) == labels."
        )
    return fitting[0]


def _row_means(right: np.ndarray) -> np.ndarray:
    means: np.ndarray = right.reshape(len(right), -1).mean(axis=1, dtype=np.float64)
    return means
