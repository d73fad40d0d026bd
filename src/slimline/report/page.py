"""``report.html``: what ``report.json`` says, for people."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup
from pydantic import BaseModel, ConfigDict

from slimline.basics import text
from slimline.basics.text import count as _count
from slimline.files import json_models
from slimline.files.atomic import atomic_write
from slimline.measure.certificate import Certificate
from slimline.measure.figures import Figures
from slimline.measure.integers import Integers
from slimline.measure.limits import Limit, Part, Trial, judged_batch, written
from slimline.measure.parity import Parity
from slimline.measure.results import Duration, Epoch, Frozen, LayerRow, Refusal, check_schema
from slimline.measure.rows import rows
from slimline.report import plots

_HERE = Path(__file__).parent
_LONGEST = 80  # characters of a name in a heading


class Shown(BaseModel):
    """A report as far as the page shows it: `slimline.measure.Report` in which everything may be missing."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    run: str | None = None
    model: str | None = None
    created: str | None = None
    target: str | None = None
    original: Figures | None = None
    compressed: Figures | None = None
    certificate: Certificate | None = None
    parity: Parity | None = None
    integers: Integers | None = None
    refused: tuple[Refusal, ...] | None = None
    notices: tuple[Refusal, ...] | None = None
    warnings: tuple[str, ...] | None = None
    unmet: tuple[str, ...] | None = None
    limits: tuple[Limit, ...] | None = None
    trials: tuple[Trial, ...] | None = None
    frozen: tuple[Frozen, ...] | None = None
    steps: tuple[dict[str, Any], ...] | None = None
    layers: tuple[LayerRow, ...] | None = None
    history: tuple[Epoch, ...] | None = None
    durations: tuple[Duration, ...] | None = None
    command: tuple[str, ...] | None = None
    recipe: str | None = None
    environment: dict[str, Any] | None = None


class Activation(BaseModel):
    """What activation pruning did to one ReLU: parts of its values that are zero, and of its energy that is gone."""

    value: str
    before: float
    after: float
    threshold: float
    error: float


class _Plan(BaseModel):
    activations: tuple[Activation, ...] = ()


class _Step(BaseModel):
    plan: _Plan | None = None


def render(report: Mapping[str, Any], path: Path) -> None:
    """Write the page of `html` to `path`; the file is replaced whole or not at all."""
    atomic_write(path, html(report).encode())


def html(report: Mapping[str, Any], where: str = "The report") -> str:
    """One page that needs no network and no script, with the same bytes for the same report.

    Parameters
    ----------
    report : ``report.json`` (schema 1, `slimline.measure.Report`) as a dict. What is None or absent is shown as
        "not measured".
    where : names it in messages.

    Raises
    ------
    SlimlineError : it is not such a report.
    """
    try:
        raw = json.dumps(report)
    except (TypeError, ValueError, RecursionError) as error:
        raise json_models.damaged(where, "it is no JSON") from error
    check_schema(json_models.parse(raw, where), where)
    shown = json_models.validate(Shown, raw, where)
    return _template().render(_view(shown, where)) + "\n"


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )
    environment.globals["css"] = Markup((_HERE / "page.css").read_text(encoding="utf-8"))
    return environment.get_template("page.html")


