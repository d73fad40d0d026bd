"""The user's own functions, called once on a few real samples before any long work."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from slimline.data.splits import Split, augmented
from slimline.measure.accuracy import as_outputs, metric_name, score
from slimline.measure.certificate import inside

if TYPE_CHECKING:
    from slimline.data import Data
    from slimline.model import Model

log = logging.getLogger(__name__)

_SAMPLES = 4


def try_augment(data: Data) -> None:
    """Augment a few training samples; the error of `augmented` if that fails. The first batch of a loader is read."""
    if data.augment is not None and data.has("train"):
        inputs, _ = next(data.split("train").batches(_SAMPLES))
        augmented(data.augment, inputs, np.random.default_rng(data.seed))


def try_score(model: Model, data: Data, max_drop: float | None) -> None:
    """Score a few samples of the model's answers as the certificate will, and warn if it cannot certify.

    Raises
    ------
    SlimlineError : labels that do not fit the outputs, or a metric that fails or leaves its range.
    """
    split = data.split("certification")
    assert isinstance(split, Split)
    few = split.take(np.arange(min(len(split), _SAMPLES)))
    rows = len(few)
    arrays = [array if array.ndim and len(array) == rows else None for array in model.outputs(*few.inputs)]
    answer = as_outputs(arrays, model.output_names)
    name, values = score(answer, few.labels, reference=answer, metric=data.metric, declared=data.declared)
    if data.metric_range is not None:
        inside(values, values, data.metric_range, name)
    warn(data, values, max_drop)


def warn(data: Data, values: np.ndarray, max_drop: float | None) -> None:
    """Say how to get a certificate where a budget is set on a score that none can be given for."""
    if max_drop is not None and data.metric is not None and data.metric_range is None and values.dtype != bool:
        log.warning(
            "The drop of %s will be measured but not certified: give Data metric_range=(lowest, highest score of a "
            "sample), or return booleans if a sample is right or wrong.",
            metric_name(data.metric),
        )
