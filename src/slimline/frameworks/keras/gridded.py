"""Layers that compute on integer grids, in the form that LiteRT's converter turns into integer operators.

The converter honours the native fake-quantization op (Jacob et al. 2018, arXiv:1712.05877) and takes every
scale from it, so the simulation *is* the specification of the artifact, and no representative data are needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import layers as L
from keras import ops

from slimline.methods.grids import Grid

_SMALLEST = 1e-12  # factor of a channel that is switched off, so that its grid has a width
_register = keras.saving.register_keras_serializable(package="slimline")


def fake_quantize(x: Any, grid: Grid) -> Any:
    """`x` rounded to `grid` and clipped to its ends, straight-through for gradients between them.

    Call it inside a layer's `call` only: on a symbolic `KerasTensor` Keras forgets the number of bits.
    """
    bits = (grid.high - grid.low).bit_length()
    narrow = grid.high - grid.low == 2**bits - 2
    scale, zero = np.asarray(grid.scale, np.float32), np.asarray(grid.zero_point, np.float32)
    low, high = (grid.low - zero) * scale, (grid.high - zero) * scale
    rounded = keras.quantizers.fake_quant_with_min_max_vars
    if grid.axis is None:
        return rounded(x, low[0], high[0], num_bits=bits, narrow_range=narrow)
    # The op rounds along the last axis only, and the converter follows a reshape but no transpose.
    shape = tuple(x.shape)
    repeats = int(np.prod(shape[grid.axis + 1 :], dtype=int))
    flat = x if repeats == 1 and grid.axis == len(shape) - 1 else ops.reshape(x, (*shape[: grid.axis], -1))
    low, high = np.repeat(low, repeats), np.repeat(high, repeats)
    y = rounded(flat, low, high, num_bits=bits, narrow_range=narrow, axis=-1)
    return y if flat is x else ops.reshape(y, shape)


@_register
class FakeQuantize(L.Layer):  # type: ignore[misc]
    """Rounds its input to one fixed grid (the fields of a `Grid`); any shape."""

    def __init__(self, grid: Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.grid = Grid.model_validate(grid)

    def call(self, inputs: Any) -> Any:
        """`inputs` on the grid, of the same shape and dtype."""
        return fake_quantize(inputs, self.grid)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The input's."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """What rebuilds the layer."""
        return {**super().get_config(), "grid": self.grid.model_dump(mode="json")}


class _GriddedKernel:
    """A layer whose float kernel is rounded to a fixed grid each time it is used; config of the class beneath it."""

    def __init__(self, *args: Any, grid: Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.grid = Grid.model_validate(grid)

    def get_config(self) -> dict[str, Any]:
        """What rebuilds the layer."""
        config: dict[str, Any] = super().get_config()  # type: ignore[misc]
        return {**config, "grid": self.grid.model_dump(mode="json")}

    def finish(self, y: Any) -> Any:
        """`y` with the layer's bias and activation."""
        layer: Any = self
        if layer.bias is not None:
            y = ops.add(y, layer.bias)
        return y if layer.activation is None else layer.activation(y)


class _GriddedConv(_GriddedKernel):
    def convolution_op(self, inputs: Any, kernel: Any) -> Any:
        """The layer's convolution, by the rounded kernel."""
        return super().convolution_op(inputs, fake_quantize(kernel, self.grid))  # type: ignore[misc]


@_register
class FakeQuantConv1D(_GriddedConv, L.Conv1D):  # type: ignore[misc]
    """`Conv1D` by a kernel on a grid."""


@_register
class FakeQuantConv2D(_GriddedConv, L.Conv2D):  # type: ignore[misc]
    """`Conv2D` by a kernel on a grid."""


@_register
class FakeQuantDepthwiseConv2D(_GriddedKernel, L.DepthwiseConv2D):  # type: ignore[misc]
    """`DepthwiseConv2D` by a kernel on a grid."""

    def call(self, inputs: Any) -> Any:
        """The layer's output ``(batch, y, x, channels)``."""
        kernel = fake_quantize(self.kernel, self.grid)
        y = ops.depthwise_conv(inputs, kernel, self.strides, self.padding, self.data_format, self.dilation_rate)
        return self.finish(y)


@_register
class FakeQuantConv2DTranspose(_GriddedKernel, L.Conv2DTranspose):  # type: ignore[misc]
    """`Conv2DTranspose` by a kernel on a grid."""

    def call(self, inputs: Any) -> Any:
        """The layer's output ``(batch, y, x, channels)``."""
        kernel = fake_quantize(self.kernel, self.grid)
        y = ops.conv_transpose(
            inputs, kernel, self.strides, self.padding, self.output_padding, self.data_format, self.dilation_rate
        )
        return self.finish(y)


