"""A weight as a tensor: what an opened layer owns beside the layers that it holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras


@keras.saving.register_keras_serializable(package="slimline")
class Weight(keras.layers.Layer):  # type: ignore[misc]
    """Gives a weight of a fixed `shape`, whatever tensor it is called on."""

    def __init__(self, shape: Sequence[int], regularizer: Any = None, constraint: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.shape = tuple(shape)
        self.regularizer, self.constraint = keras.regularizers.get(regularizer), keras.constraints.get(constraint)
        self.supports_masking = True

    @classmethod
    def of(cls, variable: Any, name: str) -> Weight:
        """A copy of a variable, without its numbers."""
        return cls(
            tuple(variable.shape),
            variable.regularizer,
            variable.constraint,
            name=name,
            dtype=variable.dtype,
            trainable=variable.trainable,
        )

    def build(self, _: Any) -> None:
        """Makes the weight, of zeros."""
        self.value = self.add_weight(
            shape=self.shape,
            initializer="zeros",
            name="value",
            regularizer=self.regularizer,
            constraint=self.constraint,
            trainable=self.trainable,
        )

    def call(self, _: Any) -> Any:
        """The weight."""
        return keras.ops.convert_to_tensor(self.value)

    def compute_output_spec(self, _: Any) -> keras.KerasTensor:
        """The weight's shape and dtype."""
        return keras.KerasTensor(self.shape, dtype=self.compute_dtype)

    def compute_mask(self, _: Any, mask: Any = None) -> None:
        """A weight has none."""

    def get_config(self) -> dict[str, Any]:
        """What rebuilds the layer."""
        return {
            **super().get_config(),
            "shape": self.shape,
            "regularizer": keras.regularizers.serialize(self.regularizer),
            "constraint": keras.constraints.serialize(self.constraint),
        }
