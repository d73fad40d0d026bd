"""What only running both artifacts tells: parity, certificate, accuracy, latency and memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slimline.basics.errors import SlimlineError
from slimline.measure import Memory, ledger, measure_latency, measure_memory, outputs, score, scored
from slimline.measure.certificate import Certificate
from slimline.measure.figures import Latency
from slimline.measure.load import watched
from slimline.measure.parity import Parity
from slimline.methods.outputs import Output, bare
from slimline.model import Model
from slimline.model.equality import answers_alike
from slimline.model.lowering import rounds
from slimline.model.portions import answers
from slimline.runtimes.base import runtime

if TYPE_CHECKING:
    from slimline.data import Data
    from slimline.run.directory import Run

PARITY_ROWS = 256


@dataclasses.dataclass(frozen=True)
class Proof:
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


def prove(
    run: Run,
    paths: Mapping[str, Path],
    models: tuple[Model, Model],
    data: Data,
    told: Callable[[str], Callable[[float], None]],
) -> Proof:
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
    return Proof(gate, meanings, certificate, accuracy, times, memory, others)


def _gate(model: Model, artifact: Path, data: Data, target: str) -> tuple[Parity, tuple[Output, ...]]:
    """Artifact and in-framework model on the same real inputs, and what their outputs mean; a float artifact that
    disagrees is refused."""
    rows = next(data.split("selection" if data.has("selection") else "certification").batches(PARITY_ROWS))[0]
    references = answers(model, lambda part: model.outputs(*part), rows)
    meanings = _meant(model, references, data)
    artifacts = answers(model, runtime(target).load(artifact).outputs, rows)
    parity = answers_alike(model, rows, references, artifacts, rounds(runtime(target), model), meanings)
    if not parity.passed and not parity.integer:
        raise SlimlineError(
            f"The artifact disagrees with the model on {target}: {parity.reason}; report this model to slimline."
        )
    return parity, meanings


def _meant(model: Model, references: Sequence[np.ndarray], data: Data) -> tuple[Output, ...]:
    """What each output means to the certificate; what neither labels nor the user call classes is none under a metric
    of the user's own."""
    outputs = bare(model.output_names, references)
    outputs = data.describe(outputs, model.adapter.layout == "channels_first", "certification")
    own = data.metric is not None
    return tuple(
        dataclasses.replace(o, kind="features") if own and o.assumed and o.kind == "classes" else o for o in outputs
    )
