"""Layers that compute with rounded numbers, in the form that LiteRT's converter turns into integer operators.

The converter honours the native fake-quantization op and takes every scale from it, so the simulation *is* the
specification of the artifact, and no representative data are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import keras
import numpy as np
from keras import layers as L
from keras import ops

from slimline.frameworks.keras.rounding import Formatted, rounded, rounded_by_rows
from slimline.methods.dynamic import read_together
from slimline.methods.formats import IntegerGrid, along
from slimline.runtimes.forms.tensorflow import by_columns, einsum_by_columns

_SMALLEST = 1e-12  # factor of a channel that is switched off, so that its grid has a width
_register = keras.saving.register_keras_serializable(package="slimline")


@_register
class FakeQuantize(Formatted, L.Layer):  # type: ignore[misc]
    """Rounds its input to one fixed format; any shape."""

    def call(self, inputs: Any) -> Any:
        """`inputs` rounded, of the same shape and dtype."""
        return rounded(inputs, self.format, computed=True)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The input's."""
        return input_shape


class Traced:
    """A layer that is written otherwise for LiteRT than it is simulated."""

    traced = False
    """True while it is written."""


class _Finished:
    def finish(self, y: Any) -> Any:
        """`y` with the layer's bias and activation."""
        layer: Any = self
        if layer.bias is not None:
            y = ops.add(y, layer.bias)
        return y if layer.activation is None else layer.activation(y)


class _RoundedKernel(_Finished, Formatted):
    """A layer whose float kernel is rounded to a fixed format each time it is used; config of the class beneath it."""

    def on_grid(self, kernel: Any) -> Any:
        """`kernel`, rounded."""
        return rounded(kernel, self.format)

    @property
    def rounded_kernel(self) -> Any:
        """The kernel as it is computed with."""
        layer: Any = self
        return self.on_grid(layer.kernel)


class _RoundedProduct(Traced, _RoundedKernel):
    """A layer that multiplies by a matrix, which is written with a grid for each column."""

    def columns(self, order: Sequence[int]) -> Any:
        """The rounded kernel as `slimline.runtimes.forms.tensorflow.by_columns` takes it; laid out first, as the
        converter follows no transposition of what is rounded."""
        layer: Any = self
        turned = ops.transpose(layer.kernel, order)
        scale = np.broadcast_to(layer.format.scale.ravel(), turned.shape[-1:]).reshape(1, 1, 1, -1)
        each = replace(layer.format, scale=scale, blocks=along(-1, 4))
        return rounded(ops.reshape(turned, (1, 1, -1, turned.shape[-1])), each)


class _RoundedConv(_RoundedKernel):
    def convolution_op(self, inputs: Any, kernel: Any) -> Any:
        """The layer's convolution, by the rounded kernel."""
        return super().convolution_op(inputs, self.on_grid(kernel))  # type: ignore[misc]


class _RoundedLine(_RoundedKernel):
    """A layer of one dimension, computed on images one place high."""

    def on_image_grid(self) -> Any:
        """The rounded kernel of these images; widened first, as the converter follows none that is widened after it is
        rounded."""
        layer: Any = self
        each = layer.format
        if isinstance(each, IntegerGrid) and each.blocks:
            each = replace(each, scale=each.scale[None], blocks=(None, *each.blocks))
        return rounded(ops.expand_dims(layer.kernel, 0), each)


@_register
class FakeQuantConv1D(_RoundedLine, L.Conv1D):  # type: ignore[misc]
    """`Conv1D` by a rounded kernel."""

    def call(self, inputs: Any) -> Any:
        """The layer's output ``(batch, steps, channels)``."""
        padding = self.padding
        if padding == "causal":
            inputs, padding = ops.pad(inputs, self._compute_causal_padding()), "valid"
        images, strides, dilation = ops.expand_dims(inputs, 1), (1, *self.strides), (1, *self.dilation_rate)
        y = ops.conv(images, self.on_image_grid(), strides, padding, "channels_last", dilation)
        return self.finish(ops.squeeze(y, 1))


