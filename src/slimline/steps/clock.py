"""Changes that have to pay: layers that make the artifact no faster are put back as they were.

Everything is decided on real artifacts, loaded and timed by the runtime itself, at the batch size and with the threads
that the run is judged by. An artifact costs seconds, so few are made: the runtime's own profile names the suspects, and
at most three choices among them are timed beside the changed and the unchanged artifact. What the clock said is a
decision (`slimline.steps.base.Context.decide`): a run that goes on does not ask again.
"""

from __future__ import annotations

import hashlib
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict

from slimline.files.decisions import checked
from slimline.measure.limits import Cost, Trial, judged_batch
from slimline.model import Model
from slimline.model.lowering import lower, write
from slimline.runtimes.base import runtime

if TYPE_CHECKING:
    from slimline.measure.figures import Latency
    from slimline.measure.latency import Speedup
    from slimline.recipe.step import Step
    from slimline.steps.base import Context

log = logging.getLogger(__name__)

CLEAR = 0.8  # of its time before that a changed layer may take to be beyond doubt
GAIN = 1.03  # by which going back must speed the artifact up, with the confidence of `speedup`
GROUPS = 4  # of neighbours that are tried where the runtime has no profile
LONGEST_RUN = 0.2  # seconds; where one takes longer at the judged batch, a smaller batch says the same
SECONDS, SAMPLES = 0.5, 9  # of one timing, per artifact
PROFILE_SECONDS = 0.3


@dataclass(frozen=True)
class Terms:
    """What it takes to pay.

    Attributes
    ----------
    goes_back : from the speed-up that some layers' going back gives, whether they do.
    fails : from the speed-up of all that was done, whether it is undone.
    slower : why it was then; formatted with the ``factor`` of time that it takes and the ``target``.
    setting : under which the report lists the layers that are as they were.
    """

    goes_back: Callable[[Speedup], bool]
    fails: Callable[[Speedup], bool]
    slower: str
    setting: str


def clocked(artifacts: Timed, context: Context) -> Clocked:
    """What the clock says of a model's artifacts, asked once for the same shapes and settings."""
    answer = context.decide(
        question(artifacts, context), lambda: by_the_clock(artifacts, artifacts.terms, context.seed)
    )
    return checked(Clocked, answer, f"what the clock said of {artifacts.step.step}")


