"""Quantization that has to pay: layers whose integers are slower or wrong go back to float.

What is slower is what `slimline.steps.clock` finds; what is wrong is found by halving, on artifacts that disagree with
their simulation.
"""

from __future__ import annotations

import tempfile
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from slimline.data.splits import first
from slimline.files.decisions import checked
from slimline.methods.gram import Gram
from slimline.methods.outputs import bare
from slimline.methods.search import culprits
from slimline.model import Model
from slimline.model.equality import answers_alike
from slimline.model.portions import answers
from slimline.steps.clock import GAIN, Terms, Timed, clocked
from slimline.steps.quantization.calibration import Ranges, calibrate
from slimline.steps.quantization.preparation import prepared
from slimline.steps.quantization.relus import clipping
from slimline.steps.quantization.step import StaticQuantization

if TYPE_CHECKING:
    from slimline.measure.parity import Parity
    from slimline.recipe.step import Step
    from slimline.steps.base import Context

PARITY_TRIALS = 12  # artifacts made to find layers that are wrong in integers, at most
PARITY_ROWS, PARITY_NUMBERS = 256, 2**22  # rows that are compared: fewer, but at least 32, where they are large
SLOWER = "its integers made the artifact slower"
INTEGERS = Terms(
    lambda gain: gain.low > GAIN,
    lambda gain: gain.high < 1,
    "in integers the artifact takes {factor:.2f} times as long as in float on {target}",
    "float_layers",
)
"""Integers stay but where the clock is against them: they make the artifact smaller too."""


@dataclass(frozen=True)
class Undone:
    """The quantized model (or the float one, where integers do not pay), what went back to float and why, and what it
    cost to find out, ready for JSON; the bits of its weights; how many ReLU6 of the float model are ReLU in it."""

    model: Model
    refused: list[dict[str, str]] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    bits: int = 8
    unclipped: int = 0


def quantize_what_pays(model: Model, step: StaticQuantization, context: Context, gate: bool = True) -> Undone:
    """`model` on calibrated grids where these pay, see `what_pays`."""
    artifacts = StaticArtifacts(model, step, context)
    undone = what_pays(artifacts, step.undo, context, gate)
    return undone if undone.model is model else replace(undone, unclipped=artifacts.unclipped)


def what_pays(artifacts: Artifacts, undo: bool, context: Context, gate: bool = True) -> Undone:
    """The quantized model, with what is slower or wrong in integers put back.

    All of it goes back where integers as a whole are slower than float, or where no choice of layers passes the parity
    gate.

    Parameters
    ----------
    undo : whether anything goes back.
    gate : whether the artifact has to agree with its simulation; False for an estimate, whose weights are not trained.
    """
    if not undo or artifacts.runtime.elsewhere:  # what is slower or wrong shows where artifacts run
        return Undone(artifacts.quantized({}), bits=artifacts.bits)
    model, name = artifacts.model, artifacts.step.step
    with tempfile.TemporaryDirectory(prefix="slimline-undo-") as folder:
        artifacts.folder = Path(folder)
        clock = clocked(artifacts, context)
        record = clock.model_dump(mode="json", exclude={"back", "slower"})
        if clock.slower:
            return Undone(model, [{"what": name, "reason": clock.slower}], record)
        back = dict.fromkeys(clock.back, SLOWER)
        if gate:
            gated = checked(Gated, context.decide("parity", lambda: _agreeing(artifacts, back)), "the parity gate")
            record["parity_artifacts"] = gated.artifacts
            if gated.back is None:
                reason = f"no choice of layers passes the parity gate on {context.target} ({gated.reason})"
                return Undone(model, [{"what": name, "reason": reason}], record)
            wrong = f"in integers the artifact disagreed with its simulation: {gated.reason}"
            back |= dict.fromkeys(gated.back, wrong)
            if gated.back:
                again = context.decide("undo-again", lambda: {"slower": _slower(artifacts, back, context.seed)})
                if slower := checked(Again, again, "what the clock said of integers").slower:
                    return Undone(model, [{"what": name, "reason": slower}], record)
        refused = [{"what": layer, "reason": reason} for layer, reason in back.items()]
        return Undone(artifacts.quantized(back), refused, record, artifacts.bits)


