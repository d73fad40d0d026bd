"""What the benchmarks share, on stand-ins for the data sets that they read."""

from __future__ import annotations

import gzip
import importlib.util
import struct
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

import slimline as sl

COMMON = Path(__file__).parent.parent / "benchmarks/common.py"


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_common", COMMON)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmarks_common", module)  # a dataclass looks for its module there
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "FASHION", tmp_path)
    return module


def idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">BBBB{array.ndim}i", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def test_fashion_leaves_out_test_images_that_are_training_images(common: ModuleType, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (90, 28, 28), np.uint8), np.arange(90, dtype=np.uint8) % 10
    test, test_labels = np.concatenate([images[60:], images[:4], images[60:63]]), np.arange(37, dtype=np.uint8) % 10
    idx(tmp_path / "train-images-idx3-ubyte.gz", images[:60])
    idx(tmp_path / "train-labels-idx1-ubyte.gz", labels[:60])
    idx(tmp_path / "t10k-images-idx3-ubyte.gz", test)
    idx(tmp_path / "t10k-labels-idx1-ubyte.gz", test_labels)
    data = common.fashion(channels_last=False, quick=False)
    data.refuse_overlap()
    assert data.dropped == 4 and len(data.split("certification")) == 33

    torch.manual_seed(0)
    model = sl.load(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), data.example())
    artifact = sl.export(model, "onnxruntime", tmp_path / "out")
    before, after = (common.Entry(tool, "none", artifact) for tool in ("original", "slimline"))
    _, row = common.compare("stand-in", "onnxruntime", before, [after], data, batches=(1,), quick=True)
    right = model.predict(*data.split("certification").inputs).argmax(1) == data.split("certification").labels
    assert row.accuracy == pytest.approx(right.mean()) and row.drop == 0
    proof = data.proof()
    assert proof.copies == 3
    assert row.bound == proof.certify(right, right, 0.01, metric="accuracy", score_range="known").bound
