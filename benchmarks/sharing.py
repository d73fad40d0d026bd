"""Fashion-MNIST: weights that share values, with pruning and coding, as Deep Compression (Han et al. 2016) has it.

    python benchmarks/sharing.py [--quick] [--fresh] [resnet | lenet-300-100 | lenet-5]

The ResNet is that of the other benchmarks. The LeNets are those of Deep Compression, 266,610 and 431,080 parameters,
trained here by plain steps from the random weights of each seed, on images as they are. The file is the `.slim` archive
of the model, network and biases included; how much smaller it is is said of all trained numbers in float32. Accuracy,
drop and bound are those of the ONNX Runtime artifact on the test images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import Row, cached, fashion, log, options, slimline_entry, write
from fashion_torch import CASE, original
from safetensors.numpy import save_file
from safetensors.torch import load_file
from torch import nn

import slimline as sl

SEEDS = (0, 1, 2)
CASES = {
    "resnet": CASE,
    "lenet-300-100": "Fashion-MNIST, LeNet-300-100",
    "lenet-5": "Fashion-MNIST, LeNet-5",
}


@dataclass(frozen=True)
class Network:
    """A trained network that is to become small, by every recipe."""

    model: sl.Model
    data: sl.Data
    recipes: Mapping[str, Sequence[Any]]


def lenet_300_100() -> nn.Module:
    """With random weights."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


def lenet_5() -> nn.Module:
    """With random weights; the layers of Caffe, whose convolutions have no activations behind them."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10),
    )  # fmt: skip


def resnet(quick: bool, _: bool) -> dict[str, Network]:
    """With the weights that the other benchmarks have."""
    data = fashion(channels_last=False, quick=quick)
    model = sl.load(original(), (data.split("calibration").inputs[0][:2],))
    ends = {name: {"clusters": 32} for name in ("stem", "head")}
    trained: dict[str, Any] = {"batch_size": 256, "precision": "bfloat16"}
    small = [
        sl.ChannelPruning(ratio=0.5, round_to=16, criterion="obs"),
        sl.SparsePruning(amount=0.75, scope="erk", schedule="polynomial", end=0.6),
        sl.Distillation(epochs=1 if quick else 12, learning_rate=4e-3, **trained),
        sl.WeightSharing(clusters=8, overrides=ends),
        sl.Distillation(epochs=1 if quick else 2, learning_rate=2e-3, **trained),
    ]
    recipes = {
        "32 clusters, not trained": [sl.WeightSharing(clusters=32)],
        "half of all widths by OBS, of that 75 % pruned, 8 clusters": small,
    }
    return {"": Network(model, data, recipes)}


def lenets(name: str, quick: bool, fresh: bool) -> dict[str, Network]:
    """One for each seed."""
    build = {"lenet-300-100": lenet_300_100, "lenet-5": lenet_5}[name]
    amount = {"lenet-300-100": 0.925, "lenet-5": 0.905}[name]
    data = fashion(channels_last=False, quick=quick, augmented=False)
    example = (data.split("calibration").inputs[0][:2],)
    trained: dict[str, Any] = {"batch_size": 256, "precision": "bfloat16" if name == "lenet-5" else "float32"}
    plain = sl.Distillation(epochs=1 if quick else 10, alpha=0.0, learning_rate=2e-3, **trained)
    small = [
        sl.SparsePruning(amount=amount, scope="erk", schedule="polynomial", end=0.6),
        sl.Distillation(epochs=1 if quick else 8, learning_rate=2e-3, **trained),
        sl.WeightSharing(clusters=8),
        sl.Distillation(epochs=1 if quick else 2, learning_rate=3e-3, **trained),
    ]
    networks = {}
    for seed in SEEDS[:1] if quick else SEEDS:
        torch.manual_seed(seed)
        network = build().eval()

        def train(artifact: Path, _: Path, network: nn.Module = network, seed: int = seed) -> None:
            start = sl.load(network, example)
            trained = sl.apply(start, plain, data, teacher=start, seed=seed)  # with alpha 0 it teaches nothing
            save_file(trained.parameters(), artifact)

        facts = {"step": plain.model_dump(mode="json"), "seed": seed, "quick": quick}
        network.load_state_dict(
            load_file(cached("slimline", f"{name}, seed {seed}", ".safetensors", facts, train, fresh).artifact)
        )
        recipes = {f"{100 * amount:g} % pruned, 8 clusters": small}
        networks[f", seed {seed}"] = Network(sl.load(network, example), data, recipes)
    return networks


def measured(case: str, suffix: str, network: Network, quick: bool, fresh: bool) -> list[Row]:
    """One for the original, and one for each recipe."""
    model = network.model
    trained = 4 * sum(array.size for name, array in model.parameters().items() if name in model.graph.trainable)
    rows: list[Row] = []
    for name, steps in network.recipes.items():
        label = f"{case} {name}{suffix}"
        entry = slimline_entry(model, network.data, "onnxruntime", ".onnx", label, steps, quick, fresh)
        run = entry.artifact.parent / "run"
        report = json.loads((run / "report.json").read_text())
        packed = sl.pack(sl.finalize(sl.load(run / "model.pt2")), run.parent / "model.slim").packed_bytes
        if not rows:
            before = report["original"]["accuracy"]
            rows.append(Row(case, "original", f"none{suffix}", "onnxruntime", accuracy=before, file_bytes=trained))
        row = Row(
            case, "slimline", f"{name}{suffix}", "onnxruntime", accuracy=report["compressed"]["accuracy"],
            drop=report["certificate"]["observed_drop"], bound=report["certificate"]["bound"],
            file_bytes=packed, size_ratio=trained / packed,
        )  # fmt: skip
        log.info("%s", row)
        rows.append(row)
    return rows


def main() -> None:
    args = options(__doc__, tuple(CASES))
    rows = []
    for name, case in CASES.items():
        if not args.names or name in args.names:
            networks = resnet(args.quick, args.fresh) if name == "resnet" else lenets(name, args.quick, args.fresh)
            for suffix, network in networks.items():
                rows += measured(case, suffix, network, args.quick, args.fresh)
    print(write("sharing", rows, args.quick).read_text())


if __name__ == "__main__":
    main()
