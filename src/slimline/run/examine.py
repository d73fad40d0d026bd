"""The report of a run: both artifacts measured side by side on their runtime, and what became of every layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from slimline.basics.progress import Progress
from slimline.graph import cost
from slimline.graph.units import Units
from slimline.measure import Memory, file_bytes, latency_part, load, memory_part
from slimline.measure.figures import Figures
from slimline.measure.integers import MOST, Integers, integers
from slimline.measure.limits import Cost, Part, Trial, limits
from slimline.measure.results import Duration, Epoch, Frozen, Refusal, Report, ReportedOutput, environment
from slimline.measure.rows import busy
from slimline.model import Model
from slimline.run.layers import layer_rows, weights
from slimline.run.proof import Proof, prove
from slimline.runtimes.base import runtime

if TYPE_CHECKING:
    from slimline.data import Data
    from slimline.recipe import Recipe
    from slimline.run.directory import Run
    from slimline.steps.base import Tell

_NO_PEAK = "The budget limits memory, and this system does not tell a process's peak: that limit was not judged."


def examine(
    run: Run,
    before: tuple[Model, Path],
    after: tuple[Model, Path],
    data: Data,
    records: Sequence[Mapping[str, Any]],
    tell: Tell | None = None,
    trials: Sequence[Trial] = (),
    conflict: str = "",
) -> Report:
    """Measure two artifacts and certify the second against the first.

    Parameters
    ----------
    before, after : the model and the folder of its artifact.
    records : of the steps in between.
    trials : what was tried in order to choose how strong they are.
    conflict : why the limits of the budget could not all be met, or ''.
    """
    start = monotonic()
    recipe = run.recipe
    served = runtime(str(recipe.target))
    models = {"original": before[0], "compressed": after[0]}
    paths = {name: folder / f"model{served.suffix}" for name, (_, folder) in zip(models, (before, after), strict=True)}

    def told(what: str) -> Callable[[float], None]:
        return lambda part: tell(Progress(what, round(100 * part), 100)) if tell else None

    proof = Proof() if served.elsewhere else prove(run, paths, (before[0], after[0]), data, told)
    refused, float_layers = _refusals(records)
    shares = {} if served.elsewhere else _in_integers(recipe, models, paths, refused, float_layers)
    refused += _short_of_integers(recipe, shares, refused)
    figures = {name: _figures(name, model, paths[name], proof, shares.get(name)) for name, model in models.items()}
    measured_cost = _cost(figures["original"], figures["compressed"], recipe.seed)
    judged = limits(measured_cost, recipe.budget)
    unmet = [limit.sentence() for limit in judged if limit.outcome == "missed"]
    if conflict and proof.certificate is not None and proof.certificate.verdict != "certified":
        unmet.append(conflict)
    return Report(
        schema=1,
        run=run.path.name,
        model=run.created.get("title"),
        created=run.durations.at,
        target=str(recipe.target),
        original=figures["original"],
        compressed=figures["compressed"],
        certificate=proof.certificate,
        parity=proof.parity,
        outputs=tuple(
            ReportedOutput(name=o.name, kind=o.kind, axis=o.axis, labelled=o.labelled) for o in proof.outputs
        ),
        integers=shares.get("compressed"),
        refused=tuple(refused),
        notices=tuple(Refusal(what=str(r.get("step", "the plan")), reason=n) for r in records for n in _notes(r)),
        warnings=tuple(_doubts(recipe, measured_cost, figures, proof)),
        unmet=tuple(unmet),
        limits=judged,
        trials=(*trials, *_undoing(records)),
        frozen=tuple(Frozen(unit=f.name, reason=f.reason) for f in Units(before[0].graph).frozen),
        steps=tuple(_brief(r) for r in records),
        layers=tuple(layer_rows(before[0], after[0], float_layers, shares.get("compressed"))),
        history=tuple(Epoch.model_validate(h) for r in records for h in r.get("history", ())),
        durations=tuple(
            Duration(stage=stage, seconds=seconds)
            for stage, seconds in {**run.durations.seconds, "measurement": round(monotonic() - start, 3)}.items()
        ),
        command=tuple(run.created["command"]) if run.created.get("command") else None,
        recipe=recipe.dump(),
        environment=environment(recipe.threads, run.devices),
    )


def _refusals(records: Sequence[Mapping[str, Any]]) -> tuple[list[Refusal], dict[str, str]]:
    """What the steps refused, and by layer why it computes in float though a step was to change that."""
    refused = [Refusal(what=r["what"], reason=r["reason"]) for record in records for r in record.get("refused", ())]
    float_layers = {k: v for r in records for k, v in r.get("float_layers", {}).items()}
    named = {r.what for r in refused}
    refused += [Refusal(what=layer, reason=why) for layer, why in float_layers.items() if layer not in named]
    return refused, float_layers


def _in_integers(
    recipe: Recipe,
    models: Mapping[str, Model],
    paths: Mapping[str, Path],
    refused: Sequence[Refusal],
    float_layers: Mapping[str, str],
) -> dict[str, Integers]:
    """What of the artifacts runs in integers, by ``original`` and ``compressed``; nothing where no step quantizes."""
    steps = [s.step for s in recipe.steps if s.kind == "quantization"]
    if not steps:
        return {}
    target = str(recipe.target)
    reasons = {**{r.what: r.reason for r in refused}, **float_layers}
    whole = next((reasons[step] for step in steps if step in reasons), None)
    shares = {}
    for name, model in models.items():
        operators = runtime(target).integer_layers(paths[name])
        layers = model.quantization.layers if model.quantization is not None else ()
        every = dict.fromkeys(weights(model), whole) if whole else {}
        if model.quantization is not None and model.quantization.stored:
            short = [name for name in weights(model) if name not in layers]
            every = dict.fromkeys(short, "only its weights are short, and they are turned to floats first")
        shares[name] = integers(model.graph, operators, {**every, **reasons}, layers, target)
    return shares


def _short_of_integers(recipe: Recipe, shares: Mapping[str, Integers], refused: Sequence[Refusal]) -> list[Refusal]:
    """That a step which should compute in integers left much in float, where it did not say so itself."""
    step = next((s.step for s in recipe.steps if s.computes_in_integers), None)
    if not shares or shares["compressed"].macs >= MOST or step is None or step in {r.what for r in refused}:
        return []
    return [Refusal(what=step, reason=f"{shares['compressed'].sentence}, see below")]


def _figures(name: str, model: Model, artifact: Path, proof: Proof, share: Integers | None) -> Figures:
    memory = proof.memory.get(name)
    return Figures(
        accuracy=proof.accuracy.get(name),
        file_bytes=file_bytes(artifact),
        parameters=model.graph.size,
        macs=cost.macs(model.graph),
        peak_memory_bytes=None if memory is None else memory.peak_bytes,
        baseline_memory_bytes=None if memory is None else memory.baseline_bytes,
        latency=proof.latency.get(name, {}),
        integer_macs=None if share is None else share.macs,
    )


def _doubts(recipe: Recipe, measured_cost: Cost, figures: Mapping[str, Figures], proof: Proof) -> list[str]:
    """What weakens the figures, a sentence each."""
    doubts = []
    if recipe.budget.max_memory is not None and measured_cost.memory is None:
        doubts.append(_NO_PEAK)
    if elsewhere := runtime(str(recipe.target)).elsewhere:
        doubts.append(f"Not run here: {recipe.target} artifacts run {elsewhere}; only sizes and counts were measured.")
    waits = [latency.waited for each in figures.values() for latency in each.latency.values()]
    doubts.append(load.busy(proof.others) if None in waits else busy(figures["original"], figures["compressed"]))
    return [doubt for doubt in doubts if doubt]


def _cost(before: Figures, after: Figures, seed: int) -> Cost:
    return Cost(
        latency={batch: latency_part(before.latency[batch], after.latency[batch], seed) for batch in before.latency},
        size=Part.exact(after.file_bytes or 0, before.file_bytes or 0, "B"),
        memory=memory_part(*(Memory(f.peak_memory_bytes, f.baseline_memory_bytes) for f in (before, after))),
        macs=Part.exact(after.macs or 0, before.macs or 0),
    )


def _undoing(records: Sequence[Mapping[str, Any]]) -> list[Trial]:
    """What the quantization steps tried before they put layers back to float, or did not."""
    return [Trial.model_validate(row) for r in records for row in r.get("undoing", {}).get("trials", ())]


def _notes(record: Mapping[str, Any]) -> Sequence[str]:
    return (*dict(record.get("plan", {})).get("notes", ()), *record.get("notes", ()))


def _brief(record: Mapping[str, Any]) -> dict[str, Any]:
    """A step's record without what the report holds elsewhere."""
    brief = {k: v for k, v in record.items() if k not in ("history", "refused")}
    if "undoing" in brief:
        brief["undoing"] = {k: v for k, v in brief["undoing"].items() if k != "trials"}
    return brief
