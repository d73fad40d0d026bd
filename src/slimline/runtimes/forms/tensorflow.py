"""TensorFlow functions as an exchange form."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slimline.basics.errors import require
from slimline.basics.quiet import quiet


@dataclass(frozen=True)
class Function:
    """A network as TensorFlow traced it, its weights as constants.

    Attributes
    ----------
    concrete : the `tf.types.experimental.ConcreteFunction`.
    inputs : by the name that an input has in `concrete`, its name in the model.
    layers : by name, whether a layer has a kernel.
    outputs : names of the outputs in the model, in their order.
    """

    concrete: Any
    inputs: Mapping[str, str]
    layers: Mapping[str, bool]
    outputs: Sequence[str] = ()


def tensorflow() -> Any:
    """The package, imported without what it writes to standard error.

    Raises
    ------
    SlimlineError : it is not installed; names the pip command.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with quiet():
        return require("tensorflow", "litert")


def apart(tensor: Any) -> Any:
    """The same numbers, so that the converter does not take an operator and rounding at its ends for one: of those
    without kernels of 16 bits it would make operators that are none, and of float weights integers.

    What this puts there is taken out of the file (`slimline.runtimes.forms.flatbuffer`).
    """
    import tensorflow as tf

    return tf.cast(tf.cast(tensor, tf.float64), tf.float32) if tensor.dtype == tf.float32 else tensor
