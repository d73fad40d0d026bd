"""Whether two models answer alike, on the example and on random inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from slimline.basics.errors import SlimlineError
from slimline.measure.parity import compare
from slimline.measure.probes import Arrays, probes

if TYPE_CHECKING:
    from slimline.model import Model


def refuse_other_answers(before: Model, after: Model, what: str) -> None:
    """Refuse a change that should have changed no answer, and did; `what` begins the sentence.

    Raises
    ------
    SlimlineError : an output differs by more than the arithmetic of floats can make it.
    """
    for inputs_are, candidates in probes(before.example, batched_inputs(before), quick=True):
        references, inputs = finite_answers(before, candidates)
        if not references:
            continue
        parity = compare(references, after.outputs(*inputs))
        if not parity.passed:
            raise SlimlineError(
                f"{what} changed what the model answers to {inputs_are} ({parity.reason}), which it must not: leave it "
                "out, and report this model to slimline."
            )


def batched_inputs(model: Model) -> list[bool]:
    """Which inputs have a batch that may be of any size."""
    free = model.adapter.free(model.native)
    rows = len(model.example[0]) if model.example and model.example[0].ndim else -1
    return [free != "none" and x.ndim > 0 and len(x) == rows for x in model.example]


def finite_answers(model: Model, candidates: Sequence[Arrays]) -> tuple[tuple[np.ndarray, ...], Arrays]:
    """What the model answers to the first of these inputs to which it answers finite numbers; else nothing."""
    for inputs in candidates:
        try:
            outputs = model.outputs(*inputs)
        except SlimlineError:  # a size that it does not take after all: there is nothing to compare
            continue
        if all(not np.isnan(x).any() for x in outputs if x.dtype.kind == "f"):
            return outputs, inputs
    return (), ()