class Clocked(BaseModel):
    """What the clock said: see `by_the_clock`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    back: tuple[str, ...]
    slower: str
    batch: int
    threads: int
    artifacts: int
    seconds: float
    trials: tuple[Trial, ...]


class Candidates(Protocol):
    """Artifacts of one model with different layers in float, as `by_the_clock` asks for them."""

    target: str
    threads: int
    count: int
    """Artifacts made so far."""

    def layers(self) -> Sequence[str]:
        """That change where all may, in the order of the model."""

    def path(self, back: Sequence[str] | None) -> Path:
        """Of the artifact with these layers as they were; None: with all of them."""

    def batch(self) -> int:
        """At which is timed."""

    def profiles(self) -> tuple[Mapping[str, float], Mapping[str, float]]:
        """Milliseconds by operator of the changed and of the unchanged artifact; empty where the runtime tells none."""

    def times(self, paths: Mapping[str, Path]) -> Mapping[str, Latency]:
        """By artifact, in interleaved rounds."""


class Timed(ABC):
    """The real ones, see `Candidates`.

    Parameters
    ----------
    batches : inputs that are timed and compared with, at least one batch.
    """

    folder: Path
    terms: ClassVar[Terms]

    def __init__(self, model: Model, step: Step, context: Context, batches: list[tuple[np.ndarray, ...]]) -> None:
        self.model, self.step, self.target, self.threads = model, step, context.target, context.threads
        self.judged, self.seed = judged_batch(context.batch_sizes), context.seed
        self.batches = batches
        self.runtime = runtime(context.target)
        self.count = 0
        self._batch = 0
        self._paths: dict[frozenset[str] | None, Path] = {}

    @property
    @abstractmethod
    def settings(self) -> tuple[object, ...]:
        """What of the step decides which layers change."""

    @abstractmethod
    def layers(self) -> Sequence[str]:
        """That change where all may, in the order of the model."""

    @abstractmethod
    def variant(self, back: Sequence[str]) -> Model:
        """With these layers as they were: what the artifact should compute."""

    def path(self, back: Sequence[str] | None) -> Path:
        key = None if back is None else frozenset(back)
        if key not in self._paths:
            path = self.folder / f"trial-{self.count}{self.runtime.suffix}"
            model = self.model if back is None else self.variant(back)
            if back is None:
                lower(self.runtime, model, path, quick=True)
            else:  # how it agrees with its model is what parity asks
                write(self.runtime, model, path)
            self._paths[key] = path
            self.count += 1
        return self._paths[key]

    def rows(self, count: int) -> tuple[np.ndarray, ...]:
        """Calibration samples, repeated where there are fewer."""
        from slimline.measure.process import tile

        few = self.batches[: -(-count // len(self.batches[0][0]))]
        rows = [np.concatenate([x[:count] for x in parts])[:count] for parts in zip(*few, strict=True)]
        return tile(tuple(rows), count)

    def batch(self) -> int:
        if not self._batch:
            session, one = self.runtime.load(self.path(None), self.threads), self.rows(1)
            session.outputs(one)
            start = perf_counter()
            session.outputs(one)
            self._batch = max(1, min(self.judged, int(LONGEST_RUN / max(perf_counter() - start, 1e-6))))
        return self._batch

    def profiles(self) -> tuple[Mapping[str, float], Mapping[str, float]]:
        rows = self.rows(self.batch())
        session = self.runtime.load(self.path(None), self.threads)
        start = perf_counter()
        session.outputs(rows)
        runs = min(30, max(3, math.ceil(PROFILE_SECONDS / (perf_counter() - start))))
        del session  # which would take memory beside those that are profiled
        integer, float_ = (self.runtime.profile(self.path(p), rows, self.threads, runs) for p in ((), None))
        return integer, float_

    def times(self, paths: Mapping[str, Path]) -> Mapping[str, Latency]:
        from slimline.measure import measure_latency

        batch = self.batch()
        latencies = measure_latency(paths, self.rows(batch), (batch,), self.threads, SECONDS, SAMPLES, self.seed)
        return {name: latency[batch] for name, latency in latencies.items()}


def by_the_clock(artifacts: Candidates, terms: Terms, seed: int = 0) -> dict[str, Any]:
    """Which layers are better off as they were: ``back``; or why nothing pays at all: ``slower``, else empty.

    With them all that was tried (``trials``), at which ``batch`` and with how many ``threads``, how many ``artifacts``
    were made for it and the ``seconds`` it took.
    """
    from slimline.measure import latency_part, speedup

    start, count_before = monotonic(), artifacts.count
    layers = artifacts.layers()
    picked = {"integer": (), **choices(layers, *artifacts.profiles())}
    tried: dict[str, tuple[tuple[str, ...], Latency, Latency]] = {}
    best, base = "integer", "integer"
    while picked:
        paths = {"float": artifacts.path(None), **{name: artifacts.path(back) for name, back in picked.items()}}
        times = artifacts.times(paths)
        tried |= {name: (back, times["float"], times[name]) for name, back in picked.items()}
        gains = {n: speedup(times[base], times[n], seed=seed) for n in picked if n != base}
        better = sorted((n for n, gain in gains.items() if terms.goes_back(gain)), key=lambda n: -gains[n].ratio)
        best = better[0] if better else best
        together = {layer for name in better for layer in picked[name]}
        new = len(better) > 1 and len(together) < len(layers) and all(together != set(p) for p, *_ in tried.values())
        # Only groups that were tried apart make more when they are put together, and then that has to be timed too.
        base = best
        picked = {best: tried[best][0], "together": tuple(x for x in layers if x in together)} if new else {}
    back, float_, chosen = tried[best]
    gain = speedup(float_, chosen, seed=seed)
    slower = terms.slower.format(factor=1 / gain.ratio, target=artifacts.target) if terms.fails(gain) else ""
    if back:
        log.info("back to what they were: %s", ", ".join(back))
    batch = artifacts.batch()
    trials = [
        Trial(
            stage="undo",
            settings={terms.setting: list(in_float)},
            cost=Cost(latency={batch: latency_part(before, after, seed)}),
            chosen=name == best and not slower,
            reason=slower if slower else "the fastest" if name == best else "not faster than what was chosen",
        ).model_dump(mode="json")
        for name, (in_float, before, after) in tried.items()
    ]
    return {
        "back": list(back),
        "slower": slower,
        "batch": batch,
        "threads": artifacts.threads,
        "artifacts": artifacts.count - count_before,
        "seconds": round(monotonic() - start, 3),
        "trials": trials,
    }


def choices(
    layers: Sequence[str], integer: Mapping[str, float], float_: Mapping[str, float]
) -> dict[str, tuple[str, ...]]:
    """Layers that may be better off in float, a few choices of them by name; never all.

    From the profiles of the integer and of the float artifact: those that lose, those that do not clearly gain, and
    these together with what lies between them, as conversions on the way cost too. A profile is no proof, but it spares
    the trial of layers that gain without doubt. Without one: the first layer and runs of neighbours, each by itself.
    """
    options: dict[str, tuple[str, ...]] = {}
    spent, before = spent_by(layers, integer), spent_by(layers, float_)
    if not any(spent[x] and before[x] for x in layers):
        others, length = layers[1:], max(1, -(-(len(layers) - 1) // (GROUPS - 1)))
        groups = [layers[:1], *(others[i : i + length] for i in range(0, len(others), length))]
        options = {f"group {number}": tuple(group) for number, group in enumerate(groups, 1)}
    else:
        doubtful = [x for x in layers if spent[x] >= CLEAR * before[x] or not spent[x]]
        inside = set(doubtful)
        for left, middle, right in zip(layers, layers[1:], layers[2:], strict=False):
            inside |= {middle} if left in doubtful and right in doubtful else set()
        options["losing"] = tuple(x for x in doubtful if spent[x] >= before[x] > 0)
        options["doubtful"] = tuple(doubtful)
        options["between"] = tuple(x for x in layers if x in inside)
    distinct = {back: name for name, back in reversed(options.items())}
    return {name: back for back, name in reversed(distinct.items()) if 0 < len(back) < len(layers)}


def question(artifacts: Timed, context: Context) -> str:
    """The name of the clock's decision, by all that it depends on: the same shapes need not be timed again."""
    graph = artifacts.model.graph
    shapes = [(name, graph.values[name].shape) for name in (*graph.inputs, *sorted(graph.trainable))]
    settings = *artifacts.settings, context.target, context.batch_sizes, context.threads
    return f"undo-{hashlib.sha256(repr((shapes, settings)).encode()).hexdigest()[:12]}"


def spent_by(layers: Sequence[str], profile: Mapping[str, float]) -> dict[str, float]:
    """By layer, the milliseconds of the operators that are named after it, whatever the runtime appended."""
    spent = dict.fromkeys(layers, 0.0)
    for name, ms in profile.items():
        owners = [x for x in layers if name.startswith(x) and not name[len(x) : len(x) + 1].isalnum()]
        if owners:  # conv_2 is no part of conv
            spent[max(owners, key=len)] += ms
    return spent
