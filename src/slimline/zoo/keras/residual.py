"""The Keras twin of `slimline.zoo.torch.ResidualCNN`: the same layers, names and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import slimline.frameworks.keras  # noqa: F401  chooses the backend before keras is imported  # isort: skip
import keras

L = keras.layers


def residual_cnn(
    widths: Sequence[int] = (32, 64, 128),
    blocks: int = 2,
    in_channels: int = 1,
    classes: int = 10,
    size: int | None = None,
) -> keras.Model:
    """The residual network `slimline.zoo.torch.ResidualCNN` as a functional model.

    Parameters
    ----------
    widths : channels of each stage; every stage but the first halves the resolution.
    blocks : basic blocks in each stage (He et al., 2016, arXiv:1512.03385).
    in_channels, classes : channels of the input image, width of the output.
    size : height and width of the image; None takes any.

    Input ``(batch, height, width, in_channels)`` float32; output ``(batch, classes)`` logits. Layers are called
    as in torch with ``_`` for ``.``: ``stages_1_0_conv1``.
    """
    image = keras.Input((size, size, in_channels), name="image")
    x = L.ReLU(name="relu")(_norm("bn")(_conv("stem", widths[0], 3)(image)))
    for i, width in enumerate(widths):
        for j in range(blocks):
            x = _block(x, f"stages_{i}_{j}", width, 2 if i > 0 and j == 0 else 1)
    x = L.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(image, L.Dense(classes, name="head")(x), name="residual_cnn")


def _conv(name: str, filters: int, kernel: int, stride: int = 1) -> Any:
    """A convolution padded as in torch: for a stride, "valid" behind an explicit `ZeroPadding2D`."""
    padding = "same" if stride == 1 else "valid"
    return L.Conv2D(filters, kernel, stride, padding=padding, use_bias=False, name=name)


def _norm(name: str) -> Any:
    return L.BatchNormalization(momentum=0.9, epsilon=1e-5, name=name)  # torch's momentum 0.1


def _block(x: Any, name: str, width: int, stride: int) -> Any:
    padded = L.ZeroPadding2D(1, name=f"{name}_pad")(x) if stride > 1 else x
    y = _norm(f"{name}_bn1")(_conv(f"{name}_conv1", width, 3, stride)(padded))
    y = L.ReLU(name=f"{name}_relu1")(y)
    y = _norm(f"{name}_bn2")(_conv(f"{name}_conv2", width, 3)(y))
    if stride > 1 or x.shape[-1] != width:
        x = _norm(f"{name}_shortcut_1")(_conv(f"{name}_shortcut_0", width, 1, stride)(x))
    return L.ReLU(name=f"{name}_relu2")(L.Add(name=f"{name}_add")([y, x]))
