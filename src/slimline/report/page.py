"""``report.html``: what ``report.json`` says, for people."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup
from pydantic import ValidationError

from slimline.atomic import atomic_write
from slimline.errors import SlimlineError
from slimline.measure.certificate import Certificate
from slimline.measure.latency import speedup
from slimline.measure.parity import Parity
from slimline.measure.results import Figures, Latency, LayerRow
from slimline.report import plots

NOT_MEASURED = "not measured"
_PERCENT = ("accuracy", "agreement")
_ALIKE = ("unchanged", "about the same")
_HERE = Path(__file__).parent


def render(report: Mapping[str, Any], path: Path) -> None:
    """Write the page of `html` to `path`; the file is replaced whole or not at all."""
    atomic_write(path, html(report).encode())


def html(report: Mapping[str, Any]) -> str:
    """One page that needs no network and no script, with the same bytes for the same report.

    Parameters
    ----------
    report : ``report.json`` (schema 1, `slimline.measure.Report`) as a dict. What is None or absent is shown as
        "not measured".

    Raises
    ------
    SlimlineError : it is not such a report.
    """
    if report.get("schema") != 1:
        raise SlimlineError(
            f"This report has schema {report.get('schema')!r}, and only 1 can be shown: run slimline again."
        )
    try:
        view = _view(report)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        said = f"The report cannot be shown, as its {error.title} {where} is wrong: {first['msg']}."
        raise SlimlineError(said) from error
    return _template().render(view) + "\n"


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["css"] = Markup((_HERE / "page.css").read_text(encoding="utf-8"))
    return environment.get_template("page.html")


@dataclass(frozen=True)
class Row:
    """A quantity of both artifacts, worded; `left` is the part of the original that stays, for the bar."""

    name: str
    before: str
    after: str
    change: str
    detail: str = ""
    before_detail: str = ""
    after_detail: str = ""
    left: float | None = None


def _view(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the template shows, as words and plots."""
    original, compressed = (Figures.model_validate(report.get(k) or {}) for k in ("original", "compressed"))
    certificate = Certificate.model_validate(report["certificate"]) if report.get("certificate") else None
    metric = "accuracy" if certificate is None else certificate.metric
    layers = [LayerRow.model_validate(row) for row in report.get("layers") or ()]
    environment = report.get("environment") or {}
    rows = _rows(original, compressed, metric)
    command = report.get("command")
    return {
        "target": report.get("target") or "unknown target",
        "unmet": report.get("unmet") or (),
        "tiles": [row for row in rows if row.change not in (NOT_MEASURED, *_ALIKE) and row.name != "Parameters"],
        "rows": rows,
        "not_measured": NOT_MEASURED,
        "certificate": certificate,
        "scale": None if certificate is None else plots.certificate_scale(certificate, lambda v: _drop(v, metric)),
        "parity": Parity.model_validate(report["parity"]) if report.get("parity") else None,
        "latencies": _latency_plots(original, compressed),
        "layers": _layers(layers),
        "recoveries": _recoveries(report.get("history") or (), metric),
        "activations": _activations(report.get("steps") or ()),
        "refused": report.get("refused") or (),
        "frozen": _frozen(report.get("frozen") or ()),
        "recipe": report.get("recipe"),
        "steps": _yaml(report.get("steps") or ()),
        "command": shlex.join(command) if isinstance(command, list | tuple) else command,
        "environment": [(key.replace("_", " "), _words(key, value)) for key, value in environment.items()],
    }


