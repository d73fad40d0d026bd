"""Whether two models answer alike, and whether an artifact answers as its model does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from slimline.basics.errors import SlimlineError
from slimline.graph.edits import PutTensors
from slimline.measure.parity import Parity, compare
from slimline.measure.probes import Arrays, probes
from slimline.model.portions import answers, batched_inputs

if TYPE_CHECKING:
    from slimline.methods.outputs import Output
    from slimline.model import Model

JITTER = 1e-5
"""By which sums in another order and faster functions move numbers in float32, relative to them."""


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


def answers_alike(
    model: Model,
    inputs: Arrays,
    references: Sequence[np.ndarray],
    artifacts: Sequence[np.ndarray],
    integer: bool,
    known: Sequence[Output] = (),
    spreads: Sequence[float] | None = None,
) -> Parity:
    """How `artifacts`, an artifact's answers to `inputs`, differ from its model's, `references`.

    An integer artifact that differs by more than single roundings is compared once more, with how far the model moves
    by itself: see `echo`, and `slimline.measure.parity.parity`.

    Parameters
    ----------
    known, spreads : see `slimline.measure.parity.compare`.
    """
    parity = compare(references, artifacts, integer, known, spreads)
    if not integer or parity.passed or parity.gross:
        return parity
    return compare(references, artifacts, integer, known, spreads, echo(model, inputs))


def echo(model: Model, inputs: Arrays) -> tuple[np.ndarray, ...]:
    """What a model answers when each number that it stores and does not round moves by `JITTER` of itself, normally
    distributed: the arithmetic of floats in a runtime differs by as much."""
    rng = np.random.default_rng(0)
    rounded = model.quantization.weights if model.quantization is not None else {}
    stored = model.parameters()
    moved = {
        name: (stored[name] * (1 + JITTER * rng.standard_normal(stored[name].shape))).astype(stored[name].dtype)
        for name in model.graph.trainable
        if name not in rounded and stored[name].dtype.kind == "f"
    }
    restless = replace(model, native=model.edit(PutTensors(moved)))
    return answers(model, lambda part: restless.outputs(*part), inputs)
