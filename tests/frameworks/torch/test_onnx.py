"""What torch's exporter to ONNX does not do by itself; and it reads its own translations once for all exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float32])
def test_numbers_less_a_mask(dtype: Any, tmp_path: Path) -> None:
    """As models of text write it; torch's exporter alone fails where the mask is of whole numbers."""

    class Masked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(6, 3)

        def forward(self, x: Any, mask: Any) -> Any:
            return self.layer(x) + (1.0 - mask) * -5.0 + torch.rsub(mask, 2.5, alpha=2) + (3 - mask) + (mask - 0.5)

    torch.manual_seed(0)
    mask = (torch.arange(6).reshape(2, 3) % 2).to(dtype)
    model = sl.load(Masked().eval(), (torch.ones(2, 6), mask))
    path = sl.export(model, "onnxruntime", tmp_path)  # gated: it answers as the model does
    answer = sl.load(path).outputs(np.ones((2, 6), np.float32), mask.numpy())[0]
    np.testing.assert_allclose(answer, model.outputs(np.ones((2, 6), np.float32), mask.numpy())[0], atol=1e-5)


def test_portions_of_a_free_size(tmp_path: Path) -> None:
    """As RAFT puts two images into one batch and parts them again."""

    class Paired(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(6, 4)

        def forward(self, x: Any) -> Any:
            y = self.layer(torch.cat((x, 2 * x, x * x)))
            first, second, third = y.chunk(3)
            return first * second - third, y.chunk(2, -1)[1]

    torch.manual_seed(0)
    net = Paired().eval()
    model = sl.load(net, np.zeros((2, 6), np.float32))
    x = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    answers = sl.load(sl.export(model, "onnxruntime", tmp_path)).outputs(x)
    for answer, expected in zip(answers, net(torch.from_numpy(x)), strict=True):
        np.testing.assert_allclose(answer, expected.detach(), atol=1e-5)


def test_one_value_is_clipped_by_several(tmp_path: Path) -> None:
    """As layers do that clip what they read, and read the same."""

    class Clipped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(6, 3) for _ in range(3))
            for i in range(3):
                self.register_buffer(f"low{i}", torch.tensor(-0.5 - i))
                self.register_buffer(f"high{i}", torch.tensor(0.25 + i))

        def forward(self, x: Any) -> Any:
            bounds = [(getattr(self, f"low{i}"), getattr(self, f"high{i}")) for i in range(3)]
            clipped = [x.clamp(low, high).clamp(-2, 2) for low, high in bounds]
            return sum(layer(y) for layer, y in zip(self.layers, clipped, strict=True))

    torch.manual_seed(0)
    net = Clipped().eval()
    x = 4 * np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    answer = sl.load(sl.export(sl.load(net, x[:2]), "onnxruntime", tmp_path)).predict(x)
    np.testing.assert_allclose(answer, net(torch.from_numpy(x)).detach(), atol=1e-5)