@_register
class FakeQuantConv2D(_RoundedConv, L.Conv2D):  # type: ignore[misc]
    """`Conv2D` by a rounded kernel."""


@_register
class FakeQuantConv3D(_RoundedConv, L.Conv3D):  # type: ignore[misc]
    """`Conv3D` by a rounded kernel."""


@_register
class FakeQuantDepthwiseConv1D(_RoundedLine, L.DepthwiseConv1D):  # type: ignore[misc]
    """`DepthwiseConv1D` by a rounded kernel."""

    def call(self, inputs: Any) -> Any:
        """The layer's output ``(batch, steps, channels)``."""
        strides, dilation = (self.strides[0],) * 2, (1, self.dilation_rate[0])
        images, kernel = ops.expand_dims(inputs, 1), self.on_image_grid()
        y = ops.depthwise_conv(images, kernel, strides, self.padding, "channels_last", dilation)
        return self.finish(ops.squeeze(y, 1))


@_register
class FakeQuantDepthwiseConv2D(_RoundedKernel, L.DepthwiseConv2D):  # type: ignore[misc]
    """`DepthwiseConv2D` by a rounded kernel."""

    def call(self, inputs: Any) -> Any:
        """The layer's output ``(batch, y, x, channels)``."""
        kernel = self.rounded_kernel
        y = ops.depthwise_conv(inputs, kernel, self.strides, self.padding, self.data_format, self.dilation_rate)
        return self.finish(y)


@_register
class FakeQuantConv2DTranspose(_RoundedKernel, L.Conv2DTranspose):  # type: ignore[misc]
    """`Conv2DTranspose` by a rounded kernel."""

    def call(self, inputs: Any) -> Any:
        """The layer's output ``(batch, y, x, channels)``."""
        kernel = self.rounded_kernel
        y = ops.conv_transpose(
            inputs, kernel, self.strides, self.padding, self.output_padding, self.data_format, self.dilation_rate
        )
        return self.finish(y)


@_register
class FakeQuantDense(_RoundedProduct, L.Dense):  # type: ignore[misc]
    """`Dense` by a rounded kernel."""

    def call(self, inputs: Any) -> Any:
        """The layer's output ``(…, units)``."""
        if self.traced and isinstance(self.format, IntegerGrid):
            return by_columns(inputs, self.columns((0, 1)), self.finish)
        return _by_rows(inputs, self.rounded_kernel, self.finish)


@_register
class FakeQuantEinsumDense(_RoundedProduct, L.EinsumDense):  # type: ignore[misc]
    """`EinsumDense` by a rounded kernel."""

    def call(self, inputs: Any) -> Any:
        """The output of the layer's equation."""
        if self.traced and isinstance(self.format, IntegerGrid) and self.format.axis is not None:
            return self.finish(einsum_by_columns(self.equation, inputs, self.columns))
        return self.finish(ops.einsum(self.equation, inputs, self.rounded_kernel))


@_register
class FakeQuantEmbedding(_RoundedKernel, L.Embedding):  # type: ignore[misc]
    """`Embedding` by a rounded table."""

    @property
    def kernel(self) -> Any:
        """The table ``(rows, width)``."""
        return self.embeddings

    def call(self, inputs: Any) -> Any:
        """Rows of the table ``(…, width)``."""
        rows = ops.take(self.on_grid(self.embeddings), ops.cast(inputs, "int32"), axis=0)
        return ops.cast(rows, self.compute_dtype)


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
        op = keras.quantizers.fake_quant_with_min_max_vars
        kernel = op(ops.reshape(factor, (1, 1, -1)), -top, top, num_bits=8, narrow_range=True, axis=-1)
        return ops.depthwise_conv(inputs, ops.reshape(kernel, (1, 1, -1, 1)), padding="valid") + shift


