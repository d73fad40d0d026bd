"""Post-training quantization without training, PyTorch to ONNX Runtime: W8A8 and W4A8 beside the peers.

    python benchmarks/quantization.py [--quick] [--fresh] [resnet] [mobilenet]

Two networks on Fashion-MNIST: the ResNet of the other benchmarks, and one like MobileNetV2 (inverted residuals with
depthwise convolutions and ReLU6, the kind that 4 bits hurt most), which is trained here first and kept in the cache.
All get the same calibration samples. The peers (`quantizers.py`): ONNX Runtime's static quantization, and NNCF where it
is installed beside the project. What ONNX Runtime's own INT4 weights run as is another
matter: their convolutions compute in float.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import quantizers
import torch
from common import CACHE, Entry, cached, compare, fashion, log, options, write
from fashion_torch import export, original
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import slimline as sl

CASES = {"resnet": "Fashion-MNIST, ResNet 32-64-128", "mobilenet": "Fashion-MNIST, like MobileNetV2"}
SAMPLES = 512
EPOCHS, BATCH, RATE = 12, 128, 3e-3
BLOCKS = ((16, 1, 1), (24, 6, 2), (24, 6, 1), (32, 6, 2), (32, 6, 1), (64, 6, 1))
"""Channels, expansion and stride."""


class InvertedResidual(nn.Module):
    """Expand, convolve each channel by itself, project; with a shortcut where shapes allow."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        width = inputs * expansion
        layers: list[nn.Module] = []
        if expansion > 1:
            layers += [nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU6()]
        layers += [nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False), nn.BatchNorm2d(width), nn.ReLU6()]
        layers += [nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.layers = nn.Sequential(*layers)
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x)
        return x + y if self.shortcut else y


class MobileNet(nn.Module):
    """After Sandler et al. 2018 (arXiv:1801.04381), for images of 28 by 28."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        blocks, width = [], 16
        for outputs, expansion, stride in BLOCKS:
            blocks.append(InvertedResidual(width, outputs, expansion, stride))
            width = outputs
        self.blocks = nn.Sequential(*blocks)
        self.last = nn.Sequential(nn.Conv2d(width, 256, 1, bias=False), nn.BatchNorm2d(256), nn.ReLU6())
        self.head = nn.Linear(256, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.last(self.blocks(self.stem(x))).mean((2, 3)))
        return logits


def mobilenet(data: sl.Data, quick: bool) -> tuple[nn.Module, Path]:
    """The trained network in inference mode, and the file that keeps its weights."""
    path = CACHE / f"mobilenet{'-quick' if quick else ''}.safetensors"
    torch.manual_seed(0)
    model = MobileNet()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        train(model, data, 3 if quick else EPOCHS)
        save_file(model.state_dict(), path)
    model.load_state_dict(load_file(path))
    return model.eval(), path


def train(model: nn.Module, data: sl.Data, epochs: int) -> None:
    """By AdamW on one cycle of the learning rate."""
    split = data.split("train")
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.02)
    total = epochs * -(-len(split) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=total, pct_start=0.2)
    model.train().to(memory_format=torch.channels_last)
    for epoch in range(1, epochs + 1):
        loss = torch.zeros(())
        for (images,), labels in split.batches(BATCH, seed=0, epoch=epoch):
            assert isinstance(labels, np.ndarray)
            x = torch.from_numpy(images).to(memory_format=torch.channels_last)
            loss = F.cross_entropy(model(x), torch.from_numpy(labels).long(), label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        log.info("epoch %d of %d, loss %.3f", epoch, epochs, loss.item())
    model.eval().to(memory_format=torch.contiguous_format)


def recipes() -> dict[str, Any]:
    """slimline's, by name. First and last layers have 8 bits in all of 4, as is the custom."""
    four: dict[str, Any] = {"weights": "int4", "first_layers": "int8", "last_layers": "int8", "undo": False}
    better: dict[str, Any] = {"bias_correction": "empirical", "equalize": True}
    return {
        "W8A8": sl.StaticQuantization(samples=SAMPLES),
        "W8A8, entropy": sl.StaticQuantization(samples=SAMPLES, observer="entropy", undo=False),
        "W8A8, GPTQ, biases corrected": sl.StaticQuantization(
            samples=SAMPLES, rounding="gptq", bias_correction="empirical", undo=False
        ),
        "W4A8, nearest": sl.StaticQuantization(samples=SAMPLES, **four),
        "W4A8, least error": sl.StaticQuantization(samples=SAMPLES, rounding="mse", **four),
        "W4A8, GPTQ": sl.StaticQuantization(samples=SAMPLES, rounding="gptq", **four),
        "W4A8, GPTQ, equalised, biases corrected": sl.StaticQuantization(
            samples=SAMPLES, rounding="gptq", **four, **better
        ),
        "W4A8, AdaRound": sl.StaticQuantization(samples=SAMPLES, rounding="adaround", **four),
        "mixed, at most a sixth of the size": sl.MixedPrecision(
            max_size=1 / 6,
            quantization=sl.StaticQuantization(
                samples=SAMPLES, rounding="gptq", bias_correction="empirical", undo=False
            ),
        ),
    }


