"""Plots as inline SVG: text out of numbers, coloured by the page's style sheet, equal bytes for equal input.

Every function gives one ``<svg>`` that scales with its column. The view box is narrow (360 units), so that
its text stays readable on a telephone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from markupsafe import Markup, escape

from slimline.basics.text import PERCENT, visible
from slimline.measure.certificate import Certificate
from slimline.measure.figures import Latency

WIDTH = 360
MARGIN = 10
MOST_DOTS = 600
_LETTER = 6.0  # of a tick's words, in units of the view box, and rather more than less
_LEAST = 1e-290  # a difference from which logarithms and quotients are safe


def certificate_scale(certificate: Certificate, say: Callable[[float], str]) -> Markup:
    """The drop observed, the interval it may truly lie in, and the budget, on one line, with a key below it.

    `say` words an amount of drop, such as ``0.42 points``.
    """
    c = certificate
    marks = [0.0, c.observed_drop, c.bound, c.lower_bound, *([] if c.max_drop is None else [c.max_drop])]
    if not all(map(math.isfinite, marks)):
        return Markup("")
    x = _Scale(min(marks), max(marks), MARGIN, WIDTH - MARGIN, pad=0.06)
    line, below = 34, 78
    parts: list[str] = []
    if c.max_drop is not None:
        parts.append(_box("within", MARGIN, line - 12, x(c.max_drop) - MARGIN, 24))
    parts.append(_path("interval", f"M{_n(x(c.lower_bound))} {line}H{_n(x(c.bound))}"))
    parts.append(_path("bound", f"M{_n(x(c.bound))} {line - 24}V{line + 12}"))
    if c.max_drop is not None:
        parts.append(_path("budget", f"M{_n(x(c.max_drop))} {line - 12}V{line + 22}"))
    at = _n(x(c.observed_drop))
    parts += [_path("leader", f"M{at} {line - 16}V{line}"), f'<circle class="observed" cx="{at}" cy="{line}" r="5"/>']
    percent = c.metric in PERCENT
    parts += _axis(x, line + 22, "points" if percent else "", 100 if percent else 1)
    key = [
        (f'<circle class="observed" cx="{MARGIN + 6}" cy="{{y}}" r="5"/>', f"observed {say(c.observed_drop)}", ""),
        (_path("bound key", f"M{MARGIN + 6} {{top}}v14"), f"at most {say(c.bound)}", " strong"),
    ]
    if c.max_drop is not None:
        key.append((_path("budget key", f"M{MARGIN + 6} {{top}}v14"), f"budget {say(c.max_drop)}", ""))
    for number, (sign, words, strong) in enumerate(key):
        y = below + 12 + 18 * number
        parts.append(sign.format(y=y, top=y - 7))
        parts.append(_text(MARGIN + 20, y + 4, words, f"label{strong}"))
    return _svg(parts, below + 18 * len(key) + 6, f"drop {', '.join(words for _, words, _ in key)}")


def latencies(original: Latency | None, compressed: Latency | None) -> Markup:
    """Every sample of both artifacts at one batch size as a dot, with the median and the p10 to p90 range.

    Milliseconds from zero. The axis ends a little after the 98th percentile of the slower one; samples beyond
    it are drawn at its end and counted.
    """
    rows = [(n, v) for n, v in (("original", original), ("compressed", compressed)) if v is not None and v.samples_ms]
    if not rows:
        return Markup("")
    end = max(max(_quantile(v.samples_ms, 0.98), v.p90_ms) for _, v in rows) * 1.05
    x = _Scale(0.0, end, MARGIN, WIDTH - MARGIN)
    parts: list[str] = []
    y, beyond = 0, 0
    for name, latency in rows:
        late = sum(s > end for s in latency.samples_ms)
        beyond += late
        text = f"{latency.median_ms:.3g} ms ({latency.p10_ms:.3g}–{latency.p90_ms:.3g})"
        parts.append(_text(MARGIN, y + 14, name, "label"))
        parts.append(_text(WIDTH - MARGIN, y + 14, text, "label strong", "end"))
        left, right = x(latency.p10_ms), x(latency.p90_ms)
        parts.append(_box(f"range {name}", left, y + 22, max(1.0, right - left), 22))
        parts.append(_path(f"dots {name}", _dots(latency.samples_ms, x, y + 25, 16)))
        parts.append(_path(f"median {name}", f"M{_n(x(latency.median_ms))} {y + 20}v26"))
        y += 54
    parts += _axis(x, y, "ms a batch")
    height = y + 20
    if beyond:
        phrase = "1 sample lies" if beyond == 1 else f"{beyond} samples lie"
        parts.append(_text(MARGIN, y + 32, f"{phrase} beyond the end of the axis", "tick"))
        height += 14
    spoken = "; ".join(f"{name} median {v.median_ms:.3g} ms" for name, v in rows)
    return _svg(parts, height, f"latency samples, {spoken}")


def curve(
    points: Sequence[tuple[int, float]], title: str, say: Callable[[float], str], mark: int | None = None
) -> Markup:
    """A line through ``(epoch, value)`` points, the epoch `mark` made prominent; empty without points."""
    points = [(e, v) for e, v in points if math.isfinite(v)]
    if not points:
        return Markup("")
    low, high = min(v for _, v in points), max(v for _, v in points)
    x = _Scale(points[0][0], max(points[-1][0], points[0][0] + 1), 52, WIDTH - MARGIN)
    y = _Scale(low, high, 128, 30, pad=0.08)
    parts = [_text(MARGIN, 12, title, "label strong")]
    for value in _ticks(low, high, 4):
        parts.append(_path("grid", f"M52 {_n(y(value))}H{WIDTH - MARGIN}"))
        parts.append(_text(46, y(value) + 4, say(value), "tick", "end"))
    parts.append(_path("line", "M" + "L".join(f"{_n(x(e))} {_n(y(v))}" for e, v in points)))
    for epoch, value in points:
        kind = "point best" if epoch == mark else "point"
        spoken = f"epoch {epoch}: {say(value)}"
        parts.append(
            f'<circle class="{kind}" cx="{_n(x(epoch))}" cy="{_n(y(value))}" r="{4 if epoch == mark else 2.5}">'
            f"<title>{escape(spoken)}</title></circle>"
        )
    every = max(1, math.ceil(len(points) / 10))
    parts += [_text(x(e), 146, str(e), "tick", "middle") for e, _ in points[::every]]
    parts.append(_text((52 + WIDTH - MARGIN) / 2, 162, "epoch", "tick", "middle"))
    return _svg(parts, 168, f"{title} by epoch")


class _Scale:
    """A linear map from values to positions; `pad` widens the range of values by this part on both sides."""

    def __init__(self, low: float, high: float, start: float, stop: float, pad: float = 0.0) -> None:
        spread = (high - low) or abs(high) or 1.0
        self.low = low - pad * spread
        self.high = (high if high > low else low + spread) + pad * spread
        self._start, self._stop = start, stop

    def __call__(self, value: float) -> float:
        return self._start + (value - self.low) / (self.high - self.low) * (self._stop - self._start)


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) in ``[low, high]``, about `most` of them."""
    raw = (high - low) / most
    if not _LEAST < raw < math.inf or raw < 1e-12 * max(abs(low), abs(high)):
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def _axis(x: _Scale, y: float, unit: str = "", factor: float = 1) -> list[str]:
    """A line with ticks, worded as `factor` times their value; the first word has the unit. Words keep apart."""
    parts = [_path("axis", f"M{MARGIN} {_n(y)}H{WIDTH - MARGIN}")]
    end = -math.inf
    for value in _ticks(x.low, x.high, 4):
        at = x(value)
        words = f"{factor * value + 0.0:.6g}".replace("-", "−")
        if unit and end < 0:
            words = f"{words} {unit}"
        half = len(words) * _LETTER / 2
        middle = min(max(at, half), WIDTH - half)
        parts.append(_path("axis", f"M{_n(at)} {_n(y)}v4"))
        if middle - half > end + _LETTER:
            parts.append(_text(middle, y + 16, words, "tick", "middle"))
            end = middle + half
    return parts


