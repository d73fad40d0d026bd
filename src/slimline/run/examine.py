"""The proof: both artifacts measured side by side on their runtime, and what became of every layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np

from slimline.basics.errors import SlimlineError
from slimline.basics.progress import Progress
from slimline.graph import cost
from slimline.graph.units import Units
from slimline.measure import (
    Memory,
    file_bytes,
    latency_part,
    ledger,
    load,
    measure_latency,
    measure_memory,
    memory_part,
    outputs,
    score,
    scored,
)
from slimline.measure.certificate import Certificate
from slimline.measure.figures import Figures, Latency
from slimline.measure.integers import MOST, Integers, integers, layer_name, stored_weights
from slimline.measure.limits import Cost, Part, Trial, limits
from slimline.measure.load import watched
from slimline.measure.parity import Parity, compare
from slimline.measure.results import (
    Duration,
    Epoch,
    Frozen,
    LayerRow,
    LayerState,
    Refusal,
    Report,
    ReportedOutput,
    environment,
)
from slimline.measure.rows import busy
from slimline.methods.outputs import Output, bare
from slimline.model import Model
from slimline.model.lowering import rounds
from slimline.runtimes.base import runtime

if TYPE_CHECKING:
    from slimline.data import Data
    from slimline.measure.limits import Cost
    from slimline.recipe import Recipe
    from slimline.run.directory import Run
    from slimline.steps.base import Tell

PARITY_ROWS = 256
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
    suffix = runtime(str(recipe.target)).suffix
    paths = {"original": before[1] / f"model{suffix}", "compressed": after[1] / f"model{suffix}"}

    def told(what: str) -> Callable[[float], None]:
        return lambda part: tell(Progress(what, round(100 * part), 100)) if tell else None

    elsewhere = runtime(str(recipe.target)).elsewhere
    proof = _Proof() if elsewhere else _prove(run, paths, (before[0], after[0]), data, told)
    figures = {
        name: Figures(
            accuracy=proof.accuracy.get(name),
            file_bytes=file_bytes(paths[name]),
            parameters=model.graph.size,
            macs=cost.macs(model.graph),
            peak_memory_bytes=proof.memory[name].peak_bytes if name in proof.memory else None,
            baseline_memory_bytes=proof.memory[name].baseline_bytes if name in proof.memory else None,
            latency=proof.latency.get(name, {}),
        )
        for name, (model, _) in (("original", before), ("compressed", after))
    }
    certificate = proof.certificate
    measured_cost = _cost(figures["original"], figures["compressed"], recipe.seed)
    judged = limits(measured_cost, recipe.budget)
    doubts = [_NO_PEAK] if recipe.budget.max_memory is not None and measured_cost.memory is None else []
    if elsewhere:
        doubts.append(f"Not run here: {recipe.target} artifacts run {elsewhere}; only sizes and counts were measured.")
    unmet = [limit.sentence() for limit in judged if limit.outcome == "missed"]
    if conflict and certificate is not None and certificate.verdict != "certified":
        unmet.append(conflict)
    refused = [Refusal(what=r["what"], reason=r["reason"]) for record in records for r in record.get("refused", ())]
    notices = [Refusal(what=str(r.get("step", "the plan")), reason=n) for r in records for n in _notes(r)]
    waits = [latency.waited for each in figures.values() for latency in each.latency.values()]
    doubts.append(load.busy(proof.others) if None in waits else busy(figures["original"], figures["compressed"]))
    float_layers = {k: v for r in records for k, v in r.get("float_layers", {}).items()}
    named = {r.what for r in refused}
    refused += [Refusal(what=layer, reason=why) for layer, why in float_layers.items() if layer not in named]
    reasons = {**{r.what: r.reason for r in refused}, **float_layers}
    shares = {} if elsewhere else _in_integers(recipe, before, after, suffix, reasons)
    for name, share in shares.items():
        figures[name] = figures[name].model_copy(update={"integer_macs": share.macs})
    if shares and shares["compressed"].macs < MOST:
        step = next((s.step for s in recipe.steps if s.computes_in_integers), None)
        if step is not None and step not in named:
            refused.append(Refusal(what=step, reason=f"{shares['compressed'].sentence}, see below"))
    return Report(
        schema=1,
        run=run.path.name,
        model=run.created.get("title"),
        created=run.durations.at,
        target=str(recipe.target),
        original=figures["original"],
        compressed=figures["compressed"],
        certificate=certificate,
        parity=proof.parity,
        outputs=tuple(
            ReportedOutput(name=o.name, kind=o.kind, axis=o.axis, labelled=o.labelled) for o in proof.outputs
        ),
        integers=shares.get("compressed"),
        refused=tuple(refused),
        notices=tuple(notices),
        warnings=tuple(doubt for doubt in doubts if doubt),
        unmet=tuple(unmet),
        limits=judged,
        trials=(*trials, *_undoing(records)),
        frozen=tuple(Frozen(unit=f.name, reason=f.reason) for f in Units(before[0].graph).frozen),
        steps=tuple(_brief(r) for r in records),
        layers=tuple(_layers(before[0], after[0], float_layers, shares.get("compressed"))),
        history=tuple(Epoch.model_validate(h) for r in records for h in r.get("history", ())),
        durations=tuple(
            Duration(stage=stage, seconds=seconds)
            for stage, seconds in {**run.durations.seconds, "measurement": round(monotonic() - start, 3)}.items()
        ),
        command=tuple(run.created["command"]) if run.created.get("command") else None,
        recipe=recipe.dump(),
        environment=environment(recipe.threads, run.devices),
    )


@dataclasses.dataclass(frozen=True)
class _Proof:
    """What only running the artifacts tells; nothing of it where they cannot be run here.

    `accuracy`, `latency` and `memory` are by ``original`` and ``compressed``; `others` is how busy other processes kept
    the machine.
    """

    parity: Parity | None = None
    outputs: tuple[Output, ...] = ()
    certificate: Certificate | None = None
    accuracy: Mapping[str, float] = dataclasses.field(default_factory=dict)
    latency: Mapping[str, dict[int, Latency]] = dataclasses.field(default_factory=dict)
    memory: Mapping[str, Memory] = dataclasses.field(default_factory=dict)
    others: float = 0.0


def _prove(
    run: Run,
    paths: Mapping[str, Path],
    models: tuple[Model, Model],
    data: Data,
    told: Callable[[str], Callable[[float], None]],
) -> _Proof:
    """Run both artifacts on the samples, and time them side by side; `models` are what they were made of."""
    recipe = run.recipe
    gate, meanings = _gate(models[1], paths["compressed"], data, str(recipe.target))
    split = data.split("certification")
    names = models[0].output_names
    needed = scored(names, split.labels, data.metric, data.declared)
    answers = {
        name: outputs(
            path,
            split.inputs,
            max(recipe.batch_sizes),
            recipe.threads,
            told(f"Certifying the {name}"),
            names=names,
            needed=needed,
        )
        for name, path in paths.items()
    }
    kind, scores = "", {}
    for name, answer in answers.items():
        kind, scores[name] = score(
            answer, split.labels, reference=answers["original"], metric=data.metric, declared=data.declared
        )
    samples = data.proof()

    def count() -> dict[str, Any]:
        return dataclasses.asdict(ledger.use(samples.keys, paths["original"], paths["compressed"], kind))

    # What other runs did to the samples is asked once, so that this one ends the same whenever it goes on.
    used = ledger.Use(**run.decide(f"use of the samples by {ledger.digest(paths['compressed'])[:12]}", count))
    certificate = samples.certify(
        scores["original"],
        scores["compressed"],
        recipe.budget.max_drop,
        recipe.budget.confidence,
        metric=kind,
        seed=recipe.seed,
        score_range=data.metric_range if data.metric is not None else "known",
        use=used.number,
        note=used.note,
        progress=told("Resampling"),
    )
    rows = tuple(x[: max(recipe.batch_sizes)] for x in split.inputs)
    times, others = watched(
        lambda: measure_latency(
            paths, rows, recipe.batch_sizes, recipe.threads, seed=recipe.seed, progress=told("Measuring latency")
        )
    )
    memory = {name: measure_memory(path, rows, max(recipe.batch_sizes), recipe.threads) for name, path in paths.items()}
    accuracy = {name: float(each.mean()) for name, each in scores.items()}
    return _Proof(gate, meanings, certificate, accuracy, times, memory, others)


def _in_integers(
    recipe: Recipe, before: tuple[Model, Path], after: tuple[Model, Path], suffix: str, reasons: Mapping[str, str]
) -> dict[str, Integers]:
    """What of both artifacts runs in integers, by ``original`` and ``compressed``; nothing where no step quantizes."""
    steps = [s.step for s in recipe.steps if s.kind == "quantization"]
    if not steps:
        return {}
    target = str(recipe.target)
    whole = next((reasons[step] for step in steps if step in reasons), None)
    shares = {}
    for name, (model, folder) in (("original", before), ("compressed", after)):
        operators = runtime(target).integer_layers(folder / f"model{suffix}")
        layers = model.quantization.layers if model.quantization is not None else ()
        every = dict.fromkeys(_weights(model), whole) if whole else {}
        if model.quantization is not None and model.quantization.stored:
            short = [name for name in _weights(model) if name not in layers]
            every = dict.fromkeys(short, "only its weights are short, and they are turned to floats first")
        shares[name] = integers(model.graph, operators, {**every, **reasons}, layers, target)
    return shares


def _gate(model: Model, artifact: Path, data: Data, target: str) -> tuple[Parity, tuple[Output, ...]]:
    """Artifact and in-framework model on the same real inputs, and what their outputs mean; a float artifact that
    disagrees is refused."""
    rows = next(data.split("selection" if data.has("selection") else "certification").batches(PARITY_ROWS))[0]
    references = model.outputs(*rows)
    meanings = _meant(model, references, data)
    answers = runtime(target).load(artifact).outputs(rows)
    parity = compare(references, answers, integer=rounds(runtime(target), model), known=meanings)
    if not parity.passed and not parity.integer:
        raise SlimlineError(
            f"The artifact disagrees with the model on {target}: {parity.reason}; report this model to slimline."
        )
    return parity, meanings


def _meant(model: Model, answers: Sequence[np.ndarray], data: Data) -> tuple[Output, ...]:
    """What each output means to the certificate; what neither labels nor the user call classes is none under a metric
    of the user's own."""
    outputs = bare(model.output_names, answers)
    outputs = data.describe(outputs, model.adapter.layout == "channels_first", "certification")
    own = data.metric is not None
    return tuple(
        dataclasses.replace(o, kind="features") if own and o.assumed and o.kind == "classes" else o for o in outputs
    )


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


