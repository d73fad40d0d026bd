"""TensorFlow functions as an exchange form."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_letters
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


def sizes_of(tensor: Any) -> list[Any]:
    """The shape of `tensor` as a target of reshapes: static, with -1 for one open size, else computed."""
    import tensorflow as tf

    static = tensor.shape.as_list()
    if static.count(None) <= 1:
        return [-1 if size is None else size for size in static]
    computed = tf.shape(tensor)
    return [computed[axis] if size is None else size for axis, size in enumerate(static)]


def by_columns(x: Any, columns: Any, finish: Callable[[Any], Any] = lambda y: y) -> Any:
    """What `finish` makes of the product of ``x (…, inputs)`` and a matrix that is rounded to a grid for each column.

    It is a convolution of one place, which XNNPACK computes by the same kernels, as the converter takes one grid in all
    for a matrix.

    Parameters
    ----------
    columns : the matrix, ``(1, 1, inputs, outputs)``.
    """
    import tensorflow as tf

    inputs, outputs = columns.shape[2:]
    y = finish(tf.nn.conv2d(tf.reshape(x, [-1, 1, 1, inputs]), columns, 1, "VALID"))
    return tf.reshape(y, [*sizes_of(x)[:-1], outputs])


def einsum_by_columns(equation: str, x: Any, columns: Callable[[Sequence[int]], Any]) -> Any:
    """The einsum of `x` and a matrix that is rounded to a grid for each column; each letter is in two of its terms.

    Parameters
    ----------
    columns : gives the matrix as `by_columns` takes it, from the order in which the dimensions of the weight are to
        lie, that of the columns last.
    """
    import tensorflow as tf

    terms, arrow, result = equation.replace(" ", "").partition("->")
    left, weight = terms.split(",")
    dots = "".join(c for c in ascii_letters if c not in equation)[: len(x.shape) - len(left.replace("...", ""))]
    result = result if arrow else "..." + "".join(sorted({*left} - {"."} ^ {*weight}))
    left, result = left.replace("...", dots), result.replace("...", dots)
    summed = [c for c in weight if c in left]
    free, new = [c for c in left if c not in summed], [c for c in weight if c not in summed]
    matrix = columns([weight.index(c) for c in (*summed, *new)])
    x = _turned(x, left, [*free, *summed])
    rows = tf.reshape(x, [*sizes_of(x)[: len(free)], matrix.shape[2]])
    return _turned(by_columns(rows, matrix), [*free, *new], result)


def _turned(x: Any, old: Sequence[str], new: Sequence[str]) -> Any:
    """`x` with its dimensions, which have names, in another order."""
    import tensorflow as tf

    return tf.transpose(x, [old.index(c) for c in new]) if list(old) != list(new) else x