GRIDDED: Mapping[type, type] = {
    L.Conv1D: FakeQuantConv1D,
    L.Conv2D: FakeQuantConv2D,
    L.Conv3D: FakeQuantConv3D,
    L.DepthwiseConv1D: FakeQuantDepthwiseConv1D,
    L.DepthwiseConv2D: FakeQuantDepthwiseConv2D,
    L.Conv2DTranspose: FakeQuantConv2DTranspose,
    L.Dense: FakeQuantDense,
    L.EinsumDense: FakeQuantEinsumDense,
    L.Embedding: FakeQuantEmbedding,
}
"""The class that takes a class's place when its kernel is rounded."""


class RowRounding(Traced):
    """A layer that rounds what it reads to the grid ``int8_per_row`` of `slimline.methods.dynamic`, as the runtime does
    by itself."""

    def on_rows(self, inputs: Any) -> Any:
        """`inputs`, channels last, rounded."""
        window = getattr(self, "kernel_size", ()), getattr(self, "strides", ())
        rank = len(inputs.shape)
        return inputs if self.traced else rounded_by_rows(inputs, read_together(rank, rank - 1, *window))


class _RowConv(RowRounding):
    def call(self, inputs: Any) -> Any:
        """The layer's output ``(batch, places, channels)``."""
        return super().call(self.on_rows(inputs))  # type: ignore[misc]


@_register
class RowConv1D(_RowConv, L.Conv1D):  # type: ignore[misc]
    """`Conv1D` of rounded numbers."""


@_register
class RowConv2D(_RowConv, L.Conv2D):  # type: ignore[misc]
    """`Conv2D` of rounded numbers."""


@_register
class RowDense(_Finished, RowRounding, L.Dense):  # type: ignore[misc]
    """`Dense` of rounded numbers."""

    def call(self, inputs: Any) -> Any:
        """The layer's output ``(…, units)``."""
        return _by_rows(self.on_rows(inputs), self.kernel, self.finish)


ROWS: Mapping[type, type] = {L.Conv1D: RowConv1D, L.Conv2D: RowConv2D, L.Dense: RowDense}
"""The class that takes a class's place when what it reads is rounded as it runs."""


def _by_rows(x: Any, kernel: Any, finish: Callable[[Any], Any]) -> Any:
    """The product of the last dimension of `x` and a matrix."""
    inner = tuple(x.shape[1:-1])
    if not inner or None in inner:
        return finish(ops.matmul(x, kernel))
    # With more than two dimensions TensorFlow would work out the shapes at run time, operator by operator.
    y = finish(ops.matmul(ops.reshape(x, (-1, x.shape[-1])), kernel))
    return ops.reshape(y, (-1, *inner, kernel.shape[-1]))


def _constant(value: float) -> Any:
    """A number as an integer operand: the top of its own grid, so that it is held exactly."""
    return rounded(ops.convert_to_tensor(value, "float32"), _unit(value))


def _unit(top: float) -> IntegerGrid:
    """The int8 grid from zero to `top`."""
    return IntegerGrid.between(-128, 127, np.asarray(top / 255, np.float32), (), np.asarray(-128, np.int32))


_LOGISTIC = _unit(255 / 256)
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
            return inputs * rounded(ops.sigmoid(inputs), _LOGISTIC)
        # The grid's ends clip as relu6 would.
        gate = rounded(inputs + _constant(3.0), _unit(6.0)) * _constant(1 / 6)
        return gate if self.function == "hard_sigmoid" else inputs * rounded(gate, _unit(1.0))

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The input's."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """What rebuilds the layer."""
        return {**super().get_config(), "function": self.function}


INTEGER_ACTIVATIONS = frozenset({"hard_sigmoid", "hard_silu", "silu"})
"""What `IntegerActivation` computes."""

PLAIN: Mapping[type, type] = {
    **{gridded: plain for classes in (GRIDDED, ROWS) for plain, gridded in classes.items()},
    FakeQuantBatchNormalization: L.BatchNormalization,
    FakeQuantize: L.Identity,
    IntegerActivation: L.Identity,  # element by element, as far as axes go
}
"""The class by whose rule the graph of a quantized model is read."""
