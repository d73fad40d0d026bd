"""The user's own functions, called once on a few real samples before any long work."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from slimline.basics.errors import SlimlineError
from slimline.data.splits import Split, augmented
from slimline.measure.accuracy import Scores, as_outputs, metric_name, score
from slimline.measure.certificate import inside
from slimline.measure.set_metrics import SetMetric, SetScores

if TYPE_CHECKING:
    from slimline.data import Data
    from slimline.model import Model

log = logging.getLogger(__name__)

_SAMPLES = 4
_BATCH = 64
_SET = 256
"""Samples on which a metric of the whole set is tried; on all, where it has no value of so few."""


def try_augment(data: Data) -> None:
    """Augment a few training samples; the error of `augmented` if that fails. The first batch of a loader is read."""
    if data.augment is not None and data.has("train"):
        train = data.split("train")
        inputs, _ = next(train.batches(_SAMPLES))
        augmented(data.augment, inputs, np.random.default_rng(data.seed), train.names)


def try_score(model: Model, data: Data, max_drop: float | None) -> None:
    """Score a few samples of the model's answers as the certificate will, and warn if it cannot certify.

    Raises
    ------
    SlimlineError : labels that do not fit the outputs, or a metric that fails or leaves its range.
    """
    split = data.split("certification")
    assert isinstance(split, Split)
    if isinstance(data.metric, SetMetric):
        try:
            _scores(model, split.take(np.unique(np.linspace(0, len(split) - 1, _SET).round().astype(int))), data)
        except SlimlineError:
            _scores(model, split, data)
        if max_drop is not None:
            log.warning(
                "The drop of %s will be measured but not certified, which only the mean of a score per sample can be: "
                "see docs/certificates.md.",
                metric_name(data.metric),
            )
        return
    name, values = _scores(model, split.take(np.arange(min(len(split), _SAMPLES))), data)
    assert not isinstance(values, SetScores)
    if data.metric_range is not None:
        inside(values, values, data.metric_range, name)
    warn(data, values, max_drop)


def _scores(model: Model, samples: Split, data: Data) -> tuple[str, Scores]:
    held: list[list[np.ndarray]] = [[] for _ in model.output_names]
    for inputs, _ in samples.batches(_BATCH):
        for arrays, array in zip(held, model.outputs(*inputs), strict=True):
            arrays.append(array)
    whole = [np.concatenate(arrays) if all(array.ndim for array in arrays) else None for arrays in held]
    rows = len(samples)
    answer = as_outputs([None if a is None or len(a) != rows else a for a in whole], model.output_names)
    return score(answer, samples.labels, reference=answer, metric=data.metric, declared=data.declared)


def warn(data: Data, values: np.ndarray, max_drop: float | None) -> None:
    """Say how to get a certificate where a budget is set on a score that none can be given for."""
    if max_drop is not None and data.metric is not None and data.metric_range is None and values.dtype != bool:
        log.warning(
            "The drop of %s will be measured but not certified: give Data metric_range=(lowest, highest score of a "
            "sample), or return booleans if a sample is right or wrong.",
            metric_name(data.metric),
        )
