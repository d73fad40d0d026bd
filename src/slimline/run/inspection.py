"""What can be known of a model or an artifact without changing it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from slimline.basics.progress import Progress
from slimline.data import Data
from slimline.data.datasets import NAMES
from slimline.data.splits import Inputs
from slimline.graph.blocks import blocks
from slimline.graph.cost import macs, node_macs
from slimline.graph.kinds import kind
from slimline.graph.placement import place
from slimline.graph.units import Units
from slimline.measure import file_bytes, ledger, measure_latency, measure_memory, outputs, score
from slimline.measure.figures import Figures
from slimline.report.tables import Grid
from slimline.run.sources import DataSource, load_data
from slimline.runtimes.base import runtime, runtime_for

if TYPE_CHECKING:
    from slimline.measure.certificate import Certificate
    from slimline.model import Model


def tables(model: Model) -> list[Grid]:
    """Layers with their cost and whether they can be integer, units that can be pruned, axes that cannot, and why."""
    graph = model.graph
    target = model.usual_target
    placed = place(graph, runtime(target).policy)
    layers = []
    for node in graph.nodes:
        held = [name for name in node.inputs if name in graph.trainable]
        if not held:
            continue
        shapes = [graph.values[name].shape for name in held if name is not None]
        layer = node.layer or node.name
        cost = node_macs(node, lambda name: graph.values[name].shape) // graph.batch
        integer = "yes" if node.layer in placed.layers else placed.refused.get(node.layer, "") if cost else ""
        size = sum(int(np.prod(shape)) for shape in shapes)
        row = (layer, node.target or node.kind, " × ".join(map(str, shapes[0])), f"{size:,}")
        layers.append((*row, f"{cost:,}" if cost else "", integer))
    solved = Units(graph)
    units = [
        (unit.name, kind(solved, unit), str(unit.size), str(unit.frozen or ""), ", ".join(unit.layers))
        for unit in solved.units
    ]
    frozen = [(axis.name, str(axis.size), axis.reason) for axis in solved.frozen]
    return [
        Grid(
            f"{graph.size:,} parameters, {macs(graph):,} MACs per sample; INT8 on {target}",
            ("layer", "operator", "weight", "parameters", "MACs", "INT8"),
            layers,
            ("weight", "parameters", "MACs"),
        ),
        Grid(
            "Can be pruned",
            ("unit", "axis", "positions", "frozen", "layers that shrink together"),
            units,
            ("positions", "frozen"),
        ),
        Grid("Cannot be pruned", ("axis", "size", "reason"), frozen, ("size",)),
        *_branches(model),
    ]


def _branches(model: Model) -> list[Grid]:
    """The residual blocks that depth pruning can leave out, where there are any."""
    graph = model.graph
    rows = [
        (
            block.name,
            f"{sum(math.prod(graph.values[name].shape) for name in block.parameters & graph.trainable):,}",
            ", ".join(block.layers),
        )
        for block in blocks(graph)
    ]
    columns = ("block", "parameters", "layers")
    return [Grid("Can be left out by DepthPruning", columns, rows, ("parameters",))] if rows else []


@dataclass(frozen=True)
class Measured:
    """Figures by name, the name of the score, and the certificate of the second file against the first."""

    figures: dict[str, Figures]
    metric: str
    certificate: Certificate | None


def measure_files(
    files: Mapping[str, Path],
    source: DataSource,
    batches: tuple[int, ...] = (1, 32),
    threads: int = 1,
    max_drop: float | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Measured:
    """Run artifacts on the certification samples, and time them side by side.

    Parameters
    ----------
    files : one artifact, or a baseline and the artifact compared with it.
    max_drop : what the certificate should bound; None only measures.
    """
    data = _matching(next(iter(files.values())), source)
    split, metric = data.split("certification"), data.metric
    if len(files) == 2:
        data.refuse_overlap()

    def told(what: str) -> Callable[[float], None]:
        return lambda part: progress(Progress(what, round(100 * part), 100)) if progress else None

    answers = {
        name: outputs(path, split.inputs, max(batches), threads, told(f"Running {name}"))
        for name, path in files.items()
    }
    reference = next(iter(answers.values()))
    scores = {name: score(answer, split.labels, reference=reference, metric=metric) for name, answer in answers.items()}
    rows = tuple(x[: max(batches)] for x in split.inputs)
    times = measure_latency(files, rows, batches, threads, progress=told("Timing"))
    figures = {}
    for name, path in files.items():
        memory = measure_memory(path, rows, max(batches), threads)
        figures[name] = Figures(
            accuracy=float(scores[name][1].mean()),
            file_bytes=file_bytes(path),
            peak_memory_bytes=memory.peak_bytes,
            baseline_memory_bytes=memory.baseline_bytes,
            latency=times[name],
        )
    kind = next(iter(scores.values()))[0]
    paired = [values for _, values in scores.values()]
    certificate = None
    if len(paired) == 2:
        proof = data.proof()
        first, second = files.values()
        used = ledger.use(proof.keys, first, second, kind)
        certificate = proof.certify(
            paired[0],
            paired[1],
            max_drop,
            metric=kind,
            score_range=data.metric_range if metric is not None else "known",
            use=used.number,
            note=used.note,
        )
    return Measured(figures, kind, certificate)


def _matching(artifact: Path, source: DataSource) -> Data:
    """The data in the layout that the artifact takes."""
    specs = runtime_for(artifact).input_specs(artifact)
    data = load_data(source)
    if len(specs) == 1 and source.name in NAMES and _example(specs, data)[0].shape != data.example()[0].shape:
        data = load_data(source, "channels_last")
    return data.check(_example(specs, data))


def _example(specs: Sequence[tuple[str, tuple[int | None, ...], str]], data: Data) -> Inputs:
    """Zeros of the shapes an artifact takes; sizes it leaves open are the data's. Integer artifacts take floats too."""
    given = data.example()
    if len(given) != len(specs):
        return tuple(np.zeros([size or 1 for size in shape], np.float32) for _, shape, _ in specs)
    found = []
    for (_, shape, dtype), array in zip(specs, given, strict=True):
        open_sizes = array.shape if len(array.shape) == len(shape) else (1,) * len(shape)
        sizes = [len(array), *(size or open_sizes[i] for i, size in enumerate(shape[1:], 1))]
        found.append(np.zeros(sizes, dtype if dtype in ("int32", "int64", "bool") else np.float32))
    return tuple(found)
