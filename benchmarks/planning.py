"""What slimline itself costs: its import, planning a ResNet-50, and the memory of quantizing a 100 MB model.

    python benchmarks/planning.py [--quick]

Each is measured in fresh processes. Peak memory is what quantization and export add to a process in which they
have run once on a tiny model (so that libraries are loaded), with the model itself counted, over the model's bytes.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import Row, options, peer, write

LIMITS = {"import slimline": "0.5 s", "plan of ResNet-50": "5 s", "INT8 of 100 MB": "3 × the model"}


def main() -> None:
    args = options(__doc__)
    again = 1 if args.quick else 5
    megabytes = 8 if args.quick else 100
    rows = [_timed("import slimline", "slimline", "import", [_imported() for _ in range(again)])]
    plans = [_fresh("plan_slimline") for _ in range(again)]
    for part in plans[0]:
        rows.append(_timed("plan of ResNet-50", "slimline", part, [{part: plan[part]} for plan in plans]))
    peers = [_fresh("plan_torch_pruning") for _ in range(again)]
    rows.append(_timed("plan of ResNet-50", "Torch-Pruning", "trace and prune", peers))
    ratio = _fresh("quantize", str(megabytes))["ratio"]
    rows.append(Row("INT8 of 100 MB", "slimline", f"INT8 and export of {megabytes} MB", peak_memory_ratio=ratio))
    print(write("planning", rows, args.quick).read_text())
    print("Limits:", "; ".join(f"{case} {limit}" for case, limit in LIMITS.items()))


def _fresh(job: str, *arguments: str) -> dict[str, float]:
    """Run one of `JOBS` in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--job", job, *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{job} failed: {done.stderr.strip().splitlines()[-1]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _imported() -> dict[str, float]:
    """Seconds of ``import slimline`` in a process that has imported nothing else."""
    code = "import time; start = time.perf_counter(); import slimline; print(time.perf_counter() - start)"
    return {"import": float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)}


def _timed(case: str, tool: str, what: str, figures: list[dict[str, float]]) -> Row:
    samples = tuple(1e3 * next(iter(one.values())) for one in figures)
    return Row(case, tool, what, threads=1, median_ms=statistics.median(samples), samples_ms=samples)


def plan_slimline() -> dict[str, float]:
    import torch

    import slimline as sl

    torch.set_num_threads(1)
    network, example = resnet50(), torch.zeros(2, 3, 224, 224)
    times = {}
    start = time.perf_counter()
    model = sl.load(network, (example.numpy(),))
    assert model.graph.nodes
    times["capture and read"] = time.perf_counter() - start
    start = time.perf_counter()
    plan = sl.plan(model, sl.ChannelPruning(ratio=0.5))
    times["plan"] = time.perf_counter() - start
    start = time.perf_counter()
    plan.apply(model)
    times["apply"] = time.perf_counter() - start
    return times


def plan_torch_pruning() -> dict[str, float]:
    tp = peer("torch_pruning", "torch-pruning")
    import torch

    torch.set_num_threads(1)
    network, example = resnet50(), torch.zeros(2, 3, 224, 224)
    start = time.perf_counter()
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    keep = [network[-1]]
    tp.pruner.BasePruner(network, example, importance=importance, pruning_ratio=0.5, ignored_layers=keep).step()
    return {"trace and prune": time.perf_counter() - start}


def quantize(megabytes: str) -> dict[str, float]:
    import gc
    import tempfile

    import numpy as np
    import torch

    import slimline as sl

    torch.set_num_threads(1)
    rows = np.random.default_rng(0).normal(size=(128, 3, 32, 32)).astype(np.float32)
    data = sl.Data(test=(rows, np.arange(128) % 10), calibration=(rows, np.arange(128) % 10))

    def job(width: int) -> float:
        # From a file, as the command line does it: the size is the file's.
        with tempfile.TemporaryDirectory() as folder:
            path = sl.load(plain_cnn(width), (rows[:2],)).save(Path(folder) / "model.pt2")
            gc.collect()
            before = _status("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
            small = sl.apply(sl.load(path), sl.StaticQuantization(samples=64, batch_size=16, undo=False), data)
            sl.export(small, "onnxruntime", Path(folder) / "model.onnx")
            return (_status("VmHWM") - before) / path.stat().st_size

    job(8)
    return {"ratio": job(int((int(megabytes) * 1e6 / 4 / 9 / 6) ** 0.5))}


def _status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def plain_cnn(width: int) -> Any:
    """Six 3×3 convolutions of `width` channels on a coarse grid: ``6 · 9 · width²`` weights, few activations."""
    from torch import nn

    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 8, 1), nn.ReLU()]
    for _ in range(6):
        layers += [nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)).eval()


def resnet50() -> Any:
    """ResNet-50 (He et al. 2016, arXiv:1512.03385), random weights."""
    import torch
    from torch import nn

    class Bottleneck(nn.Module):
        def __init__(self, inputs: int, width: int, stride: int) -> None:
            super().__init__()
            self.body = nn.Sequential(
                *_conv(inputs, width, 1),
                nn.ReLU(),
                *_conv(width, width, 3, stride),
                nn.ReLU(),
                *_conv(width, 4 * width, 1),
            )
            same = stride == 1 and inputs == 4 * width
            self.shortcut = nn.Identity() if same else nn.Sequential(*_conv(inputs, 4 * width, 1, stride))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.body(x) + self.shortcut(x))

    def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs)]

    layers = [*_conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for width, blocks, first in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            layers.append(Bottleneck(inputs, width, first if block == 0 else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000)).eval()


JOBS: dict[str, Callable[..., dict[str, float]]] = {
    job.__name__: job for job in (plan_slimline, plan_torch_pruning, quantize)
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        print(json.dumps(JOBS[sys.argv[2]](*sys.argv[3:])))
    else:
        main()
