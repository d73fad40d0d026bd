"""What the outputs of a model mean, by the samples that it is compressed with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from slimline.basics.errors import unknown
from slimline.methods.outputs import Output, bare

if TYPE_CHECKING:
    from slimline.data.data import Data, Role
    from slimline.model.model import Model

_SAMPLES = 64
"""Samples whose outputs tell what is usual of an output."""


def bare_outputs(model: Model, data: Data | None = None) -> tuple[Output, ...]:
    """Names, shapes and dtypes of the outputs of a model, for a batch of the data where there is one."""
    return bare(model.output_names, model.outputs(*_inputs(model, data, 2)))


def described_outputs(
    model: Model,
    data: Data,
    role: Role,
    *,
    judge: Model | None = None,
    weights: Mapping[str, float] | None = None,
    lenient: bool | None = None,
) -> tuple[Output, ...]:
    """What the outputs of a model mean for a loss of the samples of a role.

    Parameters
    ----------
    judge : whose outputs tell how large they usually are, instead of the model's own.
    weights : of single outputs, by name.
    lenient : see `slimline.data.Data.describe`.

    Raises
    ------
    SlimlineError : labels that do not fit; weights of no output.
    """
    arrays = (judge or model).outputs(*_inputs(model, data, 2 if len(model.output_names) == 1 else _SAMPLES))
    outputs = bare(model.output_names, arrays)
    outputs = data.describe(outputs, model.adapter.layout == "channels_first", role, lenient)
    weighed = weights or {}
    if strange := [name for name in weighed if name not in model.output_names]:
        raise unknown("output with a weight called", strange[0], model.output_names)
    return tuple(
        replace(output, weight=weighed.get(output.name, 1.0), scale=_scale(output, array, len(outputs)))
        for output, array in zip(outputs, arrays, strict=True)
    )


def _scale(output: Output, array: np.ndarray, number: int) -> float:
    """The variance of an output of quantities or features, by which squared errors are divided; 1 where there is no
    other to weigh it against."""
    if number == 1 or output.kind not in ("regression", "features") or not array.size:
        return 1.0
    variance = float(np.var(array, dtype=np.float64))
    return variance if np.isfinite(variance) and variance > 0 else 1.0


def _inputs(model: Model, data: Data | None, samples: int) -> Sequence[np.ndarray]:
    """Some inputs that the model takes: the data's, or its example where only its own batch size will do."""
    if data is None or model.adapter.free(model.native) == "none":
        return model.example
    return data.example(samples)
