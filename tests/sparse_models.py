"""Small networks and data for the tests of unstructured pruning, the same in both frameworks."""

import numpy as np
from sklearn.datasets import load_digits

import slimline as sl


def torch_net():
    import torch
    from torch import nn

    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 12), nn.ReLU(), nn.Linear(12, 10),
    ).eval()  # fmt: skip


def keras_net():
    import keras
    from keras import layers as L

    keras.utils.set_random_seed(0)
    return keras.Sequential([
        keras.Input((8, 8, 1), name="x"),
        L.Conv2D(8, 3, padding="same", use_bias=False, name="0"), L.BatchNormalization(name="1"), L.ReLU(name="2"),
        L.Conv2D(16, 3, strides=2, padding="same", groups=2, use_bias=False, name="3"),
        L.BatchNormalization(name="4"), L.ReLU(name="5"),
        L.Flatten(name="6"), L.Dense(12, name="7"), L.ReLU(name="8"), L.Dense(10, name="9"),
    ])  # fmt: skip


def data(framework, labels=True, samples=240):
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32).reshape(-1, 8, 8)
    x = x[:, None] if framework == "torch" else x[..., None]
    x, y, tested = x[:samples], y[:samples], (x[samples : samples + 40], y[samples : samples + 40])
    return sl.Data(train=(x, y) if labels else x, test=tested)


def load(framework):
    shape = (2, 1, 8, 8) if framework == "torch" else (2, 8, 8, 1)
    return sl.load(torch_net() if framework == "torch" else keras_net(), np.zeros(shape, np.float32))
