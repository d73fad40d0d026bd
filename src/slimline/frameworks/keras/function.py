"""The exchange form of a Keras model on TensorFlow: a traced function."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras

from slimline.basics.errors import SlimlineError, first_line
from slimline.basics.quiet import quiet
from slimline.frameworks.keras.functional import Call, replay
from slimline.frameworks.keras.gridded import PLAIN, FakeQuantize, Traced
from slimline.runtimes.forms.tensorflow import Function, apart


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
    run = _run_apart if _is_mixed(native) else _run
    trace = tf.function(lambda *x: run(native, x))
    try:
        with quiet(), _unrolled(native), _written(native):
            # A frozen function leaves no variables in the file, and takes a third of the time of a SavedModel.
            frozen = convert_variables_to_constants_v2(trace.get_concrete_function(*specs))
            return Function(frozen, inputs, layers, tuple(native.output_names))
    except Exception as error:  # TensorFlow raises many types
        raise SlimlineError(f"TensorFlow cannot trace the model: {first_line(error)}.") from error


def _is_mixed(native: Any) -> bool:
    """Whether some layers multiply by float kernels beside rounded numbers."""
    rounds = any(type(layer) is FakeQuantize for layer in native.layers)
    return rounds and any(_has_float_kernel(layer) for layer in native.layers)


def _run(native: Any, inputs: Sequence[Any]) -> Any:
    """The outputs."""
    return native(list(inputs) if len(inputs) > 1 else inputs[0], training=False)


def _run_apart(native: Any, inputs: Sequence[Any]) -> list[Any]:
    """The outputs, float kernels multiplied by numbers that the converter does not take for integers."""

    def visit(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _has_float_kernel(call.operation):
            args, kwargs = keras.tree.map_structure(lambda x: apart(x) if keras.ops.is_tensor(x) else x, (args, kwargs))
        return call.operation(*args, **kwargs)

    return replay(native, inputs, visit)


def _has_float_kernel(operation: Any) -> bool:
    """Whether a layer, or one within it, multiplies by a kernel as it is stored."""
    if not isinstance(operation, keras.layers.Layer) or type(operation) in PLAIN:
        return False
    return any("kernel" in variable.name for variable in operation.variables)


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
def _written(native: Any) -> Iterator[None]:
    """Layers as they are written for the runtime."""
    layers = [layer for layer in native.layers if isinstance(layer, Traced)]
    for layer in layers:
        layer.traced = True
    try:
        yield
    finally:
        for layer in layers:
            layer.traced = False


def _has_kernel(layer: Any) -> bool:
    return getattr(layer, "kernel", None) is not None
