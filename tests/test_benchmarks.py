"""What the benchmarks share, on stand-ins for the data sets that they read."""

from __future__ import annotations

import gzip
import importlib
import importlib.util
import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

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


@pytest.fixture
def targets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.syspath_prepend(str(COMMON.parent))
    common, targets = (importlib.import_module(name) for name in ("common", "targets"))
    monkeypatch.setattr(common, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(targets, "INT8", sl.StaticQuantization(undo=False, samples=64))
    return targets


def study(targets: ModuleType) -> tuple[Any, np.ndarray]:
    """A case of random images, and the classes that its network gives them."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)).eval()
    known, test = (rng.normal(size=(n, 1, 8, 8)).astype(np.float32) for n in (64, 40))
    model = sl.load(net, (known[:2],))
    classes = model.predict(test).argmax(1)
    return targets.Study("stand-in", {"original": model}, (known,), (test,), (classes + (classes == 3)) % 10), classes


def test_a_target_is_measured_beside_its_own_quantizer(targets: ModuleType) -> None:
    case, classes = study(targets)
    every = list(targets.artifacts(case, "onnxruntime", quick=True, fresh=False))
    original, ours, theirs = (row for row in targets.measured(case, every, quick=True) if row.batch == 1)
    assert (original.tool, ours.tool) == ("original", "slimline") and theirs.tool.startswith("quantize_static ")
    assert original.agreement == 1.0 and original.speedup == 1.0 and original.drop is None
    assert original.accuracy == (classes != 3).mean()
    for row in (ours, theirs):
        assert row.recipe == "INT8" and row.agreement >= 0.8 and row.samples_ms and row.file_bytes
        assert row.drop == pytest.approx(original.accuracy - row.accuracy)


def test_a_quantizer_that_is_not_there_gets_a_row_that_says_so(
    targets: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> None:
        sys.exit("peer is not installed: run pip install peer.")

    monkeypatch.setattr(targets, "QUANTIZERS", {"onnxruntime": ("peer", "peer", missing)})
    case, _ = study(targets)
    last = list(targets.artifacts(case, "onnxruntime", quick=True, fresh=False))[-1]
    assert last.path is None and last.tool == "peer (not installed)"
    assert last.recipe == "INT8: not there (peer is not installed: run pip install peer.)"


def test_embeddings_are_compared_by_their_nearest_neighbour(targets: ModuleType) -> None:
    case, _ = study(targets)
    near = targets.Study(case.case, case.networks, case.calibration, case.test, nearest=True)
    points = np.array([[1, 0], [0.9, 0.1], [0, 1], [0.2, 0.8]], np.float32)
    assert near.scores(points).argmax(1).tolist() == [1, 0, 3, 2]


def test_perplexity_is_that_of_each_token_by_those_before_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(COMMON.parent))
    smollm = importlib.import_module("smollm")
    rng = np.random.default_rng(0)
    ids, table = rng.integers(0, 7, (3, 5)), torch.from_numpy(rng.normal(size=(7, 7)).astype(np.float32))
    artifact = sl.export(sl.load(nn.Embedding.from_pretrained(table), (ids[:2],)), "onnxruntime", tmp_path)
    loss = nn.functional.cross_entropy(table[ids[:, :-1]].flatten(0, 1), torch.from_numpy(ids[:, 1:]).flatten())
    assert smollm.perplexity(artifact, "onnxruntime", ids) == pytest.approx(float(loss.exp()), rel=1e-4)


def test_what_work_costs(common: ModuleType) -> None:
    cost = common.Cost()
    held = np.ones(2**23)  # 64 MB
    while cost.facts()["cpu_seconds"] < 0.05:
        held += 1
    facts = cost.facts()
    assert facts["seconds_to_compress"] > 0.01 and facts["cpu_seconds"] >= 0.05  # of all threads together
    assert facts["peak_bytes"] is None or facts["peak_bytes"] > held.nbytes
    common.Row("case", "tool", "recipe", **facts)  # they are its fields
