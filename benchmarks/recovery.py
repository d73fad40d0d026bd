"""Fashion-MNIST ResNet, 61 % of the MACs removed and recovered, three seeds: slimline beside Torch-Pruning.

    python benchmarks/recovery.py [--quick] [--fresh] [torch-pruning | obs | l2 …]

Both tools remove channels by the L2 norm of their groups down to the same widths (16, 48, 80 of 32, 64, 128), so
their latency is the same, and distil for as many epochs with the same optimizer, samples and augmentation; slimline
also ranks by OBS, which repairs the layers by least squares before training starts. Everything is exported to ONNX in
FP32 and timed in one run. A seed decides the order of samples and the augmentation. The names run only these: each
takes about six minutes a seed on one core.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Entry, Row, cached, compare, fashion, log, options, peer, write
from fashion_torch import CASE, RECOVERY, distil, export, original
from torch import nn

import slimline as sl

RATIO, ROUND = 0.375, 16
WIDTHS = {32: 16, 64: 48, 128: 80}
SEEDS = (0, 1, 2)
STEP = RECOVERY.model_copy(update={"epochs": 3, "learning_rate": 1e-3})


def torch_pruned() -> nn.Module:
    """The original after Torch-Pruning's group magnitude pruning to `WIDTHS`."""
    tp = peer("torch_pruning", "torch-pruning")
    model = original()
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    tp.pruner.BasePruner(
        model,
        torch.zeros(1, 1, 28, 28),
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio_dict={m: 1 - WIDTHS[m.out_channels] / m.out_channels for m in convolutions},
        ignored_layers=[model.head],
    ).step()
    return model


def makers(
    model: sl.Model, data: sl.Data, recovery: sl.Distillation
) -> dict[str, tuple[str, str, Any, Callable[[Path, int], None]]]:
    """By name the tool and recipe, what the cache is keyed by, and what writes the artifact for a seed."""

    def slimline(criterion: str) -> tuple[Any, Callable[[Path, int], None]]:
        steps = [sl.ChannelPruning(ratio=RATIO, round_to=ROUND, criterion=criterion), recovery]

        def make(artifact: Path, seed: int) -> None:
            small = sl.apply(model, steps, data, seed=seed)
            sl.export(small, "onnxruntime", artifact.parent / "out").replace(artifact)

        return [step.model_dump(mode="json") for step in steps], make

    def pruned(artifact: Path, seed: int) -> None:
        export(distil(torch_pruned(), data, recovery, seed), artifact)

    return {
        "obs": ("slimline", "OBS", *slimline("obs")),
        "torch-pruning": ("Torch-Pruning", "L2", [recovery.model_dump(mode="json"), WIDTHS], pruned),
        "l2": ("slimline", "L2", *slimline("l2")),
    }


def summary(rows: list[Row]) -> str:
    """Mean and spread over the seeds, as a table."""
    lines = [
        "## Over the seeds (mean, least to most)\n",
        "| tool | recipe | accuracy | drop, points | faster, batch 1 | batch 32 |\n|---|---|---|---|---|---|",
    ]
    kinds = dict.fromkeys((r.tool, r.recipe.partition(", seed")[0]) for r in rows if r.tool != "original")
    for tool, kind in kinds:
        mine = [r for r in rows if r.tool == tool and r.recipe.startswith(f"{kind},")]

        def spread(values: list[float], form: str) -> str:
            return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"

        first = [r for r in mine if r.batch == 1]
        cells = [
            spread([100 * (r.accuracy or 0) for r in first], ".2f"),
            spread([100 * (r.drop or 0) for r in first], ".2f"),
            *(spread([r.speedup or 0 for r in mine if r.batch == batch], ".2f") for batch in (1, 32)),
        ]
        lines.append(f"| {tool} | {kind} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    args = options(__doc__, ("torch-pruning", "obs", "l2"))
    recovery = STEP.model_copy(update={"epochs": 1}) if args.quick else STEP
    data = fashion(channels_last=False, quick=args.quick)
    model = sl.load(original(), (data.split("calibration").inputs[0][:2],))
    base = cached("original", "FP32", ".onnx", {}, lambda artifact, _: export(original(), artifact), args.fresh)
    base = Entry(base.tool, base.recipe, base.artifact)
    entries = []
    for seed in SEEDS[:1] if args.quick else SEEDS:
        for key, (tool, name, config, make) in makers(model, data, recovery).items():

            def write_it(artifact: Path, _: Path, make: Any = make, seed: int = seed) -> None:
                make(artifact, seed)

            facts = {"config": config, "seed": seed, "quick": args.quick}
            if not args.names or key in args.names:
                stored = cached(tool, f"{name}, seed {seed}", ".onnx", facts, write_it, args.fresh)
                entries.append(Entry(stored.tool, stored.recipe, stored.artifact))
    rows = compare(CASE, "onnxruntime", base, entries, data, quick=args.quick)
    page = write("recovery", rows, args.quick)
    page.write_text(page.read_text() + "\n" + summary(rows))
    log.info("%s", summary(rows))


if __name__ == "__main__":
    main()
