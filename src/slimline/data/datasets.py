"""Data sets that are on the machine already: nothing is ever downloaded."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Literal

import numpy as np

from slimline.basics.arguments import whole
from slimline.basics.arrays import Array
from slimline.basics.errors import SlimlineError, require, unknown
from slimline.data import Data
from slimline.data.splits import Augment

Layout = Literal["channels_first", "channels_last"]
NAMES = ("digits", "fashion-mnist")
FASHION = Path("/usr/share/datasets/fashion-mnist")


def builtin(name: str, layout: Layout = "channels_first", seed: int = 0, augment: Augment | None = None) -> Data:
    """A built-in data set: images as float32 in [0, 1] and their class numbers.

    ``digits``: scikit-learn's 1,797 handwritten digits, 8×8, of which a third (599), stratified by `seed`, is the
    test. ``fashion-mnist``: 60,000 + 10,000 articles of clothing, 28×28 (Xiao et al., 2017, arXiv:1708.07747),
    from the Debian package ``dataset-fashion-mnist``.
    Images are ``(samples, 1, h, w)`` for ``channels_first``, ``(samples, h, w, 1)`` for ``channels_last``.
    """
    seed = whole(seed, "seed", 0, 2**32)
    if name not in NAMES:
        raise unknown("built-in data set", name, NAMES)
    x, y, xt, yt = _digits(seed) if name == "digits" else _fashion()
    axis = 1 if layout == "channels_first" else -1
    train, test = (np.expand_dims(x, axis), y), (np.expand_dims(xt, axis), yt)
    return Data(train, test, augment=augment, overlap="drop", seed=seed, classes=10)


def _digits(seed: int) -> tuple[Array, Array, Array, Array]:
    require("sklearn", "all")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    images = (x.reshape(-1, 8, 8) / 16).astype(np.float32)
    x, xt, y, yt = train_test_split(images, y, test_size=599, random_state=seed, stratify=y)
    return x, y, xt, yt


def _fashion() -> tuple[Array, Array, Array, Array]:
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    files = [FASHION / f"{name}-ubyte.gz" for name in names]
    if not all(file.is_file() for file in files):
        raise SlimlineError(f"{FASHION} has no Fashion-MNIST: run apt-get install dataset-fashion-mnist.")
    x, y, xt, yt = (_idx(file) for file in files)
    return (x / np.float32(255)), y, (xt / np.float32(255)), yt


def _idx(path: Path) -> Array:
    """An array in the IDX format: two zero bytes, a type, the number of dimensions, big-endian sizes, bytes."""
    raw = gzip.decompress(path.read_bytes())
    sizes = np.frombuffer(raw, ">i4", raw[3], 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * len(sizes)).reshape(sizes)