@dataclasses.dataclass
class _Layer:
    kind: str
    shape: tuple[int, ...]
    parameters: int
    macs: int
    width: int
    sparsity: float


def _layers(before: Model, after: Model, notes: Mapping[str, str], share: Integers | None) -> list[LayerRow]:
    """Every layer with weights, before and after; `share` is what the runtime executes, if it was asked."""
    old, new = _weights(before), _weights(after)
    floating = {} if share is None else {each.layer: each.reason for each in share.floating}
    precisions = _precisions(after, floating)
    if after.quantization is not None:
        notes = {**{layer: floating[layer] for layer in after.quantization.layers if layer in floating}, **notes}
    rows = []
    for name, layer in old.items():
        then = new.get(name)
        rows.append(
            LayerRow(
                layer=name,
                kind=layer.kind,
                before=_state(layer),
                after=None if then is None else _state(then),
                precision=precisions.get(name, "float"),
                note=notes.get(name, ""),
            )
        )
    return rows


def _precisions(model: Model, floating: Collection[str]) -> dict[str, str]:
    """By layer what it computes in, or how its weights are stored; layers that are float altogether are left out, and
    so are those on integer grids that the runtime executes in float all the same (`floating`)."""
    quantization, graph = model.quantization, model.graph
    if quantization is None:
        return {}
    layers = [layer for layer in quantization.layers if layer not in floating]
    precisions = dict.fromkeys(layers, "int8")
    for node in graph.nodes if quantization.stored else ():
        for name in stored_weights(node, graph):
            if name in quantization.weights:
                each, layer = quantization.weights[name].describe().partition(",")[0], layer_name(node, graph)
                precisions[layer] = each if layer in layers else precisions.get(layer, f"{each} weights")
    return precisions


def _state(layer: _Layer) -> LayerState:
    fields = {k: v for k, v in dataclasses.asdict(layer).items() if k != "kind"}
    return LayerState(**fields)


def _weights(model: Model) -> dict[str, _Layer]:
    graph, arrays = model.graph, model.parameters()
    layers: dict[str, _Layer] = {}
    for node in graph.nodes:
        held = stored_weights(node, graph)
        macs = cost.node_macs(node, lambda name: graph.values[name].shape) // graph.batch
        if not held or not macs:
            continue
        name = layer_name(node, graph)
        shape = graph.values[held[0]].shape
        out = graph.values[node.outputs[0]].shape
        parameters = sum(int(np.prod(graph.values[h].shape)) for h in held)
        axis = 1 if node.kind == "conv" and node.attributes["equation"].outputs[0][1] != (".",) else -1
        layers[name] = _Layer(node.kind, shape, parameters, macs, out[axis], float(np.mean(arrays[held[0]] == 0)))
    return layers
