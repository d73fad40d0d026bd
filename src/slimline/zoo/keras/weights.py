"""Weights of a torch network of the zoo, in its Keras twin."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import slimline.frameworks.keras  # noqa: F401  chooses the backend before keras is imported  # isort: skip
import keras

from slimline.basics.errors import SlimlineError
from slimline.files import array_files
from slimline.files.strictjson import Malformed

L = keras.layers

_NAMES = {
    "kernel": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
    "embeddings": "weight",
    "value": "weight",
}


def load_torch_weights(model: keras.Model, path: str | Path) -> None:
    """Copy the safetensors state dict of the torch network of the same settings into `model`, in place.

    Raises
    ------
    SlimlineError : no such file, not safetensors, or weights of another network.
    """
    try:
        state = array_files.safetensors(Path(path))
    except (OSError, Malformed) as error:
        raise SlimlineError(f"{path} is no safetensors file that can be read: check the path.") from error
    by_name = {name.replace(".", "_"): array for name, array in state.items()}
    for layer in model.layers:
        for variable in layer.weights:
            kind = variable.path.rpartition("/")[2]
            name = f"{layer.name}_{_NAMES[kind]}"
            if name not in by_name:
                raise SlimlineError(
                    f"{path} has no weights for layer {layer.name!r}: give the file of a network of this shape."
                )
            array = _keras_layout(by_name[name], layer) if kind == "kernel" else by_name[name]
            if array.shape != tuple(variable.shape):
                raise SlimlineError(
                    f"{path} holds {name} of shape {array.shape}, the model wants {tuple(variable.shape)}: "
                    "give the file of a network of these widths."
                )
            variable.assign(array)


def _keras_layout(kernel: np.ndarray, layer: keras.layers.Layer) -> np.ndarray:
    """``(out, in, *k)`` as ``(*k, in, out)``; of a depthwise layer as ``(*k, out, in)``, ``in`` being 1."""
    channels = (0, 1) if isinstance(layer, L.DepthwiseConv2D) else (1, 0)
    return np.transpose(kernel, (*range(2, kernel.ndim), *channels))
