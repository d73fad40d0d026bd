"""What static INT8 costs without training: time and memory of the work, beside the runtimes' own quantizers.

    python benchmarks/post_training.py [--quick] [--fresh] [onnxruntime] [openvino]

MobileNetV2 and ResNet-18, untrained, as neither time nor memory follows what weights are; norms have the statistics of
the samples. Every tool starts at the same float ONNX file and the same 100 images of 224 × 224, random numbers, in a
fresh process, as `photographs.py` has it, whose recipes and peers these are.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import quantizers
from common import CACHE, Row, log, options, write
from photographs import CALIBRATION, SIDE, TARGETS, made, recipes

import slimline as sl
from slimline.measure import file_bytes

_ROWS = 16  # images that norms take their statistics of


def mobilenet() -> Any:
    """Images ``(n, 3, 224, 224)`` float32 -> logits ``(n, 1000)``; 3.5 million parameters."""
    from slimline.zoo.torch import mobilenet_v2

    return mobilenet_v2()


def resnet() -> Any:
    """The same; 11.7 million parameters."""
    from torch import nn

    from slimline.zoo.torch import ResidualCNN

    network = ResidualCNN((64, 128, 256, 512), blocks=2, in_channels=3, classes=1000)
    network.stem = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
    network.stages.insert(0, nn.MaxPool2d(3, 2, 1))
    return network


NETWORKS: dict[str, Callable[[], Any]] = {"MobileNetV2": mobilenet, "ResNet-18": resnet}


def exported(make: Callable[[], Any], samples: np.ndarray[Any, np.dtype[Any]], path: Path) -> None:
    """The float ONNX file of an untrained network."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    network = make()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # statistics are means
    with torch.no_grad():
        network.train()(torch.from_numpy(samples[:_ROWS]))
    sl.export(sl.load(network.eval(), (samples[:2],)), "onnxruntime", path)


def main() -> None:
    args = options(__doc__, TARGETS)
    folder = CACHE / f"post-training{'-quick' if args.quick else ''}"
    folder.mkdir(parents=True, exist_ok=True)
    samples = folder / "samples.npy"
    count = _ROWS if args.quick else CALIBRATION
    images = np.random.default_rng(0).normal(size=(count, 3, SIDE, SIDE)).astype(np.float32)
    np.save(samples, images)
    rows: list[Row] = []
    for network, make in NETWORKS.items():
        own = folder / network
        own.mkdir(exist_ok=True)
        source = own / "float.onnx"
        if args.fresh or not source.exists():
            exported(make, images, source)
        for target in args.names or TARGETS:
            tools = [*(("slimline", name) for name in recipes()), (quantizers.QUANTIZERS[target][0], "INT8")]
            for tool, recipe in tools:
                try:
                    artifact, cost = made(tool, recipe, target, source, samples, own, args.fresh)
                except RuntimeError as error:  # a peer may be absent, and fail as it likes
                    log.warning("%s, %s, for %s: %s", tool, recipe, target, error)
                    continue
                size = file_bytes(artifact)
                ratio = file_bytes(source) / size
                rows.append(Row(network, tool, recipe, target, file_bytes=size, size_ratio=ratio, **cost))
        page = write("post_training", rows, args.quick)
    print(page.read_text())


if __name__ == "__main__":
    main()
