"""Copies of a model that compute the same faster: batch norms as TensorFlow's one fused operator.

Keras builds batch normalisation of a dozen element-wise operators. On a CPU the fused one halves the time
of a training step of a small residual network and, joined to its convolution, that of inference.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import keras
import tensorflow as tf

from slimline.frameworks.keras.functional import Call, Copies, clone, rebuild
from slimline.frameworks.keras.parts import transfer


def fused(model: keras.Model) -> keras.Model:
    """A copy of a canonical model, its variables in the same order, for training and inference in this process."""
    return rebuild(model, partial(_visit, copies=Copies()))


def _visit(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], copies: Copies) -> Any:
    operation = call.operation
    copied = copies.of(id(operation), lambda: _copy(operation))
    outputs = copied(*args, **kwargs)
    if call.is_layer:
        transfer(operation.variables, copied)
    return outputs


def _copy(operation: Any) -> Any:
    if type(operation) is keras.layers.BatchNormalization and _fits(operation):
        return _FusedBatchNorm.from_config(operation.get_config())
    return clone(operation)


def _fits(layer: keras.layers.BatchNormalization) -> bool:
    """Whether the operator covers the layer: images, channels last, scale and shift."""
    rank = len(layer.input.shape) if len(layer._inbound_nodes) == 1 else 0
    return rank == 4 and layer.axis in (-1, 3) and layer.center and layer.scale


class _FusedBatchNorm(keras.layers.BatchNormalization):  # type: ignore[misc]
    """Batch normalisation of ``(batch, height, width, channels)`` by `FusedBatchNormV3`.

    The running variance takes the unbiased batch variance, as PyTorch's does.
    """

    def call(self, inputs: tf.Tensor, training: bool | None = None, mask: Any = None) -> tf.Tensor:
        learns = bool(training and self.trainable)
        none = tf.zeros([0])
        y, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=inputs,
            scale=self.gamma.value,
            offset=self.beta.value,
            mean=none if learns else self.moving_mean.value,
            variance=none if learns else self.moving_variance.value,
            epsilon=self.epsilon,
            is_training=learns,
        )
        if learns:
            for stored, new in ((self.moving_mean, mean), (self.moving_variance, variance)):
                stored.assign(stored * self.momentum + new * (1 - self.momentum))
        return y
