"""Simulates integer arithmetic in a Keras model; what is simulated is what the artifact will compute."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import keras
import numpy as np

from slimline.basics.errors import SlimlineError
from slimline.frameworks.keras.functional import Call, Copies, calls, clone, input_name, rebuild, replay, variables
from slimline.frameworks.keras.gridded import (
    GRIDDED,
    INTEGER_ACTIVATIONS,
    PLAIN,
    ROWS,
    FakeQuantBatchNormalization,
    FakeQuantize,
    IntegerActivation,
    RowRounding,
)
from slimline.frameworks.keras.observe import named_tensors
from slimline.frameworks.keras.parts import transfer
from slimline.frameworks.keras.rounding import Formatted
from slimline.graph.quantization import Quantization
from slimline.methods.formats import Format, IntegerGrid

Array = np.ndarray
L = keras.layers

_FOLDS = (L.Dense, L.Conv1D, L.Conv2D, L.Conv3D, L.DepthwiseConv1D, L.DepthwiseConv2D, L.Conv2DTranspose)


def fold(native: keras.Model, example: tuple[Array, ...]) -> keras.Model:
    """A copy of a canonical model whose batch norms are part of the convolution or dense layer before them.

    The converter can fold batch norm itself, but not into a kernel with one scale for all channels, and a
    rounded model must be rounded after folding. A batch norm with anything else before it stays.

    Parameters
    ----------
    example : not needed; every adapter's `fold` has it.
    """
    pairs = _foldable(native)
    gone = {id(norm) for norm in pairs.values()}
    return rebuild(native, partial(_fold_visit, pairs=pairs, gone=gone, copies=Copies()))


def _foldable(native: keras.Model) -> dict[int, Any]:
    """Layers whose only reader is a batch norm over their channels: id of the layer to the batch norm."""
    ordered = calls(native)
    uses: dict[int, int] = {}
    readers: dict[int, list[Call]] = {}
    for call in ordered:
        uses[id(call.operation)] = uses.get(id(call.operation), 0) + 1
        for tensor in call.inputs:
            readers.setdefault(id(tensor), []).append(call)
    outputs = {id(tensor) for tensor in native.outputs}
    pairs = {}
    for call in ordered:
        layer = call.operation
        if type(layer) not in _FOLDS or id(call.outputs[0]) in outputs:
            continue
        after = readers.get(id(call.outputs[0]), [])
        if len(after) != 1 or type(after[0].operation) is not L.BatchNormalization:
            continue
        norm = after[0].operation
        last = norm.axis in (-1, len(call.outputs[0].shape) - 1)
        if last and uses[id(layer)] == uses[id(norm)] == 1 and getattr(layer, "data_format", None) != "channels_first":
            pairs[id(layer)] = norm
    return pairs


def _fold_visit(
    call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], pairs: dict[int, Any], gone: set[int], copies: Copies
) -> Any:
    layer = call.operation
    if id(layer) in gone:
        return args[0]
    changes = {"use_bias": True} if id(layer) in pairs else {}
    copy = copies.of(id(layer), lambda: clone(layer, **changes))
    outputs = copy(*args, **kwargs)
    if id(layer) in pairs:
        kernel, bias = _folded(layer, pairs[id(layer)])
        copy.variables[0].assign(kernel)
        copy.bias.assign(bias)
    elif call.is_layer:
        transfer(layer.variables, copy)
    return outputs


def _folded(layer: Any, norm: Any) -> tuple[Array, Array]:
    """Kernel and bias of `layer` followed by `norm` (float64 arithmetic)."""

    def array(variable: Any, default: float) -> Array:
        if variable is None:
            return np.full(1, default)
        return np.asarray(keras.ops.convert_to_numpy(variable), np.float64)

    variance = array(norm.moving_variance, 1.0)
    factor = array(norm.gamma, 1.0) / np.sqrt(variance + norm.epsilon)
    bias = (array(layer.bias, 0.0) - array(norm.moving_mean, 0.0)) * factor + array(norm.beta, 0.0)
    kernel = array(layer.kernel, 0.0)
    if isinstance(layer, L.DepthwiseConv1D | L.DepthwiseConv2D):
        spread = factor.reshape(kernel.shape[-2:])  # outputs are inputs times multiplier
    elif isinstance(layer, L.Conv2DTranspose):
        spread = factor[:, None]  # kernels are (y, x, outputs, inputs)
    else:
        spread = factor
    return kernel * spread, np.broadcast_to(bias, factor.shape)


def quantize(native: keras.Model, quantization: Quantization, composed: frozenset[str] = frozenset()) -> keras.Model:
    """A copy of a canonical model that computes what its integer artifact will.

    Every value in ``quantization.activations`` (inputs too) passes a `FakeQuantize` layer, every kernel in
    ``quantization.weights`` is rounded in the layer that owns it, and what is multiplied by one in
    ``quantization.dynamic`` is rounded there as the layer runs. Float weights keep their names and values.

    Parameters
    ----------
    composed : of `slimline.graph.placement.Policy`: batch norms and activations that become layers of several integer
        operators where their result is rounded.

    Raises
    ------
    SlimlineError : a weight whose layer class has no integer form.
    """
    return Quantizer(native, quantization, composed).model()


def format_mismatches(native: keras.Model, quantization: Quantization) -> list[str]:
    """The values and kernels that `native` rounds otherwise than `quantization` says."""
    formats = {**quantization.activations, **quantization.weights}
    ordered = calls(native)
    names = {id(t): name for call in ordered for t, name in zip(call.outputs, call.names, strict=True)}
    names |= {id(t): input_name(t) for t in native.inputs}
    paths = {id(variable): path for path, variable in variables(native).items()}
    simulated: dict[str, Format] = {}
    for call in ordered:
        layer = call.operation
        if isinstance(layer, Formatted):
            tensor = type(layer) is FakeQuantize
            name = names[id(call.inputs[0])] if tensor else paths[id(layer.kernel)]  # type: ignore[attr-defined]
            simulated[name] = layer.format
    rounding = [layer for layer in native.layers if isinstance(layer, RowRounding)]
    strangers = sorted({paths[id(layer.kernel)] for layer in rounding} ^ set(quantization.dynamic))  # type: ignore[attr-defined]
    # What is rounded is read rounded by all.
    unrounded = [t for call in ordered if type(call.operation) is not FakeQuantize for t in call.inputs]
    read = {names[id(t)] for t in (*unrounded, *native.outputs)}
    different = [
        name
        for name in dict.fromkeys((*formats, *simulated))
        if name in read & quantization.activations.keys() or formats.get(name) != simulated.get(name)
    ]
    return list(dict.fromkeys((*different, *strangers)))


class Quantizer:
    """The work of `quantize`: one replay of the model's calls."""

    def __init__(self, native: keras.Model, quantization: Quantization, composed: frozenset[str]) -> None:
        self.native, self.formats, self.composed = native, quantization.activations, composed
        self.paths = {id(variable): path for path, variable in variables(native).items()}
        self.kernels = {i: quantization.weights[path] for i, path in self.paths.items() if path in quantization.weights}
        self.rows = {i for i, path in self.paths.items() if path in quantization.dynamic}
        self.copies = Copies()

    def model(self) -> keras.Model:
        """The quantized copy."""
        old = self.native.inputs
        inputs = [keras.Input(batch_shape=t.shape, dtype=t.dtype, name=input_name(t)) for t in old]
        rounded = [self.round(input_name(t), x) for t, x in zip(old, inputs, strict=True)]
        outputs = replay(self.native, rounded, self.visit)
        return keras.Model(_single(inputs), _single(outputs), name=self.native.name)

    def visit(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The copied call, its results rounded."""
        operation = call.operation
        copy = self.copies.of(id(operation), lambda: self.copy(call))
        outputs = copy(*args, **kwargs)
        if call.is_layer:
            self.fill(operation, copy)
        flat = keras.tree.flatten(outputs)
        rounded = [self.round(name, y) for name, y in zip(call.names, flat, strict=True)]
        return keras.tree.pack_sequence_as(outputs, rounded)

    def round(self, name: str, value: Any) -> Any:
        """`value` behind the layer that rounds it, where it has a format."""
        return self.grid(name, value)(value) if name in self.formats else value

    def grid(self, name: str, value: Any) -> Any:
        """The layer that rounds a value."""
        return FakeQuantize(format=self.formats[name], name=grid_name(name))

    def fill(self, operation: Any, copy: Any) -> None:
        """Give a copy the numbers of the operation."""
        transfer(operation.variables, copy)

    def copy(self, call: Call) -> Any:
        """The operation itself, or the form of it that computes in integers."""
        operation = call.operation
        if call.is_layer:
            for variable in operation.variables:
                if id(variable) in self.kernels:
                    return self.rounded(operation, self.kernels[id(variable)])
                if id(variable) in self.rows:
                    return rounded_class(operation, ROWS).from_config(operation.get_config())  # type: ignore[attr-defined]
        norm = type(operation) is L.BatchNormalization and "batch_norm" in self.composed
        if norm and self.on_grid(call) and len(call.outputs[0].shape) == 4:
            return FakeQuantBatchNormalization.from_config(operation.get_config())
        function = _activation_of(operation)
        if function in INTEGER_ACTIVATIONS & self.composed and self.is_integer(call.names[0]):
            return IntegerActivation(function, name=operation.name)
        return clone(operation)

    def on_grid(self, norm: Call) -> bool:
        """Whether a batch norm over the last axis ends on a grid, itself or after its activation."""
        if norm.operation.axis not in (-1, len(norm.outputs[0].shape) - 1):
            return False
        readers = [call for call in calls(self.native) if any(t is norm.outputs[0] for t in call.inputs)]
        ends = [norm.names[0], *(readers[0].names if len(readers) == 1 else ())]
        return any(self.is_integer(name) for name in ends)

    def is_integer(self, name: str) -> bool:
        """Whether a value lies on an integer grid."""
        return isinstance(self.formats.get(name), IntegerGrid)

    def rounded(self, layer: Any, each: Format) -> Any:
        """The layer with its kernel in a format."""
        kind = rounded_class(layer, GRIDDED)
        return kind.from_config({**layer.get_config(), "format": each})  # type: ignore[attr-defined]


def rounded_class(layer: Any, classes: Mapping[type, type]) -> type:
    """The class that takes the place of a layer's when its kernel is rounded.

    Raises
    ------
    SlimlineError : there is none.
    """
    if type(layer) not in classes:
        raise SlimlineError(
            f"Layer {layer.name!r} ({type(layer).__name__}) has no integer form in Keras: "
            f"leave it in float with keep=[{layer.name!r}]."
        )
    return classes[type(layer)]


def grid_name(value: str) -> str:
    """The name of the layer that rounds a value."""
    return f"{value.replace('@', '.').replace(':', '.')}.grid"


def unround(native: keras.Model, quantization: Quantization) -> keras.Model:
    """A copy that computes with the numbers as they are that `quantize` lets it round to these formats."""
    names = {id(t): name for name, t in named_tensors(native).items()}
    paths = {id(variable): path for path, variable in variables(native).items()}
    copies = Copies()

    def visit(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer = call.operation
        if type(layer) is FakeQuantize and quantization.activations.get(names[id(call.inputs[0])]) == layer.format:
            return args[0]
        copy = copies.of(id(layer), lambda: _unrounded(layer, paths, quantization))
        outputs = copy(*args, **kwargs)
        if call.is_layer:
            transfer(layer.variables, copy)
        return outputs

    return rebuild(native, visit)


def _unrounded(layer: Any, paths: Mapping[int, str], quantization: Quantization) -> Any:
    """A copy of an operation, of the class that rounds nothing where the formats are those of the quantization."""
    if isinstance(layer, IntegerActivation):
        return L.Activation(layer.function, name=layer.name)
    own = type(layer) in PLAIN and type(layer) is not FakeQuantize
    if not own or (isinstance(layer, Formatted) and quantization.weights.get(paths[id(layer.kernel)]) != layer.format):  # type: ignore[attr-defined]
        return clone(layer)
    return PLAIN[type(layer)].from_config({k: v for k, v in layer.get_config().items() if k != "format"})  # type: ignore[attr-defined]


def _activation_of(operation: Any) -> str:
    """Name of the function that an activation layer or a bare activation computes, empty for anything else."""
    if isinstance(operation, L.Activation):
        return str(getattr(operation.activation, "__name__", ""))
    bare = {"HardSigmoid": "hard_sigmoid", "HardSilu": "hard_silu", "Silu": "silu"}
    return "" if isinstance(operation, L.Layer) else bare.get(type(operation).__name__, "")


def _single(items: list[Any]) -> Any:
    return items[0] if len(items) == 1 else items