def _visible(value: Any) -> Any:
    return text.visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _view(report: Shown, where: str) -> dict[str, Any]:
    """What the template shows, as words and plots."""
    original, compressed = report.original or Figures(), report.compressed or Figures()
    certificate = report.certificate
    metric = "accuracy" if certificate is None else certificate.metric
    environment = report.environment or {}
    quantities = rows(original, compressed, metric)
    target = report.target or "unknown target"
    return {
        "title": " · ".join(["slimline", *(part for part in (report.model, report.run) if part), target]),
        "run": report.run,
        "heading": f"{_short(report.model or 'A network')} on {_short(target)}",
        "created": _minute(report.created),
        "target": target,
        "unmet": report.unmet or (),
        "limits": report.limits or (),
        "trials": _trials(report.trials or (), metric),
        "warnings": report.warnings or (),
        "tiles": [row for row in quantities if row.changed and row.name != "Parameters"],
        "rows": quantities,
        "not_measured": text.NOT_MEASURED,
        "certificate": certificate,
        "scale": None if certificate is None else plots.certificate_scale(certificate, lambda v: text.drop(v, metric)),
        "parity": report.parity,
        "integers": report.integers,
        "latencies": _latency_plots(original, compressed),
        "layers": _layers(report.layers or ()),
        "recoveries": _recoveries(report.history or (), metric),
        "activations": _activations(report.steps or (), where),
        "refused": report.refused or (),
        "notices": report.notices or (),
        "frozen": _frozen(report.frozen or ()),
        "durations": _durations(report.durations or ()),
        "together": text.seconds(sum(row.seconds for row in report.durations or ())),
        "recipe": report.recipe,
        "steps": _yaml(report.steps or (), where),
        "command": None if report.command is None else shlex.join(report.command),
        "environment": [(key.replace("_", " "), _words(key, value)) for key, value in environment.items()],
    }


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[:_LONGEST]}…"


def _minute(created: str | None) -> str | None:
    """A moment as ISO 8601 writes it, for people: ``2026-11-25 10:51 UTC``."""
    if created is None or not created.endswith("+00:00"):
        return created
    return f"{created[:16].replace('T', ' ')} UTC"


def _durations(durations: Sequence[Duration]) -> list[dict[str, str]]:
    longest = max((row.seconds for row in durations), default=0.0) or 1.0
    return [
        {"stage": row.stage, "time": text.seconds(row.seconds), "bar": f"{100 * row.seconds / longest:.1f}"}
        for row in durations
    ]


_MEASURED = ("Latency", "Size", "Memory", "MACs", "Lost")


def _trials(trials: Sequence[Trial], metric: str) -> dict[str, Any]:
    """The table of what was tried: of what was measured, only what any trial has."""
    rows = [_trial(trial, metric) for trial in trials]
    measured = [name for name in _MEASURED if any(row["costs"][name][0] for row in rows)]
    return {"columns": measured, "rows": [{**row, "costs": [row["costs"][name] for name in measured]} for row in rows]}


def _trial(row: Trial, metric: str) -> dict[str, Any]:
    """A row of that table."""
    layers = row.settings.get("float_layers")
    unchanged = row.settings.get("unchanged_layers")
    if isinstance(unchanged, list):
        what = f"as they were: {', '.join(map(str, unchanged))}" if unchanged else "all of them lighter"
    elif isinstance(layers, list):
        what = f"in float: {', '.join(map(str, layers))}" if layers else "all in integers"
    else:
        what = str(row.settings.get("strength", row.stage))
    latency = row.cost.latency[judged_batch(tuple(row.cost.latency))] if row.cost.latency else None
    seconds = "" if row.seconds is None else f", {text.seconds(row.seconds)}"
    return {
        "what": what,
        "stage": f"{row.stage}{seconds}",
        "costs": {
            "Latency": _cost(latency),
            "Size": _cost(row.cost.size),
            "Memory": _cost(row.cost.memory),
            "MACs": _cost(row.cost.macs),
            "Lost": ("" if row.drop is None else text.drop(row.drop, metric), []),
        },
        "chosen": row.chosen,
        "reason": row.reason,
    }


def _cost(part: Part | None) -> tuple[str, list[str]]:
    """A quantity in parts of the original's, and below it the interval and the amount."""
    if part is None:
        return "", []
    amount = part.amount
    interval = [] if part.confidence is None else [f"{part.low:.3g} to {part.high:.3g}"]
    absolute = [] if amount is None else [written(amount.value, amount.unit)]
    if amount is not None and amount.confidence is not None:
        absolute[0] += f" ({amount.low:.3g} to {amount.high:.3g})"
    return f"{part.value:.3g}", interval + absolute


