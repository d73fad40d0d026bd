"""What an artifact answers, and per-sample scores of the answers: what the certificate is made of.

A score is a number per sample, the higher the better. One sample is one row of the data: where a row has many
predictions (the pixels of a segmentation), its score is their mean, because they are not independent.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slimline.basics.arrays import as_array
from slimline.basics.errors import SlimlineError, raised
from slimline.basics.named import Labels, Named, parts
from slimline.measure.process import Artifact, Worker
from slimline.measure.set_metrics import SetMetric, SetScores
from slimline.methods.outputs import IGNORED, Declared, Output, aligned, described
from slimline.methods.outputs import class_axis as axis_of_classes

Outputs = np.ndarray | Named
"""What a network answers to all samples: an array ``(n, …)`` of its one output, or several; None for one that does not
count."""
Scores = np.ndarray | SetScores
"""A score per sample ``(n,)``, or what stands in its place where the metric is of the whole set."""
Metric = SetMetric | Callable[[Any, Any], np.ndarray]
"""The user's own: `Outputs` and `Labels` to scores ``(n,)``, the higher the better, or a `SetMetric`."""

_CHUNK_BYTES = 2**26
_ROUNDING = 1e-3  # by which a probability may lie outside of 0 and 1


def outputs(
    artifact: Path | Artifact,
    inputs: tuple[np.ndarray, ...],
    batch: int = 32,
    threads: int = 1,
    progress: Callable[[float], None] | None = None,
    names: Sequence[str] = (),
    needed: Collection[int] | None = None,
) -> Outputs:
    """The outputs ``(n, …)`` of an artifact, run by its runtime in a fresh process.

    Parameters
    ----------
    inputs : one array ``(n, …)`` per input of the model.
    batch : rows a run; the last run may have fewer.
    progress : called with the part done, in (0, 1].
    names : of the outputs; by default those that the artifact gives them.
    needed : positions of the outputs that count; by default all that have a row per sample.
    """
    lengths = {len(x) for x in inputs}
    if len(lengths) != 1 or lengths == {0}:
        counts = " and ".join(str(n) for n in sorted(lengths)) or "no"
        raise SlimlineError(f"The inputs have {counts} rows: give each input the same number of rows, at least one.")
    rows = lengths.pop()
    # Through files of bounded size, whatever the data set's.
    row_bytes = max(1, sum(x.nbytes for x in inputs) // rows)
    chunk = max(1, _CHUNK_BYTES // row_bytes // batch) * batch
    pieces = []
    with Worker(artifact, threads) as worker:
        names = names or worker.output_names
        for start in range(0, rows, chunk):
            pieces.append(worker.outputs(tuple(x[start : start + chunk] for x in inputs), batch, needed))
            if progress is not None:
                progress(min(1.0, (start + chunk) / rows))
    whole = [None if each[0] is None else np.concatenate(each) for each in zip(*pieces, strict=True)]
    if not any(array is not None for array in whole):
        raise SlimlineError(
            f"{Artifact.of(artifact).path} does not answer {rows} rows with as many: an output needs a row per sample."
        )
    return as_outputs(whole, names)


def as_outputs(arrays: Sequence[np.ndarray | None], names: Sequence[str] = ()) -> Outputs:
    """One array, or several by name: what a metric gets."""
    if len(arrays) == 1 and arrays[0] is not None:
        return arrays[0]
    return Named(arrays, names if len(names) == len(arrays) else [str(i) for i in range(len(arrays))])


def scored(names: Sequence[str], labels: Labels, metric: Metric | None, declared: Declared | None = None) -> set[int]:
    """Positions of the outputs that `score` reads; `names` are of all."""
    every = set(range(len(names)))
    if metric is not None:
        return every
    named = [Output(name=name) for name in names]
    if labels is not None:
        return {index for index, own in enumerate(aligned(labels, named)) if own is not None}
    chosen = {index for index, name in enumerate(names) if name in (declared or {}) or index in (declared or {})}
    return chosen or every


def correct(outputs: np.ndarray, labels: np.ndarray, class_axis: int | None = None, name: str = "") -> np.ndarray:
    """Which samples are classified correctly, ``(n,)`` float64: 1 or 0, or the part of a sample's positions.

    Parameters
    ----------
    outputs : scores of the classes, ``(n, classes)``, ``(n, classes, …)`` or ``(n, …, classes)``.
    labels : integers ``(n,)`` or ``(n, …)``; a last dimension of one is dropped where the outputs want that. Positions
        whose label is -100 do not count.
    class_axis : which axis of `outputs` counts classes; None finds the one whose removal gives the labels' shape.
    name : of the output, for messages.

    Where the class scores at a position are not all finite, the position counts as wrong.
    """
    if not np.issubdtype(labels.dtype, np.integer):
        raise SlimlineError(
            f"Accuracy needs integer labels, not {labels.dtype}: give class indices or your own metric."
        )
    if len(labels) != len(outputs):
        raise SlimlineError(f"Labels of {len(labels)} rows do not fit outputs of {len(outputs)}: give one for each.")
    if labels.ndim == outputs.ndim and labels.shape[-1] == 1:
        labels = labels[..., 0]
    axis = axis_of_classes(outputs.shape, labels.shape, class_axis, name)
    right = (outputs.argmax(axis) == labels) & np.isfinite(outputs).all(axis)
    if labels.ndim == 1:
        return _row_means(right)
    counts = labels.reshape(len(labels), -1) != IGNORED
    number = counts.sum(1)
    if not number.all():
        sample = int(np.flatnonzero(number == 0)[0])
        raise SlimlineError(
            f"Sample {sample} has no label that counts, as all are {IGNORED}, so nothing can be scored of it: leave "
            "such samples out."
        )
    means: np.ndarray = (right.reshape(counts.shape) & counts).sum(1) / number
    return means


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


def jaccard(outputs: np.ndarray, labels: np.ndarray, threshold: float = 0.0) -> np.ndarray:
    """Of the labels that a sample gets or has, the part that it both gets and has: ``(n,)`` float64 in 0 to 1, 1 where
    there are none.

    Parameters
    ----------
    outputs : ``(n, …)``; what is above `threshold` is a yes. What is not finite is wrong.
    labels : zeros and ones or booleans, as many per sample.
    """
    truth = labels.reshape(len(labels), -1) != 0
    answers = outputs.reshape(truth.shape)
    yes = np.where(np.isfinite(answers), answers > threshold, ~truth)
    both, either = (yes & truth).sum(1), (yes | truth).sum(1)
    return np.where(either == 0, 1.0, both / np.maximum(either, 1))


def threshold_of(original: np.ndarray) -> float:
    """Above which an output says yes: one half where the original answers nothing but probabilities, else 0, of logits.

    A network whose sigmoid is a part of it answers from 0 to 1; logits of a whole data set never do.
    """
    finite = original[np.isfinite(original)]
    probabilities = finite.size > 0 and finite.min() >= -_ROUNDING and finite.max() <= 1 + _ROUNDING
    return 0.5 if probabilities else 0.0


def score(
    outputs: Outputs,
    labels: Labels = None,
    *,
    reference: Outputs | None = None,
    metric: Metric | None = None,
    declared: Declared | None = None,
) -> tuple[str, Scores]:
    """The name of the metric that fits, and the scores ``(n,)``: bool where they can only be 0 or 1, else float64.
    `SetScores` of a metric over the whole set.

    The user's `metric` where there is one, else ``accuracy`` where there are labels of classes, ``jaccard`` where there
    are several per sample, else ``agreement`` with the outputs of the original, `reference`. Of several outputs it is
    the mean over those that have labels, or else that name classes.

    Parameters
    ----------
    declared : what the user says of single outputs.
    """
    if metric is not None:
        return metric_name(metric), evaluate(metric, outputs, labels)
    if labels is None and reference is None:
        raise SlimlineError(
            "There is nothing to score the outputs by: give labels, the original's outputs, or a metric."
        )
    arrays, known = parts(outputs), _known(outputs)
    own, kinds = aligned(labels, known), described(known, labels, declared)
    for array, each, output in zip(arrays, own, kinds, strict=True):
        if each is not None and array is None:
            raise SlimlineError(f"{output.called} does not have a row per sample, so labels fit nothing: drop them.")
        if output.labelled and output.kind not in ("classes", "multilabel"):
            raise SlimlineError(
                f"{output.called} is {output.kind}, which has no default score: give Data a metric(outputs, labels), "
                "a number per sample, the higher the better."
            )
    if labels is not None:
        triples = [
            (array, each, output)
            for array, each, output in zip(arrays, own, kinds, strict=True)
            if array is not None and each is not None and output.labelled
        ]
        if len({output.kind for _, _, output in triples}) > 1:
            together = " and ".join(output.name for _, _, output in triples)
            raise SlimlineError(
                f"{together} are of different kinds, which have no default score together: give Data a "
                "metric(outputs, labels), a number per sample, the higher the better."
            )
        if any(output.kind == "multilabel" for _, _, output in triples):
            judges = {o.name: a for o, a in zip(kinds, parts(outputs if reference is None else reference), strict=True)}
            overlaps = [jaccard(a, each, threshold_of(_present(judges[o.name], a))) for a, each, o in triples]
            return "jaccard", np.mean(overlaps, axis=0)
        values = [correct(array, each, output.axis, output.name) for array, each, output in triples]
        return "accuracy", _mean(values, [array for array, _, _ in triples])
    pairs = [
        (array, other, output)
        for array, other, output in zip(arrays, parts(reference), kinds, strict=True)
        if array is not None and other is not None
    ]
    if len(pairs) > 1:
        pairs = [(a, b, o) for a, b, o in pairs if o.kind == "classes" and not o.assumed]
    if not pairs:
        raise SlimlineError(
            f"None of the outputs {', '.join(o.name for o in known)} is known to name classes: give labels, Data "
            f"outputs={{{known[0].name!r}: 'classes'}} or whichever does, or a metric of your own."
        )
    values = [agreement(a, b, None if o.assumed else o.axis) for a, b, o in pairs]
    return "agreement", _mean(values, [array for array, _, _ in pairs])


def _present(one: np.ndarray | None, other: np.ndarray) -> np.ndarray:
    return other if one is None else one


def _known(outputs: Outputs) -> list[Output]:
    """What is known of outputs by themselves; one that does not count is of no shape."""
    names = outputs.names if isinstance(outputs, Named) else ("",)
    return [
        Output(name=name, shape=() if a is None else a.shape, dtype="int8" if a is None else a.dtype.name)
        for name, a in zip(names, parts(outputs), strict=True)
    ]


def _mean(scores: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> np.ndarray:
    """The mean over outputs; bool where it can only be 0 or 1."""
    if len(scores) == 1:
        return scores[0].astype(bool) if outputs[0].ndim == 2 else scores[0]
    mean: np.ndarray = np.mean(scores, axis=0)
    return mean


def evaluate(metric: Metric, outputs: Outputs, labels: Labels) -> Scores:
    """The user's scores ``(n,)``, bool if that is what came, else float64; it is given copies, which it may change.
    `SetScores` of a metric over the whole set.

    Labels of several outputs come in the order of the outputs and by their names, where they have these.

    Raises
    ------
    SlimlineError : whatever the function raises or returns that is not a finite number per sample, or for the set.
    """
    name, n = f"The metric {metric_name(metric)}", next(len(a) for a in parts(outputs) if a is not None)
    own = _matched(outputs, labels)
    if isinstance(metric, SetMetric):
        return SetScores.of(metric, metric_name(metric), outputs, own)
    try:
        raw = metric(outputs.copy(), None if own is None else own.copy())
    except SlimlineError:
        raise
    except Exception as e:
        shapes = " and ".join(str(a.shape) for a in parts(outputs) if a is not None)
        raise SlimlineError(f"{name} {raised(e)} on outputs {shapes} and {_of(own)}.") from e
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


def _matched(outputs: Outputs, labels: Labels) -> Labels:
    """Labels of several outputs in the outputs' order; as they are where they are not of outputs."""
    if not isinstance(labels, Named):
        return labels
    known = _known(outputs)
    try:
        own = aligned(labels, known)
    except SlimlineError:
        return labels
    return Named(own, [o.name for o in known]) if isinstance(outputs, Named) else own[0]


def _of(labels: Labels) -> str:
    shapes = " and ".join(str(a.shape) for a in parts(labels) if a is not None)
    return f"labels {shapes}" if shapes else "no labels"


def metric_name(metric: Metric | None) -> str:
    """What the scores of `metric` are called: its own name, or its class's; ``metric`` where it has none."""
    if metric is None:
        return "accuracy"
    named: object = metric.function if isinstance(metric, SetMetric) else metric
    while isinstance(named, functools.partial):
        named = named.func
    name = getattr(named, "__name__", None) or type(named).__name__
    return name if isinstance(name, str) and name.isidentifier() else "metric"


def _row_means(right: np.ndarray) -> np.ndarray:
    means: np.ndarray = right.reshape(len(right), -1).mean(axis=1, dtype=np.float64)
    return means
