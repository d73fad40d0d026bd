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
