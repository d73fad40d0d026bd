"""README's picture, from `results/fashion_torch.json`: accuracy against latency, the area of a dot its file.

python benchmarks/picture.py
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PICTURE = HERE.parent / "docs" / "accuracy-latency.svg"
WIDTH, HEIGHT = 720, 340
LEFT, RIGHT, TOP, BOTTOM = 62, 24, 30, 52
BATCH = 32
SMALLEST, LARGEST = 5.0, 16.0  # radii
LINE, LETTER = 18, 6.9  # of labels, rather more than less
Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#24292f}.quiet{fill:#6e7781;font-size:12px}"
    ".grid{stroke:#d0d7de;stroke-width:1}"
    ".dot{fill:#8c959f;fill-opacity:.75}.own{fill:#0a7f78;fill-opacity:.9}.strong{font-weight:600}"
)


def picture(rows: list[dict[str, Any]]) -> str:
    """The SVG of a benchmark's rows at one batch size: the same rows give the same bytes."""
    rows = sorted((r for r in rows if r["batch"] == BATCH), key=lambda r: -r["accuracy"])
    times, scores = [r["median_ms"] for r in rows], [100 * r["accuracy"] for r in rows]
    first, last = math.log(min(times) / 1.25), math.log(max(times) * 1.25)
    low, high = math.floor(10 * min(scores) - 1) / 10, math.ceil(10 * max(scores) + 1) / 10
    largest = max(r["file_bytes"] for r in rows)

    def x(ms: float) -> float:
        return LEFT + (math.log(ms) - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(percent: float) -> float:
        return HEIGHT - BOTTOM - (percent - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [f"<style>{STYLE}</style>", f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#fff"/>']
    ticks = round((high - low) / 0.1)
    for step in range(ticks + 1):
        at = low + step * 0.1
        parts.append(f'<path class="grid" d="M{LEFT} {y(at):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(_text(LEFT - 8, y(at) + 4, f"{at:.1f} %", "quiet", "end"))
    for at in (10, 15, 20, 30, 40, 60):
        if first <= math.log(at) <= last:
            parts.append(f'<path class="grid" d="M{x(at):.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
            parts.append(_text(x(at), HEIGHT - BOTTOM + 18, f"{at} ms", "quiet", "middle"))
    parts.append(_text(WIDTH - RIGHT, HEIGHT - 12, f"median latency at batch {BATCH}, one thread", "quiet", "end"))
    parts.append(_text(LEFT - 50, 18, "accuracy; the area of a dot is the size of its file", "quiet"))
    radii = [max(SMALLEST, LARGEST * math.sqrt(r["file_bytes"] / largest)) for r in rows]
    dots = [(x(r["median_ms"]), y(100 * r["accuracy"]), radius) for r, radius in zip(rows, radii, strict=True)]
    taken = [(across - radius, down - radius, across + radius, down + radius) for across, down, radius in dots]
    for row, (across, down, radius) in sorted(
        zip(rows, dots, strict=True), key=lambda pair: pair[0]["tool"] != "slimline"
    ):
        own = row["tool"] == "slimline"
        parts.append(f'<circle class="{"own" if own else "dot"}" cx="{across:.1f}" cy="{down:.1f}" r="{radius:.1f}"/>')
        words = f"{row['tool']}: {row['recipe']}"
        box = _free(across, down, radius, LETTER * len(words) * (1.07 if own else 1), taken)
        taken.append(box)
        parts.append(_text(box[0], box[3] - 4, words, "strong" if own else ""))
    title = "Fashion-MNIST, ResNet of 70 M MACs on ONNX Runtime: accuracy against latency"
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">\n'
        f"{body}\n</svg>\n"
    )


def _free(x: float, y: float, radius: float, width: float, taken: list[Box]) -> Box:
    """Where a label beside a dot covers nothing else: to the right, to the left, or above and below, ever farther."""
    for far in range(0, 10 * LINE, LINE // 2):
        for left in (x + radius + 6, x - radius - 6 - width, x - radius):
            for middle in (y - far, y + far):
                box = (left, middle - LINE / 2, left + width, middle + LINE / 2)
                inside = box[0] > LEFT and box[2] < WIDTH - RIGHT and box[1] > TOP and box[3] < HEIGHT - BOTTOM
                if inside and not any(_overlap(box, other) for other in taken):
                    return box
    raise ValueError("there is no room for a label")


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _text(x: float, y: float, words: str, style: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}" text-anchor="{anchor}">{words}</text>'


def main() -> None:
    """Write the picture."""
    rows = json.loads((HERE / "results" / "fashion_torch.json").read_text("utf-8"))["rows"]
    PICTURE.write_text(picture(rows), "utf-8")


if __name__ == "__main__":
    main()
