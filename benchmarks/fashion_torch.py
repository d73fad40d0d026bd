"""Fashion-MNIST, PyTorch to ONNX Runtime: slimline beside the pipeline a user would build today.

    python benchmarks/fashion_torch.py [--quick] [--fresh]

The peer: Torch-Pruning, distillation in a plain torch loop, and ONNX Runtime's static quantization. Both get the
same original, training samples in the same order with the same augmentation, optimizer and calibration samples, and
as many epochs, of which the one that is best on the same selection samples is kept. All artifacts are timed in one
run.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import quantizers
import torch
from common import WEIGHTS, Entry, cached, compare, fashion, options, peer, slimline_entry, write
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import slimline as sl
from slimline.methods.schedules import warmup_cosine
from slimline.zoo.torch import ResidualCNN

CASE = "Fashion-MNIST, ResNet 32-64-128 of 70 M MACs"
RECOVERY = sl.Distillation(epochs=6, batch_size=256, learning_rate=4e-3, precision="bfloat16")
PEER_PRUNINGS = ((0.5, 16),)


def slimline_recipes(recovery: sl.Distillation) -> dict[str, list[Any]]:
    """By name."""
    int8 = sl.StaticQuantization()
    return {
        "50 % pruned by OBS, recovered, INT8": [
            sl.ChannelPruning(ratio=0.5, round_to=16, criterion="obs"),
            recovery,
            int8,
        ],
    }


def original() -> ResidualCNN:
    """The trained network, in inference mode."""
    model = ResidualCNN()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()


def export(model: nn.Module, path: Path) -> None:
    """ONNX as torch writes it, with any batch size."""
    torch.onnx.export(
        model.eval(),
        (torch.zeros(2, 1, 28, 28),),
        path,
        input_names=["x"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=False,
        verbose=False,
    )


def torch_pruned(ratio: float, round_to: int | None) -> nn.Module:
    """The original after Torch-Pruning's group magnitude pruning, as its documentation shows it."""
    tp = peer("torch_pruning", "torch-pruning")
    model = original()
    pruner = tp.pruner.BasePruner(
        model,
        torch.zeros(1, 1, 28, 28),
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        round_to=round_to,
        ignored_layers=[model.head],
    )
    pruner.step()
    return model


def distil(student: nn.Module, data: sl.Data, step: sl.Distillation, seed: int = 0) -> nn.Module:
    """Plain distillation (Hinton et al. 2015) with everything as in `step`; the best epoch on selection is kept."""
    torch.manual_seed(seed)
    student, teacher = (m.to(memory_format=torch.channels_last) for m in (student, original()))
    weights, vectors = ([p for p in student.parameters() if (p.ndim > 1) == many] for many in (True, False))
    groups = [{"params": weights, "weight_decay": step.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, step.learning_rate)
    train = data.split("train")
    total = step.epochs * -(-len(train) // step.batch_size)
    best, best_weights, done = -1.0, copy.deepcopy(student.state_dict()), 0
    for epoch in range(1, step.epochs + 1):
        student.train()
        for inputs, labels in train.batches(step.batch_size, seed=seed, epoch=epoch):
            x = torch.from_numpy(inputs[0]).to(memory_format=torch.channels_last)
            rate = step.learning_rate * float(warmup_cosine(done, total, step.warmup))
            for group in optimizer.param_groups:
                group["lr"] = rate
            with torch.autocast("cpu", torch.bfloat16, enabled=step.precision == "bfloat16"):
                with torch.no_grad():
                    target = teacher(x)
                logits = student(x)
            t = step.temperature
            soft = F.kl_div(
                F.log_softmax(logits.float() / t, 1),
                F.log_softmax(target.float() / t, 1),
                reduction="batchmean",
                log_target=True,
            )
            hard = F.cross_entropy(logits.float(), torch.from_numpy(labels).long())
            optimizer.zero_grad(set_to_none=True)
            (step.alpha * t**2 * soft + (1 - step.alpha) * hard).backward()
            optimizer.step()
            done += 1
        score = accuracy(student, data.split("selection"))
        if score >= best:
            best, best_weights = score, copy.deepcopy(student.state_dict())
    student.load_state_dict(best_weights)
    return student.eval().to(memory_format=torch.contiguous_format)


def accuracy(model: nn.Module, split: Any) -> float:
    """Of a torch model on a labelled split."""
    model.eval()
    with torch.inference_mode():
        classes = [model(torch.from_numpy(x)).argmax(1).numpy() for (x,), _ in split.batches(500)]
    return float((np.concatenate(classes) == split.labels).mean())


def peer_entries(
    data: sl.Data, recovery: sl.Distillation, prunings: Sequence[Any], quick: bool, fresh: bool
) -> list[Entry]:
    """Torch-Pruning + distillation, in float and quantized by ONNX Runtime; and that quantization alone."""
    calibration = data.split("calibration").inputs[0]
    config = {"recovery": recovery.model_dump(mode="json"), "quick": quick}

    def quantize_only(artifact: Path, folder: Path) -> None:
        export(original(), folder / "float.onnx")
        quantizers.onnxruntime(folder / "float.onnx", artifact, {"x": calibration})

    entries = [cached("ONNX Runtime", "quantize_static", ".onnx", config, quantize_only, fresh)]
    for ratio, round_to in prunings:
        rounded = "" if round_to is None else f" in {round_to}s"

        def pruned(artifact: Path, folder: Path, ratio: float = ratio, round_to: int | None = round_to) -> None:
            export(distil(torch_pruned(ratio, round_to), data, recovery), artifact)

        recipe = f"{100 * ratio:.0f} % pruned{rounded}, distilled"
        in_float = cached("Torch-Pruning", recipe, ".onnx", config, pruned, fresh)

        def quantized(artifact: Path, folder: Path, source: Path = in_float.artifact) -> None:
            quantizers.onnxruntime(source, artifact, {"x": calibration})

        name = f"{recipe}, quantize_static"
        in_int8 = cached("Torch-Pruning + ONNX Runtime", name, ".onnx", config, quantized, fresh)
        seconds = (in_float.seconds or 0) + (in_int8.seconds or 0)
        entries += [in_float, Entry(in_int8.tool, name, in_int8.artifact, seconds)]
    return entries


def main() -> None:
    args = options(__doc__)
    recovery = RECOVERY.model_copy(update={"epochs": 1}) if args.quick else RECOVERY
    data = fashion(channels_last=False, quick=args.quick)
    base = cached("original", "FP32", ".onnx", {}, lambda artifact, _: export(original(), artifact), args.fresh)
    base = Entry(base.tool, base.recipe, base.artifact)
    peers = peer_entries(data, recovery, PEER_PRUNINGS[:1] if args.quick else PEER_PRUNINGS, args.quick, args.fresh)
    model = sl.load(original(), (data.split("calibration").inputs[0][:2],))
    recipes = list(slimline_recipes(recovery).items())
    ours = [
        slimline_entry(model, data, "onnxruntime", ".onnx", name, steps, args.quick, args.fresh)
        for name, steps in (recipes[:2] if args.quick else recipes)
    ]
    rows = compare(CASE, "onnxruntime", base, [*ours, *peers], data, quick=args.quick)
    print(write("fashion_torch", rows, args.quick).read_text())


if __name__ == "__main__":
    main()
