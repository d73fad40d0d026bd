"""The exchange form of a Keras model on TensorFlow: a traced function."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras

from slimline.basics.errors import SlimlineError, first_line
from slimline.basics.quiet import quiet
from slimline.frameworks.keras.gridded import RowRounding
from slimline.runtimes.forms.tensorflow import Function


def to_function(native: Any) -> Function:
    """The network as TensorFlow traces it, recurrent layers step by step, without what the runtime rounds by itself.

    Raises
    ------
    SlimlineError : another backend than TensorFlow, or a layer that cannot be traced.
    """
    if keras.backend.backend() != "tensorflow":
        raise SlimlineError(
            "LiteRT needs Keras on TensorFlow: set the environment variable KERAS_BACKEND=tensorflow, then start again."
        )
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    specs = [tf.TensorSpec(t.shape, t.dtype, name=f"input_{i}") for i, t in enumerate(native.inputs)]
    inputs = {f"input_{i}": t._keras_history.operation.name for i, t in enumerate(native.inputs)}
    layers = {layer.name: _has_kernel(layer) for layer in native.layers}
    trace = tf.function(lambda *x: native(list(x) if len(x) > 1 else x[0], training=False))
    try:
        with quiet(), _unrolled(native), _unrounded(native):
            # A frozen function leaves no variables in the file, and takes a third of the time of a SavedModel.
            frozen = convert_variables_to_constants_v2(trace.get_concrete_function(*specs))
            return Function(frozen, inputs, layers, tuple(native.output_names))
    except Exception as error:  # TensorFlow raises many types
        raise SlimlineError(f"TensorFlow cannot trace the model: {first_line(error)}.") from error


@contextlib.contextmanager
def _unrolled(native: Any) -> Iterator[None]:
    """Recurrent layers step by step: the converter takes no loop whose batch is open."""
    recurrent = [layer for layer in native.layers if isinstance(layer, keras.layers.RNN) and not layer.unroll]
    loops = [layer for layer in recurrent if keras.tree.flatten(layer.input)[0].shape[1] is not None]
    for layer in loops:
        layer.unroll = True
    try:
        yield
    finally:
        for layer in loops:
            layer.unroll = False


@contextlib.contextmanager
def _unrounded(native: Any) -> Iterator[None]:
    """Layers read numbers as they are where the runtime rounds these as it runs."""
    rounding = [layer for layer in native.layers if isinstance(layer, RowRounding)]
    for layer in rounding:
        layer.simulates = False
    try:
        yield
    finally:
        for layer in rounding:
            layer.simulates = True


def _has_kernel(layer: Any) -> bool:
    return getattr(layer, "kernel", None) is not None
