"""Artifacts in numbers, by themselves: outside of any run, and of whatever made them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from slimline.basics import arguments
from slimline.basics.arguments import takes
from slimline.basics.errors import SlimlineError
from slimline.basics.progress import Progress
from slimline.data import Data
from slimline.data.datasets import NAMES
from slimline.data.matching import sample_shape
from slimline.graph.ir import InputSpec
from slimline.measure import file_bytes, ledger, measure_latency, measure_memory, outputs, score
from slimline.measure.certificate import Certificate
from slimline.measure.figures import Figures
from slimline.measure.process import Artifact
from slimline.report.console import telling
from slimline.report.printed import Printed
from slimline.report.tables import Table, figures_table
from slimline.run.sources import DataSource, load_data
from slimline.runtimes.base import runtime, runtime_for

Tell = Callable[[Progress], None]
Specs = Sequence[tuple[str, tuple[int | None, ...], str]]


class Measured(Printed):
    """One artifact in numbers, or two side by side.

    Attributes
    ----------
    figures : by name, ``artifact`` alone or after the ``baseline``; in the order in which they are compared.
    paths, targets : by the same names, where the artifact lies and the runtime that ran it.
    metric : name of the score that `Figures.accuracy` is the mean of.
    certificate : of the artifact against the baseline; None where there is none.
    """

    figures: dict[str, Figures]
    paths: dict[str, str]
    targets: dict[str, str]
    metric: str
    certificate: Certificate | None = None

    def tables(self) -> list[Table]:
        """The figures side by side."""
        names = list(dict.fromkeys(self.targets.values()))
        where = names[0] if len(names) == 1 else ", ".join(f"{target} ({n})" for n, target in self.targets.items())
        return [figures_table(self.figures, self.metric, f"On {where}")]

    def lines(self) -> list[str]:
        """What the certificate says."""
        return [] if self.certificate is None else [self.certificate.sentence()]


def _is_data(name: str, value: Any) -> None:
    if not isinstance(value, Data | DataSource):
        raise SlimlineError(f"{name} is a {type(value).__name__}: give a slimline.Data.")


@takes(
    artifact=arguments.path,
    data=_is_data,
    against=arguments.optional(arguments.path),
    target=arguments.optional(arguments.text),
    batch_sizes=arguments.sizes,
    progress=arguments.progress,
)
def measure(
    artifact: str | Path,
    data: Data | DataSource,
    against: str | Path | None = None,
    *,
    target: str | None = None,
    batch_sizes: Sequence[int] = (1, 32),
    threads: int = 1,
    max_drop: float | None = None,
    progress: Tell | bool | None = None,
) -> Measured:
    """Accuracy, size, latency and memory of an artifact on its runtime, in fresh processes; alone or against another.

    Parameters
    ----------
    artifact : the file or folder that the runtime loads.
    data : has the certification samples; with `against`, each such comparison on the same samples is counted.
    against : the artifact that it is compared with, in interleaved runs; it takes the same inputs.
    target : the runtime that runs both, one of ``slimline targets``; by default the one that loads files of their
        suffix.
    batch_sizes, threads : at which latency is measured, and with which both run.
    max_drop : what the certificate shall bound, in [0, 1]; None only measures the drop.
    progress : as of `compress`.

    Raises
    ------
    SlimlineError : a file that is missing or that the target does not load, artifacts of different inputs, or data that
        does not fit them.
    """
    sizes = tuple(arguments.whole(size, "A batch size", 1, 2**31) for size in batch_sizes)
    if not sizes:
        raise SlimlineError("batch_sizes is empty: give at least one, such as (1, 32).")
    arguments.whole(threads, "threads", 1, 2**16)
    if max_drop is not None and not (isinstance(max_drop, int | float) and 0 <= max_drop <= 1):
        raise SlimlineError(f"max_drop is {max_drop!r}: give a part of one, such as 0.01.")
    files = ({} if against is None else {"baseline": Path(against)}) | {"artifact": Path(artifact)}
    with telling(progress) as tell:
        return measure_files(
            {name: _artifact(path, target) for name, path in files.items()}, data, sizes, threads, max_drop, tell
        )


def _artifact(path: Path, target: str | None) -> Artifact:
    """What lies at `path`, for a runtime that is there and loads such files."""
    loads = runtime_for(path) if target is None else runtime(target)
    if path.suffix != loads.suffix:
        raise SlimlineError(f"{path} is nothing that {loads.name} loads: give an artifact that ends in {loads.suffix}.")
    if not path.exists():
        raise SlimlineError(f"There is no artifact at {path}: check the path.")
    if missing := loads.available():
        raise SlimlineError(missing)
    return Artifact(path, loads.name)


def measure_files(
    artifacts: Mapping[str, Artifact],
    data: Data | DataSource,
    batches: tuple[int, ...] = (1, 32),
    threads: int = 1,
    max_drop: float | None = None,
    progress: Tell | None = None,
) -> Measured:
    """Run artifacts on the certification samples, and time them side by side.

    Parameters
    ----------
    artifacts : one, or a baseline and the artifact compared with it.
    max_drop : what the certificate should bound; None only measures.
    """
    samples = _matching(artifacts, data)
    split, metric = samples.split("certification"), samples.metric
    if len(artifacts) == 2:
        samples.refuse_overlap()

    def told(what: str) -> Callable[[float], None]:
        return lambda part: progress(Progress(what, round(100 * part), 100)) if progress else None

    answers = {
        name: outputs(each, split.inputs, max(batches), threads, told(f"Running {name}"))
        for name, each in artifacts.items()
    }
    reference = next(iter(answers.values()))
    scores = {
        name: score(answer, split.labels, reference=reference, metric=metric, declared=samples.declared)
        for name, answer in answers.items()
    }
    rows = tuple(x[: max(batches)] for x in split.inputs)
    times = measure_latency(artifacts, rows, batches, threads, progress=told("Timing"))
    figures = {}
    for name, each in artifacts.items():
        memory = measure_memory(each, rows, max(batches), threads)
        figures[name] = Figures(
            accuracy=float(scores[name][1].mean()),
            file_bytes=file_bytes(each.path),
            peak_memory_bytes=memory.peak_bytes,
            baseline_memory_bytes=memory.baseline_bytes,
            latency=times[name],
        )
    kind = next(iter(scores.values()))[0]
    paired = [values for _, values in scores.values()]
    certificate = None
    if len(paired) == 2:
        proof = samples.proof()
        first, second = artifacts.values()
        used = ledger.use(proof.keys, first.path, second.path, kind)
        certificate = proof.certify(
            paired[0],
            paired[1],
            max_drop,
            metric=kind,
            score_range=samples.metric_range if metric is not None else "known",
            use=used.number,
            note=used.note,
            progress=told("Resampling"),
        )
    return Measured(
        figures=figures,
        paths={name: str(each.path) for name, each in artifacts.items()},
        targets={name: each.target for name, each in artifacts.items()},
        metric=kind,
        certificate=certificate,
    )


def _matching(artifacts: Mapping[str, Artifact], data: Data | DataSource) -> Data:
    """The data in the layout that the artifacts take."""
    specs = {name: runtime(each.target).input_specs(each.path) for name, each in artifacts.items()}
    first, *others = specs
    for other in others:
        if not _alike(specs[first], specs[other]):
            raise SlimlineError(
                f"The {other} takes inputs of {_shapes(specs[other])} and the {first} of {_shapes(specs[first])}: "
                "compare artifacts of the same inputs."
            )
    taken = specs[first]
    samples = data if isinstance(data, Data) else load_data(data)
    if isinstance(data, DataSource) and data.name in NAMES:
        own = [("", (None, *x.shape[1:]), "") for x in samples.example()]
        samples = samples if _alike(taken, own) else load_data(data, "channels_last")
    return samples.check([InputSpec(name, shape, _dtype(dtype)) for name, shape, dtype in taken])


def _alike(one: Specs, other: Specs) -> bool:
    """Whether one sample fits both: sizes but that of the batch, where both are set."""
    return len(one) == len(other) and all(
        len(a) == len(b) and all(None in (m, n) or m == n for m, n in zip(a[1:], b[1:], strict=True))
        for (_, a, _), (_, b, _) in zip(one, other, strict=True)
    )


def _shapes(specs: Specs) -> str:
    """The shapes of one sample."""
    return " and ".join(sample_shape(InputSpec(*spec)) for spec in specs)


def _dtype(taken: str) -> str:
    """In which an artifact is given its inputs: one of small integers takes floats too."""
    return taken if taken in ("int32", "int64", "bool") else "float32"