def peers(float_: Path, calibration: np.ndarray, config: Mapping[str, Any], fresh: bool) -> list[Entry]:
    """What of the peers works here; what does not is logged."""
    samples = {"x": calibration}
    makers: dict[tuple[str, str], Callable[[Path], None]] = {
        ("ONNX Runtime", f"quantize_static, {name}"): (
            lambda artifact, own=own: quantizers.onnxruntime(float_, artifact, samples, **own)
        )
        for name, own in (
            ("W8A8", {}),
            ("W8A8, entropy", {"ranges": "Entropy"}),
            ("W4A8", {"weights": "QInt4"}),
        )
    }
    makers["NNCF", "W8A8"] = lambda artifact: quantizers.nncf_onnx(float_, artifact, samples)
    entries = []
    for (tool, recipe), make in makers.items():
        try:
            entries.append(cached(tool, recipe, ".onnx", config, lambda artifact, _, make=make: make(artifact), fresh))
        except (Exception, SystemExit) as error:  # a peer may be absent, and fail as it likes
            log.warning("%s, %s: %s", tool, recipe, error)
    return entries


def main() -> None:
    args = options(__doc__, tuple(CASES))
    data = fashion(channels_last=False, quick=args.quick)
    calibration = data.split("calibration").inputs[0][: 64 if args.quick else SAMPLES]
    rows = []
    for name in args.names or CASES:
        module, weights = (original(), None) if name == "resnet" else mobilenet(data, args.quick)
        digest = "" if weights is None else hashlib.sha256(weights.read_bytes()).hexdigest()
        config = {"case": name, "weights": digest, "quick": args.quick, "samples": len(calibration)}
        base = cached(
            "original", "FP32", ".onnx", config, lambda artifact, _, m=module: export(m, artifact), args.fresh
        )
        base = Entry(base.tool, base.recipe, base.artifact)
        model = sl.load(module, (calibration[:2],))
        chosen = recipes()
        if args.quick:
            chosen = {key: chosen[key] for key in ("W8A8, entropy", "W4A8, GPTQ, equalised, biases corrected")}
        entries = []
        for recipe, step in chosen.items():

            def make(artifact: Path, folder: Path, step: Any = step, model: sl.Model = model) -> None:
                small = sl.apply(model, step, data, target="onnxruntime", progress=False)
                sl.export(small, "onnxruntime", folder / "out").replace(artifact)

            settings = {**config, "step": step.model_dump(mode="json")}
            entries.append(cached("slimline", recipe, ".onnx", settings, make, args.fresh))
        entries += peers(base.artifact, calibration, config, args.fresh)
        rows += compare(CASES[name], "onnxruntime", base, entries, data, batches=(1, 32), quick=args.quick)
    print(write("quantization", rows, args.quick).read_text())


if __name__ == "__main__":
    main()