@_register
class FakeQuantDense(_GriddedKernel, L.Dense):  # type: ignore[misc]
    """`Dense` by a kernel on a grid."""

    def call(self, inputs: Any) -> Any:
        """The layer's output ``(…, units)``."""
        kernel = fake_quantize(self.kernel, self.grid)
        inner = tuple(inputs.shape[1:-1])
        if not inner or None in inner:
            return self.finish(ops.matmul(inputs, kernel))
        # With more than two dimensions TensorFlow would work out the shapes at run time, operator by operator.
        y = ops.matmul(ops.reshape(inputs, (-1, inputs.shape[-1])), kernel)
        return ops.reshape(self.finish(y), (-1, *inner, self.units))


@_register
class FakeQuantEinsumDense(_GriddedKernel, L.EinsumDense):  # type: ignore[misc]
    """`EinsumDense` by a kernel on a grid."""

    def call(self, inputs: Any) -> Any:
        """The output of the layer's equation."""
        return self.finish(ops.einsum(self.equation, inputs, fake_quantize(self.kernel, self.grid)))


@_register
class FakeQuantBatchNormalization(L.BatchNormalization):  # type: ignore[misc]
    """A `BatchNormalization` of ``(batch, y, x, channels)`` that no layer before it can take in.

    It is a depthwise 1×1 convolution, which LiteRT computes in integers and fuses with the activation
    behind it. Each channel's factor is the top of its own grid, so the factors are held exactly.
    """

    def call(self, inputs: Any, training: bool = False, mask: Any = None) -> Any:
        """The normalised inputs by the stored statistics, of the same shape."""
        factor = ops.rsqrt(self.moving_variance + self.epsilon)
        if self.gamma is not None:
            factor = factor * self.gamma
        shift = -self.moving_mean * factor
        if self.beta is not None:
            shift = shift + self.beta
        top = ops.maximum(ops.abs(factor), _SMALLEST)
        rounded = keras.quantizers.fake_quant_with_min_max_vars
        kernel = rounded(ops.reshape(factor, (1, 1, -1)), -top, top, num_bits=8, narrow_range=True, axis=-1)
        return ops.depthwise_conv(inputs, ops.reshape(kernel, (1, 1, -1, 1)), padding="valid") + shift


GRIDDED: Mapping[type, type] = {
    L.Conv1D: FakeQuantConv1D,
    L.Conv2D: FakeQuantConv2D,
    L.DepthwiseConv2D: FakeQuantDepthwiseConv2D,
    L.Conv2DTranspose: FakeQuantConv2DTranspose,
    L.Dense: FakeQuantDense,
    L.EinsumDense: FakeQuantEinsumDense,
}
"""The class that takes a class's place when its kernel is on a grid."""


def _constant(value: float) -> Any:
    """A number as an integer operand: the top of its own grid, so that it is held exactly."""
    return fake_quantize(ops.convert_to_tensor(value, "float32"), _unit(value))


def _unit(top: float) -> Grid:
    """The int8 grid from zero to `top`."""
    return Grid(scale=(top / 255,), zero_point=(-128,), low=-128, high=127)


_LOGISTIC = Grid(scale=(1 / 256,), zero_point=(-128,), low=-128, high=127)
"""The one grid that LiteRT's integer logistic can answer on."""


@_register
class IntegerActivation(L.Layer):  # type: ignore[misc]
    """An activation without an integer kernel, or with a slow one, as integer operators that are fast.

    LiteRT computes ``hard_sigmoid`` in float, and its integer ``hard_silu`` kernel is outside XNNPACK and cuts the
    graph in pieces (a MobileNetV3 ran three times slower in INT8 than in FP32); both are an addition
    clipped to [0, 6] and multiplications. ``silu`` needs a grid between its logistic and its product.
    """

    def __init__(self, function: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.function = function

    def call(self, inputs: Any) -> Any:
        """The activation of `inputs`, element by element; its own result is not rounded."""
        if self.function == "silu":
            return inputs * fake_quantize(ops.sigmoid(inputs), _LOGISTIC)
        # The grid's ends clip as relu6 would.
        gate = fake_quantize(inputs + _constant(3.0), _unit(6.0)) * _constant(1 / 6)
        return gate if self.function == "hard_sigmoid" else inputs * fake_quantize(gate, _unit(1.0))

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The input's."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """What rebuilds the layer."""
        return {**super().get_config(), "function": self.function}


INTEGER_ACTIVATIONS = frozenset({"hard_sigmoid", "hard_silu", "silu"})
"""What `IntegerActivation` computes."""

PLAIN: Mapping[type, type] = {
    **{gridded: plain for plain, gridded in GRIDDED.items()},
    FakeQuantBatchNormalization: L.BatchNormalization,
    FakeQuantize: L.Identity,
    IntegerActivation: L.Identity,  # element by element, as far as axes go
}
"""The class by whose rule the graph of a quantized model is read."""