def _dots(samples: Sequence[float], x: _Scale, top: float, height: float) -> str:
    """Dots as strokes of no length; their height is a low-discrepancy sequence, so that near ones do not cover."""
    every = math.ceil(len(samples) / MOST_DOTS)
    golden = (math.sqrt(5) - 1) / 2
    return "".join(
        f"M{_n(x(min(s, x.high)))} {_n(top + height * (i * golden % 1))}h0" for i, s in enumerate(samples[::every])
    )


def _quantile(values: Iterable[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(q * len(ordered)) - 1)]


def _svg(parts: Iterable[str], height: float, name: str) -> Markup:
    body, spoken = "".join(parts), escape(visible(name))
    return Markup(f'<svg viewBox="0 0 {WIDTH} {_n(height)}" role="img" aria-label="{spoken}">{body}</svg>')


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}">{escape(visible(text))}</text>'


def _path(kind: str, d: str) -> str:
    return f'<path class="{kind}" d="{d}"/>'


def _box(kind: str, x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="{kind}" x="{_n(x)}" y="{_n(y)}" width="{_n(max(0.0, width))}" height="{_n(height)}"/>'


def _n(value: float) -> str:
    """A coordinate to a tenth of a unit."""
    return f"{value:.1f}".removesuffix(".0")
