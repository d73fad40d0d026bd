"""Small models on the digits for the recovery tests; run as a script, a recovery that can be killed.

python -m tests.recovery_job FRAMEWORK CHECKPOINT
"""

import io
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
from sklearn.datasets import load_digits

from slimline.data import Data
from slimline.frameworks.base import adapter
from slimline.model import Model
from slimline.steps.distillation.step import Distillation
from slimline.training.loop import recover

STEP = Distillation(epochs=3, batch_size=32, learning_rate=3e-3, refresh_batches=4)


def noise(x, rng):
    return x + rng.normal(0, 0.02, x.shape).astype(x.dtype)


def digits(framework, labels=True, samples=1797, augment=None):
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32).reshape(-1, 8, 8)[:samples]
    x = x[..., None] if framework == "keras" else x[:, None]
    return Data(train=(x, y[:samples]) if labels else x, augment=augment)


def torch_net(seed):
    import torch
    from torch import nn

    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(12, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Flatten(), nn.Dropout(0.1), nn.Linear(24 * 16, 10),
    ).eval()  # fmt: skip


def onnx_net(seed):
    import torch

    file = io.BytesIO()
    x = torch.zeros(2, 1, 8, 8)
    names = {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}
    norms = torch.onnx.TrainingMode.PRESERVE  # they are folded away otherwise
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(torch_net(seed), (x,), file, dynamo=False, opset_version=17, training=norms, **names)
    return onnx.load_from_string(file.getvalue())


def keras_net(seed):
    import keras
    from keras import layers as L

    keras.utils.set_random_seed(seed)
    conv = {"padding": "same", "use_bias": False}
    return keras.Sequential([
        keras.Input((8, 8, 1), name="x"),
        L.Conv2D(12, 3, **conv, name="conv1"), L.BatchNormalization(name="bn1", momentum=0.9), L.ReLU(name="relu1"),
        L.MaxPooling2D(name="pool"),
        L.Conv2D(24, 3, **conv, name="conv2"), L.BatchNormalization(name="bn2", momentum=0.9), L.ReLU(name="relu2"),
        L.Flatten(name="flat"), L.Dropout(0.1, name="drop"), L.Dense(10, activation="softmax", name="head"),
    ])  # fmt: skip


def model(framework, seed):
    found = adapter(framework)
    source = {"torch": torch_net, "keras": keras_net, "onnx": onnx_net}[framework](seed)
    shape = (2, 8, 8, 1) if framework == "keras" else (2, 1, 8, 8)
    native, example = found.load(source, (np.zeros(shape, np.float32),))
    return Model(found, native, example)


def data(framework):
    return digits(framework, samples=300, augment=noise)


def main(framework, checkpoint):
    models = model(framework, 0), model(framework, 1)
    recover(*models, STEP, data(framework), 7, Path(checkpoint), lambda now: print(now.done, flush=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
