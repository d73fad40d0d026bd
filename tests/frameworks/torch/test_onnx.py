"""The exporter reads its own translations once for all exports, and nobody else notices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import slimline as sl

torch = pytest.importorskip("torch")


def test_translations_are_read_once_and_the_bytes_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import nullcontext

    from torch.onnx._internal.exporter import _registration

    from slimline.frameworks.torch import onnx

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.GELU(), torch.nn.Linear(8, 3)).eval()
    model = sl.load(net, np.zeros((2, 6), np.float32))
    before = vars(_registration.ONNXRegistry)["from_torchlib"]
    read = []
    real = _registration.onnxscript_apis.get_torchlib_ops
    monkeypatch.setattr(_registration.onnxscript_apis, "get_torchlib_ops", lambda: read.append(1) or real())
    onnx._translations_of_torch.cache_clear()
    files = [sl.export(model, "onnxruntime", tmp_path / name).read_bytes() for name in ("first", "second")]
    assert len(read) == 1, "torch reads them elsewhere now: see slimline.frameworks.torch.onnx"
    assert vars(_registration.ONNXRegistry)["from_torchlib"] is before
    monkeypatch.setattr(onnx, "_read_once", nullcontext)
    files.append(sl.export(model, "onnxruntime", tmp_path / "as torch does").read_bytes())
    assert len(read) == 2 and len(set(files)) == 1
