"""A report as a run leaves it, of any number of layers."""

from __future__ import annotations

import math
from typing import Any


def latency(median: float, n: int = 120) -> dict[str, Any]:
    samples = [median * (1 + 0.04 * math.sin(7.3 * i) + (0.8 if i == 50 else 0.0)) for i in range(n)]
    return {"median_ms": median, "p10_ms": 0.96 * median, "p90_ms": 1.04 * median, "samples_ms": samples}


def layers(count: int) -> list[dict[str, Any]]:
    rows = []
    for i in range(count):
        width = (32, 64, 128, 256)[4 * i // count]
        left = width // 2 if i % 3 else width
        before, after = (
            {"shape": [w, 32, 3, 3], "parameters": w * 288, "macs": w * 200_000, "width": w} for w in (width, left)
        )
        rows.append(
            {
                "layer": f"stages.{i // 4}.{i % 4}.conv{1 + i % 2}",
                "kind": "conv",
                "before": before,
                "after": None if i % 11 == 10 else after,
                "precision": "float" if i % 5 == 0 else "int8",
                "note": "slower as int8, put back to float" if i % 10 == 5 else "",
            }
        )
    return rows


def report(count: int = 14) -> dict[str, Any]:
    return {
        "schema": 1,
        "target": "onnxruntime",
        "original": {
            "accuracy": 0.9431,
            "file_bytes": 2_812_345,
            "parameters": 697_000,
            "macs": 70_123_000,
            "peak_memory_bytes": 91_000_000,
            "latency": {"1": latency(1.52), "32": latency(44.1)},
        },
        "compressed": {
            "accuracy": 0.9389,
            "file_bytes": 221_345,
            "parameters": 176_000,
            "macs": 17_800_000,
            "peak_memory_bytes": 71_000_000,
            "latency": {"1": latency(0.51), "32": latency(11.9)},
        },
        "certificate": {
            "verdict": "certified",
            "metric": "accuracy",
            "observed_drop": 0.0042,
            "bound": 0.0071,
            "lower_bound": 0.0013,
            "max_drop": 0.01,
            "confidence": 0.95,
            "n": 10_000,
            "losses": 171,
            "gains": 129,
            "method": "exact",
        },
        "parity": {
            "passed": True,
            "integer": True,
            "n": 512,
            "max_error": 0.31,
            "relative_error": 0.021,
            "mean_error": 0.008,
            "agreement": 0.998,
        },
        "refused": [{"what": "StaticQuantization of stem", "reason": "its quantized form made batch 32 slower by 3 %"}],
        "frozen": [
            {"unit": "head.out", "reason": "it is an output of the model"},
            {"unit": "lstm.hidden", "reason": "operator aten.lstm of layer lstm has no rule"},
            {"unit": "input.channels", "reason": "it is an input of the model"},
            {"unit": "aux.out", "reason": "it is an output of the model"},
        ],
        "steps": [
            {"step": "ChannelPruning", "ratio": 0.5, "criterion": "l2", "target_macs": None, "round_to": 16},
            {"step": "Distillation", "epochs": 8},
            {"step": "StaticQuantization", "observer": "mse"},
        ],
        "layers": layers(count),
        "history": [
            {
                "epoch": e,
                "loss": None if e == 0 else 1.4 / e + 0.2,
                "score": 0.71 + 0.23 * (1 - 0.5**e),
                "rate": 0.001,
                "seconds": 30.0,
            }
            for e in range(9)
        ],
        "command": ["slimline", "compress", "model.pt2", "--data", "fashion-mnist", "-o", "runs/my run"],
        "environment": {
            "cpu": "Intel(R) Xeon(R)",
            "cpu_flags": ["avx512f", "avx512_vnni"],
            "cores": 2,
            "memory_bytes": 8_000_000_000,
            "python": "3.11.2",
            "packages": {"onnxruntime": "1.23", "torch": "2.13"},
            "threads": 1,
            "settings": {},
        },
    }


PAYLOAD = "\"'><script>document.title='owned'</script><img src=https://example.org/x onerror=alert(1)>{{ 7 * 7 }}"


def hostile(text: str = PAYLOAD) -> dict[str, Any]:
    """The report with `text` in every place that holds free text."""
    full = report()
    full["target"] = full["layers"][0]["layer"] = full["layers"][0]["kind"] = full["layers"][1]["note"] = text
    full["certificate"]["metric"] = full["parity"]["reason"] = text
    full["command"] = full["unmet"] = [text]
    full["recipe"] = full["run"] = full["model"] = full["created"] = text
    full["warnings"] = [text]
    full["notices"] = [{"what": text, "reason": text}]
    full["durations"] = [{"stage": text, "seconds": 1.0}]
    full["steps"] = [{"step": text, text: text}]
    full["refused"] = [{"what": text, "reason": text}]
    full["frozen"] = [{"unit": text, "reason": text}]
    full["environment"] = {text: text, "packages": {text: text}, "flags": [text]}
    return full
