"""The step that computes in integers without calibration."""

from __future__ import annotations

from typing import Literal

from slimline.recipe.layers import Globs
from slimline.recipe.step import Step


class DynamicQuantization(Step):
    """Weights are stored as integers, and what is multiplied by them gets its integer grid when the model runs, so that
    no samples are needed. It is for linear layers, attention projections, LSTMs and embeddings (whose weights alone are
    stored); convolutions stay in float.

    Attributes
    ----------
    weights : ``int8``, symmetric, one scale per output; ``int4`` for linear layers, in blocks of 32 inputs of an
        output, the others as with ``int8``. What is multiplied by int4 weights the runtime rounds as it sees fit.
    layers, keep : globs of the layers to quantize and of those to leave in float.
    undo : put back to float every layer whose quantization makes the artifact slower or breaks parity.
    """

    kind = "quantization"
    step: Literal["DynamicQuantization"] = "DynamicQuantization"
    weights: Literal["int8", "int4"] = "int8"
    layers: Globs = ("*",)
    keep: Globs = ()
    undo: bool = True

    @property
    def computes_in_integers(self) -> bool:
        return True
