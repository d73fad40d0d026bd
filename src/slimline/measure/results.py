"""``report.json``: what a run found, in a versioned, stable form; and the machine it was found on."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from markupsafe import Markup
from pydantic import BaseModel, ConfigDict, Field

from slimline.basics.errors import SlimlineError
from slimline.basics.plugins import installed
from slimline.basics.text import ascii_only, visible
from slimline.files import json_models
from slimline.frameworks.base import frameworks
from slimline.measure.certificate import Certificate
from slimline.measure.figures import Count, Figures, Latency
from slimline.measure.integers import Integers
from slimline.measure.limits import Limit, Trial
from slimline.measure.parity import Parity
from slimline.measure.rows import lines, rows
from slimline.runtimes.base import names, runtime

__all__ = [
    "Duration",
    "Epoch",
    "Figures",
    "Frozen",
    "Latency",
    "LayerRow",
    "LayerState",
    "Refusal",
    "Report",
    "environment",
]

SCHEMA = 1
NOT_CERTIFIED = "no certificate: the artifact is not run here, so accuracy and latency were not measured"


class LayerState(BaseModel):
    """One layer: shape of its weight, parameters, multiply-accumulates for one sample, output channels, and the part of
    its weight that is zero."""

    model_config = ConfigDict(frozen=True, extra="allow")

    shape: tuple[int, ...] | None = None
    parameters: Count | None = None
    macs: Count | None = None
    width: Count | None = None
    sparsity: Annotated[float, Field(ge=0, le=1)] | None = None


class LayerRow(BaseModel):
    """One layer before and after; `after` is None if it was removed.

    Attributes
    ----------
    parts : names of the layers that it became, if it became others: `after` is then of all of them together, but for
        its shape and width, which are the last one's.
    precision : what it computes in, ``float`` or ``int8``, or how its weights alone are stored: ``int4 weights``.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    layer: str
    kind: str
    before: LayerState
    after: LayerState | None
    parts: tuple[str, ...] = ()
    precision: str = "float"
    note: str = ""


class ReportedOutput(BaseModel):
    """An output of the model, and what it means to scores and losses (`slimline.methods.outputs`)."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str
    kind: str | None = None
    axis: int | None = None
    labelled: bool = False


class Refusal(BaseModel):
    """A step, layer or wish, and why it was refused or undone; or what there is to know of it."""

    model_config = ConfigDict(frozen=True, extra="allow")

    what: str
    reason: str


class Frozen(BaseModel):
    """A unit that could not be pruned, and why."""

    model_config = ConfigDict(frozen=True, extra="allow")

    unit: str
    reason: str


class Epoch(BaseModel):
    """One epoch of a recovery: mean training loss (None before the first), score on the selection split, and whether
    all that goes was gone by then. The epochs of a further recovery begin at 0 again."""

    model_config = ConfigDict(frozen=True, extra="allow")

    epoch: Count
    loss: float | None = None
    score: float | None = None
    pruned: bool = True


class Duration(BaseModel):
    """Seconds that a stage of the run took, without what was lost with a process that was killed."""

    model_config = ConfigDict(frozen=True, extra="allow")

    stage: str
    seconds: Annotated[float, Field(ge=0)]


class Report(BaseModel):
    """The whole of ``report.json``, schema 1. Fields may be added, never renamed; unknown ones are kept.

    Attributes
    ----------
    run, model, created : name of the run directory, what was compressed, and when the run was started (ISO 8601, UTC);
        None in a report that an earlier version wrote.
    outputs : of the model, in their order, and what they mean.
    refused : what was refused or undone.
    notices : what else there is to know of a step.
    warnings : reasons to doubt a figure, such as a machine that was busy.
    integers : what of the compressed artifact runs in integers, and why not more; None where no step quantizes.
    unmet : limits of the budget that were missed, in words.
    limits : what became of every limit on latency, size, memory and MACs; `unit` of one tells whether it is absolute.
    trials : all that was tried in order to decide.
    files : SHA-256 of every file that the report speaks of, by its path in the run.
    durations : by stage, in the order in which they were done.
    """

    model_config = ConfigDict(frozen=True, extra="allow", populate_by_name=True, serialize_by_alias=True)

    version: Literal[1] = Field(1, alias="schema")
    run: str | None = None
    model: str | None = None
    created: str | None = None
    target: str
    original: Figures
    compressed: Figures
    certificate: Certificate | None
    parity: Parity | None
    outputs: tuple[ReportedOutput, ...] = ()
    integers: Integers | None = None
    refused: tuple[Refusal, ...] = ()
    notices: tuple[Refusal, ...] = ()
    warnings: tuple[str, ...] = ()
    unmet: tuple[str, ...] = ()
    limits: tuple[Limit, ...] = ()
    trials: tuple[Trial, ...] = ()
    frozen: tuple[Frozen, ...] = ()
    steps: tuple[dict[str, Any], ...] = ()
    layers: tuple[LayerRow, ...] = ()
    history: tuple[Epoch, ...] = ()
    durations: tuple[Duration, ...] = ()
    command: tuple[str, ...] | None = None
    recipe: str = ""
    environment: dict[str, Any] = {}
    files: dict[str, str] = {}

    def to_json(self) -> str:
        """The file's text; NaN never occurs in it."""
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "The report") -> Report:
        """What `to_json` wrote; `where` names it in messages.

        Raises
        ------
        SlimlineError : it is not that, or of another schema than 1.
        """
        check_schema(json_models.parse(text, where), where)
        return json_models.validate(cls, text, where)

    @property
    def metric(self) -> str:
        """Name of the score that `Figures.accuracy` is the mean of."""
        return "accuracy" if self.certificate is None else self.certificate.metric

    @property
    def verdict(self) -> str:
        """What is proved of the accuracy lost, or that nothing is."""
        return NOT_CERTIFIED if self.certificate is None else self.certificate.sentence()

    def __str__(self) -> str:
        """The table, what the certificate says, and what else one has to know, in ASCII as far as names are."""
        named = [name for name in (self.model, self.run and f"run {self.run}", self.target) if name]
        paragraphs = [visible(", ".join(named)), ""]
        paragraphs += [line.rstrip() for line in lines(self.original, self.compressed, self.metric)]
        paragraphs += ["", self.verdict]
        if self.integers is not None and self.integers.floating:
            paragraphs.append(f"Of the artifact, {self.integers.sentence}: see report.html.")
        paragraphs += [f"Over budget: {limit}." for limit in self.unmet]
        paragraphs += [f"{limit.sentence()}." for limit in self.limits if limit.outcome == "unclear"]
        paragraphs += [f"Within budget: {limit.sentence()}." for limit in self.limits if limit.outcome == "met"]
        paragraphs += [f"Warning: {warning}" for warning in self.warnings]
        for number, what in ((len(self.refused), "refused or undone"), (len(self.notices), "to know")):
            if number:
                paragraphs.append(f"{number} {'thing' if number == 1 else 'things'} {what}: see report.html.")
        return ascii_only(visible("\n".join(paragraphs)))

    def __repr__(self) -> str:
        return f"<Report on {visible(self.target)}: {visible(self.verdict)}>"

    def _repr_html_(self) -> str:
        """The same in a notebook."""
        figures = rows(self.original, self.compressed, self.metric)
        cells = [(row.name, row.before, row.after, row.change) for row in figures]
        body = Markup("").join(
            Markup("<tr><th>{}</th><td>{}</td><td>{}</td><td>{}</td></tr>").format(*map(visible, row)) for row in cells
        )
        head = Markup("<tr><th></th><th>original</th><th>compressed</th><th>change</th></tr>")
        judged = [limit.sentence() for limit in self.limits if limit.outcome != "missed"]
        sentences = [self.verdict, *self.unmet, *judged, *self.warnings]
        notes = Markup("").join(Markup("<p>{}</p>").format(visible(s)) for s in sentences)
        return f"<table>{head}{body}</table>{notes}"


