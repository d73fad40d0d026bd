"""Metrics that only a whole set of samples has: F1, areas under curves, correlations, perplexity, mean IoU.

A score per sample is an array, whose mean is the model's score. A `SetMetric` has no scores per sample; `SetScores`
stands in their place: ``scores[rows]`` is the same of some samples and ``scores.mean()`` the metric of them, so that
who scores a model need not know which kind of metric it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from slimline.basics.arrays import as_array
from slimline.basics.errors import SlimlineError, raised
from slimline.basics.named import Named

Function = Callable[[Any, Any], Any]
"""Outputs and labels (or None) of any number of samples to one number, the higher the better."""
Digest = Callable[[Any, Any], tuple[Any, Any]]
"""Outputs and labels to what takes their place: of both a row per sample, or None."""


@dataclass(frozen=True)
class SetMetric:
    """A metric of all samples together, ``function(outputs, labels) -> float``, the higher the better.

    ``Data(metric=SetMetric(f))`` measures the drop with a paired bootstrap over samples, or over groups of them; it is
    not certified (docs/certificates.md).

    Parameters
    ----------
    function : outputs ``(n, …)`` and labels ``(n, …)`` or None of any number of samples to one finite number. It is
        called some 5,000 times. A resample of which it raises or gives no finite number is left out and counted.
    digest : ``digest(outputs, labels) -> (outputs, labels)``, called once: what `function` takes in their place, with a
        row per sample (or None). Where outputs are large, counts are resampled much faster than they are.

    Raises
    ------
    SlimlineError : a function that cannot be called.
    """

    function: Function
    digest: Digest | None = None

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise SlimlineError(f"SetMetric got a {type(self.function).__name__}: give a function(outputs, labels).")
        if self.digest is not None and not callable(self.digest):
            raise SlimlineError(f"The digest of a SetMetric is a {type(self.digest).__name__}: give a function.")


class SetScores:
    """What a set metric needs of every sample; ``scores[index]`` and ``scores.mean()`` as of an array of scores.

    Parameters
    ----------
    function : of `outputs` and `labels`.
    name : what the metric is called.
    outputs, labels : of the samples: arrays ``(n, …)``, or tuples, lists or dicts of them, or None.
    """

    def __init__(self, function: Function, name: str, outputs: Any, labels: Any) -> None:
        self.function, self.name, self.outputs, self.labels = function, name, outputs, labels

    @classmethod
    def of(cls, metric: SetMetric, name: str, outputs: Any, labels: Any) -> SetScores:
        """The scores of a model's outputs, which are reduced by the metric's digest first.

        Raises
        ------
        SlimlineError : what the digest or the function raises, or gives that is not what it shall.
        """
        scores = cls(metric.function, name, outputs, labels)
        if metric.digest is not None:
            pair = scores._called(metric.digest)
            if not isinstance(pair, tuple) or len(pair) != 2 or {*map(_rows, pair)} - {len(scores), None}:
                raise SlimlineError(
                    f"The digest of {scores._what} did not give a pair (outputs, labels) with a row for each of the "
                    f"{len(scores)} samples: return two arrays (n, …), or None in place of one."
                )
            scores = cls(metric.function, name, *pair)
        scores.mean()
        return scores

    def __len__(self) -> int:
        return _rows(self.outputs) or 0

    def __getitem__(self, index: Any) -> SetScores:
        """The samples at these positions, which may occur more than once."""
        outputs, labels = (_each(part, lambda array: array[index]) for part in (self.outputs, self.labels))
        return SetScores(self.function, self.name, outputs, labels)

    def mean(self) -> float:
        """The metric of these samples.

        Raises
        ------
        SlimlineError : whatever the function raises or returns that is not one finite number.
        """
        return self._value

    @cached_property
    def _value(self) -> float:
        answer = self._called(self.function)
        if answer is None:
            raise SlimlineError(f"{self._what} returned None for {len(self)} samples: return one number for all.")
        value = as_array(answer, self._what, exact=True)
        if value.size != 1:
            mend = "give Data metric=f, without SetMetric" if value.shape == (len(self),) else "return that"
            raise SlimlineError(f"{self._what} gave shape {value.shape} for a whole set, which has one number: {mend}.")
        number = float(value.reshape(()))
        if not math.isfinite(number):
            raise SlimlineError(
                f"{self._what} is {number} of {len(self)} samples: return a finite number, and give samples of which "
                "it has one."
            )
        return number

    @property
    def _what(self) -> str:
        return f"The metric {self.name}"

    def _called(self, function: Callable[[Any, Any], Any]) -> Any:
        try:
            return function(_each(self.outputs, np.copy), _each(self.labels, np.copy))
        except SlimlineError:
            raise
        except Exception as e:
            labels = "no labels" if self.labels is None else f"labels {_each(self.labels, np.shape)}"
            raise SlimlineError(
                f"{self._what} {raised(e)} on outputs {_each(self.outputs, np.shape)} and {labels}."
            ) from e


def _each(value: Any, do: Callable[[np.ndarray], Any]) -> Any:
    """`do` on every array of a tuple, list, dict or `Named` of them; None stays."""
    if isinstance(value, Named):
        results = [_each(part, do) for part in value]
        return tuple(results) if do is np.shape else Named(results, value.names)
    if isinstance(value, dict):
        return {key: _each(part, do) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_each(part, do) for part in value)
    return None if value is None else do(value)


def _rows(value: Any) -> int | None:
    """Rows of the first array; None where there is none."""
    if isinstance(value, dict | tuple | list | Named):
        counts = map(_rows, value.values() if isinstance(value, dict) else value)
        return next((count for count in counts if count is not None), None)
    return None if value is None else len(value)