def _activations(steps: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What activation pruning did to each ReLU."""
    return [row for step in steps for row in (step.get("plan") or {}).get("activations", ())]


def _rows(original: Figures, compressed: Figures, metric: str) -> list[Row]:
    a, b = original.accuracy, compressed.accuracy
    change = NOT_MEASURED if a is None or b is None else _drop(b - a, metric, sign=True)
    rows = [Row(metric.capitalize(), _score(a, metric), _score(b, metric), change)]
    rows.append(_smaller("File", original.file_bytes, compressed.file_bytes, _bytes))
    rows.append(_smaller("Parameters", original.parameters, compressed.parameters, _count, "fewer", "more"))
    rows.append(_smaller("MACs a sample", original.macs, compressed.macs, _count, "fewer", "more"))
    for batch in sorted({*original.latency, *compressed.latency}):
        rows.append(_faster(batch, original.latency.get(batch), compressed.latency.get(batch)))
    peaks = original.peak_memory_bytes, compressed.peak_memory_bytes
    rows.append(_smaller("Peak memory", *peaks, _bytes, "less", "more", "whole process"))
    return rows


def _smaller(
    name: str,
    before: int | None,
    after: int | None,
    say: Callable[[int | None], str],
    down: str = "smaller",
    up: str = "larger",
    detail: str = "",
) -> Row:
    return Row(name, say(before), say(after), _times(before, after, down, up), detail, left=_part(before, after))


def _faster(batch: int, before: Latency | None, after: Latency | None) -> Row:
    name = f"Latency, batch {batch}"
    a, b = (None if v is None else v.median_ms for v in (before, after))
    change = _times(a, b, "faster", "slower")
    if before is not None and after is not None and len(before.samples_ms) == len(after.samples_ms) > 1:
        s = speedup(before, after)
        low, high = (s.low, s.high) if s.ratio >= 1 else (1 / s.high, 1 / s.low)
        change = f"{change} ({100 * s.confidence:g} %: {low:.2f}–{high:.2f})"
    return Row(
        name, _ms(before), _ms(after), change, "median, p10–p90", _range(before), _range(after), left=_part(a, b)
    )


def _latency_plots(original: Figures, compressed: Figures) -> list[tuple[int, Markup]]:
    batches = sorted({*original.latency, *compressed.latency})
    found = [(b, plots.latencies(original.latency.get(b), compressed.latency.get(b))) for b in batches]
    return [(batch, plot) for batch, plot in found if plot]


def _layers(layers: list[LayerRow]) -> list[dict[str, Any]]:
    """Rows of the layer table; bars are percent of the widest layer."""
    widest = max((row.before.width or 0 for row in layers), default=0) or 1
    found = []
    for row in layers:
        after = row.after
        found.append(
            {
                "layer": row.layer,
                "kind": row.kind,
                "before": row.before.width,
                "after": 0 if after is None else after.width,
                "removed": after is None,
                "before_bar": _bar(row.before.width, widest),
                "after_bar": _bar(None if after is None else after.width, widest),
                "parameters": (_count(row.before.parameters), "–" if after is None else _count(after.parameters)),
                "macs": (_count(row.before.macs), "–" if after is None else _count(after.macs)),
                "zeros": f"{after.sparsity:.0%}" if after is not None and (after.sparsity or 0) >= 0.005 else "",
                "precision": row.precision,
                "note": row.note,
            }
        )
    return found


def _bar(width: int | None, widest: int) -> str:
    return f"{100 * (width or 0) / widest:.1f}"


def _recoveries(history: Any, metric: str) -> list[dict[str, Any]]:
    """Plots per recovery; a new one begins where the epochs start again."""
    recoveries: list[list[Mapping[str, Any]]] = []
    for record in history:
        if not recoveries or record["epoch"] <= recoveries[-1][-1]["epoch"]:
            recoveries.append([])
        recoveries[-1].append(record)
    found = []
    for records in recoveries:
        scores = [(r["epoch"], r["score"]) for r in records if r.get("score") is not None]
        losses = [(r["epoch"], r["loss"]) for r in records if r.get("loss") is not None]
        whole = {r["epoch"] for r in records if r.get("pruned", True)}  # others were no choice
        best = max(scores, key=lambda p: (p[0] in whole, p[1], p[0]))[0] if scores else None
        found.append(
            {
                "epochs": records[-1]["epoch"],
                "best": best,
                "score": plots.curve(scores, f"{metric} on the selection split", lambda v: _score(v, metric), best),
                "loss": plots.curve(losses, "training loss", lambda v: f"{v:.3g}", best),
            }
        )
    return found


def _frozen(frozen: Any) -> list[tuple[str, list[str]]]:
    """Units by the reason they share, in the order of their first occurrence."""
    order = {reason: i for i, reason in reversed(list(enumerate(row["reason"] for row in frozen)))}
    rows = sorted(frozen, key=lambda row: order[row["reason"]])
    return [(reason, [row["unit"] for row in same]) for reason, same in groupby(rows, key=lambda row: row["reason"])]


def _yaml(steps: Any) -> str:
    """The steps without the fields that are not set, as a recipe writes them."""
    kept = [{k: v for k, v in step.items() if v is not None} for step in steps]
    text: str = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)
    return text if kept else ""


def _words(key: str, value: Any) -> str:
    if value is None or value in ({}, [], ""):
        return "none" if value is not None else NOT_MEASURED
    if key.endswith("_bytes"):
        return _bytes(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _part(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None or before <= 0 else min(1.0, after / before)


def _times(before: float | None, after: float | None, down: str, up: str) -> str:
    if before is None or after is None or before <= 0 or after <= 0:
        return NOT_MEASURED
    if before == after:
        return _ALIKE[0]
    if abs(before - after) < 0.005 * min(before, after):
        return _ALIKE[1]
    return f"{_three(before / after)}× {down}" if before > after else f"{_three(after / before)}× {up}"


def _score(value: float | None, metric: str) -> str:
    if value is None or not math.isfinite(value):
        return NOT_MEASURED
    return f"{100 * value:.2f} %" if metric in _PERCENT else f"{value:.4g}"


def _drop(value: float, metric: str, sign: bool = False) -> str:
    plus = "+" if sign and value > 0 else ""
    text = f"{100 * value:.2f} points" if metric in _PERCENT else f"{value:.4g}"
    return f"{plus}{text}".replace("-", "−")


def _three(value: float) -> str:
    """To three digits at least; `value` is 1 or more."""
    return f"{value:.{max(0, 2 - int(math.log10(value)))}f}"


def _bytes(value: int | None) -> str:
    if value is None:
        return NOT_MEASURED
    for size, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if value >= size:
            return f"{_three(value / size)} {unit}"
    return f"{value} B"


def _count(value: int | None) -> str:
    if value is None:
        return NOT_MEASURED
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= size:
            return f"{_three(value / size)} {unit}"
    return str(value)


def _ms(latency: Latency | None) -> str:
    return NOT_MEASURED if latency is None else f"{latency.median_ms:.3g} ms"


def _range(latency: Latency | None) -> str:
    return "" if latency is None else f"{latency.p10_ms:.3g}–{latency.p90_ms:.3g}"