def check_schema(loaded: Any, where: str) -> None:
    """Refuse what says it is no report of this schema, before its fields are looked at."""
    if not isinstance(loaded, dict):
        raise json_models.damaged(where, f"it holds {type(loaded).__name__}, not an object")
    schema = loaded.get("schema")
    if type(schema) is not int:
        raise json_models.damaged(where, "it does not say which schema it has")
    if schema != SCHEMA:
        newer = "update slimline, or run the compression again" if schema > SCHEMA else "run the compression again"
        raise SlimlineError(f"{where} has schema {schema}, and this slimline reads schema {SCHEMA}: {newer}.")


# fmt: off
_BESIDE = ("ai-edge-quantizer", "pydantic", "scikit-learn")
_FLAGS = (
    "avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_int8",
    "amx_bf16", "asimddp", "i8mm", "sve",
)

_SETTINGS = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENBLAS_CORETYPE", "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_MAX_CPU_ISA", "KERAS_BACKEND", "TF_ENABLE_ONEDNN_OPTS", "LD_PRELOAD", "MALLOC_ARENA_MAX",
)
# fmt: on


def environment(threads: int = 1, devices: Sequence[str] = ()) -> dict[str, Any]:
    """The machine and the software, as far as they decide what was measured.

    Keys: ``cpu``, ``cpu_flags`` (those that decide which kernels run), ``cores`` (that this process may use),
    ``memory_bytes``, ``system``, ``python``, ``packages`` (versions of those installed), ``threads`` (of the runtimes),
    ``settings`` (environment variables that change kernels or threads), ``devices`` (on which a run trained and
    calibrated, where there was one), ``slimline``.
    """
    import psutil

    model, flags = _cpu()
    packages = installed((*deciding(), *_BESIDE))
    return {
        "cpu": model,
        "cpu_flags": [f for f in _FLAGS if f in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": packages,
        "threads": threads,
        "settings": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
        **({"devices": list(devices)} if devices else {}),
        "slimline": packages.get("slimline"),
    }


def deciding() -> tuple[str, ...]:
    """The packages whose versions decide what is computed: slimline's own, every framework's and every target's."""
    own = ("slimline", "numpy", "scipy", "safetensors")
    theirs = [*(f.packages for f in frameworks().values()), *(runtime(name).packages for name in names())]
    return tuple(dict.fromkeys((*own, *(package for packages in theirs for package in packages))))


def _cpu() -> tuple[str, frozenset[str]]:
    """The processor's name, and its flags where the system tells them."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine(), frozenset()
    pairs = [line.split(":", 1) for line in info.read_text().splitlines() if ":" in line]
    facts = {key.strip(): value.strip() for key, value in reversed(pairs)}
    flags = frozenset((facts.get("flags") or facts.get("Features") or "").split())
    return facts.get("model name", platform.machine()), flags