def _activations(steps: Sequence[Mapping[str, Any]], where: str) -> list[Activation]:
    """What activation pruning did to each ReLU."""
    plans = [json_models.validate(_Step, json.dumps(step), f"{where}, in its steps,").plan for step in steps]
    return [row for plan in plans if plan is not None for row in plan.activations]


def _latency_plots(original: Figures, compressed: Figures) -> list[tuple[int, Markup]]:
    batches = sorted({*original.latency, *compressed.latency})
    per_batch = [(b, plots.latencies(original.latency.get(b), compressed.latency.get(b))) for b in batches]
    return [(batch, plot) for batch, plot in per_batch if plot]


def _layers(layers: Sequence[LayerRow]) -> list[dict[str, Any]]:
    """Rows of the layer table; bars are percent of the widest layer."""
    widest = max((row.before.width or 0 for row in layers), default=0) or 1
    rows = []
    for row in layers:
        after = row.after
        rows.append(
            {
                "layer": row.layer,
                "kind": row.kind,
                "before": row.before.width,
                "after": 0 if after is None else after.width,
                "removed": after is None,
                "before_bar": _bar(row.before.width, widest),
                "after_bar": _bar(None if after is None else after.width, widest),
                "parameters": [_count(row.before.parameters), "–" if after is None else _count(after.parameters)],
                "macs": [_count(row.before.macs), "–" if after is None else _count(after.macs)],
                "zeros": f"{after.sparsity:.0%}" if after is not None and (after.sparsity or 0) >= 0.005 else "",
                "precision": row.precision,
                "note": row.note,
            }
        )
    return rows


def _bar(width: int | None, widest: int) -> str:
    return f"{100 * (width or 0) / widest:.1f}"


def _recoveries(history: Sequence[Epoch], metric: str) -> list[dict[str, Any]]:
    """Plots per recovery; a new one begins where the epochs start again."""
    recoveries: list[list[Epoch]] = []
    for record in history:
        if not recoveries or record.epoch <= recoveries[-1][-1].epoch:
            recoveries.append([])
        recoveries[-1].append(record)
    panels = []
    for records in recoveries:
        scores = [(r.epoch, r.score) for r in records if r.score is not None]
        losses = [(r.epoch, r.loss) for r in records if r.loss is not None]
        whole = {r.epoch for r in records if r.pruned}  # others were no choice
        best = max(scores, key=lambda p: (p[0] in whole, p[1], p[0]))[0] if scores else None
        title = f"{metric} on the selection split"
        panels.append(
            {
                "epochs": records[-1].epoch,
                "best": best,
                "score": plots.curve(scores, title, lambda v: text.score(v, metric), best),
                "loss": plots.curve(losses, "training loss", lambda v: f"{v:.3g}", best),
            }
        )
    return panels


def _frozen(frozen: Sequence[Frozen]) -> list[tuple[str, list[str]]]:
    """Units by the reason they share, in the order of their first occurrence."""
    order = {reason: i for i, reason in reversed(list(enumerate(row.reason for row in frozen)))}
    ordered = sorted(frozen, key=lambda row: order[row.reason])
    return [(reason, [row.unit for row in same]) for reason, same in groupby(ordered, key=lambda row: row.reason)]


def _yaml(steps: Sequence[Mapping[str, Any]], where: str) -> str:
    """The steps without the fields that are not set, as a recipe writes them."""
    stated = [{k: v for k, v in step.items() if v is not None} for step in steps]
    try:
        dumped: str = yaml.safe_dump(stated, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)
    except yaml.YAMLError as error:
        raise json_models.damaged(where, "its steps cannot be written as YAML") from error
    return dumped if stated else ""


def _words(key: str, value: Any) -> str:
    if value is None or value in ({}, [], ""):
        return "none" if value is not None else text.NOT_MEASURED
    if key.endswith("_bytes") and isinstance(value, int):
        return text.bytes_(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
