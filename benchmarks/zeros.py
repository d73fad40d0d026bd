"""What zeros buy: file bytes, plain and compressed, and latency, for sparsities and patterns on every runtime here.

    python benchmarks/zeros.py [--quick]

The networks are untrained: neither bytes nor times depend on accuracy. Every artifact is timed beside the dense one.
The table goes to benchmarks/results/zeros.json and, as what slimline prints when a user asks for sparsity, to
src/slimline/report/zeros.json.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import CACHE, HERE

import slimline as sl
from slimline.measure import environment, measure_latency, speedup

log = logging.getLogger("benchmark")
KINDS: dict[str, dict[str, Any]] = {
    **{f"{100 * a:.0f} % element": {"amount": a} for a in (0.5, 0.8, 0.9, 0.95)},
    "2:4": {"pattern": "2:4"},
    **{f"{100 * a:.0f} % 1x4 blocks": {"amount": a, "pattern": "1x4"} for a in (0.5, 0.8, 0.9, 0.95)},
}


def network(target: str) -> sl.Model:
    """A small residual network in the target's framework."""
    if target == "litert":
        import keras

        from slimline.zoo.keras import residual_cnn

        keras.utils.set_random_seed(0)
        return sl.load(residual_cnn(), np.zeros((2, 28, 28, 1), np.float32))
    import torch

    from slimline.zoo.torch import ResidualCNN

    torch.manual_seed(0)
    return sl.load(ResidualCNN(), np.zeros((2, 1, 28, 28), np.float32))


def rows(target: str, quick: bool) -> list[dict[str, Any]]:
    """The table of one target."""
    model = network(target)
    x = np.random.default_rng(0).normal(size=(32, *model.example[0].shape[1:])).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        paths = {"dense": sl.export(model, target, Path(folder) / "dense")}
        for kind, fields in KINDS.items():
            pruned = sl.apply(model, sl.SparsePruning(scope="local", **fields))
            paths[kind] = sl.export(pruned, target, Path(folder) / "".join(c if c.isalnum() else "-" for c in kind))
        seconds, fewest = (0.1, 5) if quick else (2.0, 40)
        times = measure_latency(paths, (x,), (32,), 1, seconds, fewest)
        measured = []
        for kind, path in paths.items():
            content = path.read_bytes()
            measured.append(
                {
                    "target": target,
                    "kind": kind,
                    "file_bytes": len(content),
                    "gzip_bytes": len(gzip.compress(content, 9, mtime=0)),
                    "batch": 32,
                    "median_ms": times[kind][32].median_ms,
                    "speedup": 1.0 if kind == "dense" else speedup(times["dense"][32], times[kind][32]).ratio,
                }
            )
            log.info("%(target)s %(kind)s: %(file_bytes)d bytes, gzip %(gzip_bytes)d, %(median_ms).2f ms", measured[-1])
    return measured


def markdown(rows_measured: list[dict[str, Any]]) -> str:
    """The table to read."""
    lines = ["# zeros: what they buy\n", "An untrained ResNet, one thread; all artifacts timed in one run.\n"]
    lines += [
        "| runtime | zeros | file, kB | gzip, kB | median ms, batch 32 | times as fast |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows_measured:
        sizes = f"{row['file_bytes'] / 1e3:,.0f} | {row['gzip_bytes'] / 1e3:,.0f}"
        lines.append(f"| {row['target']} | {row['kind']} | {sizes} | {row['median_ms']:.1f} | {row['speedup']:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few timings; the table goes to .cache/quick")
    quick = parser.parse_args().quick
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)8d ms  %(message)s")
    measured = [row for target in ("onnxruntime", "litert") for row in rows(target, quick)]
    text = json.dumps({"environment": environment(1), "rows": measured}, indent=1) + "\n"
    places = [CACHE / "quick"] if quick else [HERE / "results", Path(sl.__file__).parent / "report"]
    for folder in places:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "zeros.json").write_text(text)
    (places[0] / "zeros.md").write_text(markdown(measured))


if __name__ == "__main__":
    main()