class Gated(BaseModel):
    """What the parity gate said: see `_agreeing`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    back: tuple[str, ...] | None
    reason: str
    artifacts: int


class Again(BaseModel):
    """Why integers do not pay once what is wrong is back in float, or ''."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    slower: str


class WeightBits(BaseModel):
    """Of the weights: what the integer kernels bear on the processor that the run is on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: Literal[7, 8]


class Artifacts(Timed):
    """Those of a step that has some layers compute in integers."""

    terms: ClassVar[Terms] = INTEGERS

    def __init__(self, model: Model, step: Step, context: Context, batches: list[tuple[np.ndarray, ...]]) -> None:
        super().__init__(model, step, context, batches)
        # What the processor bears is decided once, as what a clock says is.
        bits = context.decide("weight-bits", lambda: {"bits": self.runtime.weight_bits})
        self.bits = checked(WeightBits, bits, "the bits of weights").bits
        self._simulations: dict[frozenset[str], Model] = {}

    @abstractmethod
    def quantized(self, back: Mapping[str, str]) -> Model:
        """With these layers in float; they and the reasons are in its history."""

    def variant(self, back: Sequence[str]) -> Model:
        key = frozenset(back)
        if key not in self._simulations:
            self._simulations[key] = self.quantized(dict.fromkeys(sorted(key), ""))
        return self._simulations[key]

    def layers(self) -> Sequence[str]:
        quantization = self.variant(()).quantization
        return quantization.layers if quantization is not None else ()

    def parity(self, back: Sequence[str]) -> Parity:
        numbers, held = sum(x[0].size for x in self.batches[0]), sum(len(batch[0]) for batch in self.batches)
        rows = self.rows(min(held, max(32, min(PARITY_ROWS, PARITY_NUMBERS // max(numbers, 1)))))
        session = self.runtime.load(self.path(back), self.threads)
        simulation = self.variant(back)
        references = answers(simulation, lambda part: simulation.outputs(*part), rows)
        known = bare(simulation.output_names, references)
        return answers_alike(simulation, rows, references, answers(simulation, session.outputs, rows), True, known)


class StaticArtifacts(Artifacts):
    """Those of `StaticQuantization`."""

    def __init__(self, model: Model, step: StaticQuantization, context: Context) -> None:
        assert context.data is not None
        super().__init__(model, step, context, first(context.data.split("calibration"), step.samples, step.batch_size))
        self._static = step
        self._even = prepared(model, step, self.batches)
        self.unclipped = clipping(model.graph) - clipping(self._even.graph)
        self._ranges: Ranges = {}
        self._grams: dict[str, Gram] = {}

    @property
    def settings(self) -> tuple[object, ...]:
        step = self._static
        own = [(pattern, own.weights) for pattern, own in step.overrides.items()]
        return step.layers, step.keep, step.activations, step.weights, step.first_layers, step.last_layers, own

    def quantized(self, back: Mapping[str, str]) -> Model:
        known = self._ranges, self.bits, self._grams
        return calibrate(self._even, self._static, self.batches, self.target, back, *known)


def _agreeing(artifacts: Artifacts, back: Mapping[str, str]) -> dict[str, Any]:
    """Layers to put back besides `back` so that artifact and simulation agree (None: there are none), and why."""
    count_before = artifacts.count
    parity = artifacts.parity(tuple(back))
    more: tuple[str, ...] | None = ()
    if not parity.passed:
        pool = [layer for layer in artifacts.layers() if layer not in back]
        more = culprits(pool, lambda without: artifacts.parity((*back, *without)).passed, PARITY_TRIALS)
        more = None if len(more) == len(pool) else more
    return {
        "back": None if more is None else list(more),
        "reason": parity.reason,
        "artifacts": artifacts.count - count_before,
    }


def _slower(artifacts: Artifacts, back: Mapping[str, str], seed: int) -> str:
    """Why integers do not pay with these layers in float, or ''."""
    from slimline.measure import speedup

    times = artifacts.times({"float": artifacts.path(None), "integer": artifacts.path(tuple(back))})
    gain = speedup(times["float"], times["integer"], seed=seed)
    return INTEGERS.slower.format(factor=1 / gain.ratio, target=artifacts.target) if INTEGERS.fails(gain) else ""
