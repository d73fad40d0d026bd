"""To which multiple widths are rounded: chosen by timing layers like the model's own on the runtime that will serve it.

Kernels work in blocks of channels, and a width that does not fill them can be slower than a wider one. So the heaviest
layers are timed at widths near those that pruning leaves, each a multiple of 1, 2, 4 … 32 and of no more, and the
smallest multiple wins that takes hardly longer per multiply-accumulate than the best. A multiple so large that the
layers would keep their widths is left out.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from slimline.basics.errors import SlimlineError
from slimline.graph.cost import node_macs
from slimline.graph.ir import Graph
from slimline.graph.matrix import LayerMatrix, matrices
from slimline.graph.units import Units
from slimline.methods.structured import around, round_width, smallest_good
from slimline.runtimes.base import Layer, runtime

if TYPE_CHECKING:
    from slimline.steps.channels.step import ChannelPruning

MULTIPLES = (1, 2, 4, 8, 16, 32)
LAYERS = 2
TOLERANCE = 0.1  # of the best time per multiply-accumulate, that a smaller multiple may take longer
WORK = 3e7  # multiply-accumulates of one run, about: enough for a clock
SECONDS, ROUNDS = 1.5, 30

Decide = Callable[[str, Callable[[], dict[str, Any]]], dict[str, Any]]
Timer = Callable[[str, tuple[Layer, ...]], Sequence[float]]
"""Seconds per sample of each layer's `Runtime.sample` on a target."""


@dataclass(frozen=True)
class Rounding:
    """The multiple that was chosen, and why.

    Attributes
    ----------
    multiple : to which widths are rounded.
    target : the runtime that was timed.
    picoseconds : per layer and multiple the time of one multiply-accumulate.
    """

    multiple: int
    target: str
    picoseconds: Mapping[str, Mapping[int, float]]

    def record(self) -> dict[str, Any]:
        """Ready for JSON."""
        times = {layer: {str(m): t for m, t in by_multiple.items()} for layer, by_multiple in self.picoseconds.items()}
        return {"multiple": self.multiple, "target": self.target, "picoseconds": times}


def resolved(
    step: ChannelPruning, graph: Graph, target: str, decide: Decide | None = None
) -> tuple[ChannelPruning, dict[str, Any] | None]:
    """The step with a number in place of ``round_to: auto``, and the record of how it was found (None if it was given).

    Parameters
    ----------
    decide : keeps the choice once it is made (see `slimline.steps.base.Context`), as a clock makes it.
    """
    if step.round_to != "auto":
        return step, None

    def timed() -> dict[str, Any]:
        return choose(Units(graph), step, target).record()

    record = timed() if decide is None else decide("rounding", timed)
    if type(record.get("multiple")) is not int or record["multiple"] not in MULTIPLES:
        raise SlimlineError("The rounding that the run decided on is damaged: start a new run in another directory.")
    return step.model_copy(update={"round_to": record["multiple"]}), record


def choose(units: Units, step: ChannelPruning, target: str, timer: Timer | None = None) -> Rounding:
    """The multiple to which the widths that `step` leaves should be rounded on `target`.

    Parameters
    ----------
    timer : what times layers; the runtime itself by default, once for the same layers in a process.

    Raises
    ------
    SlimlineError : no layer that can be timed, or a runtime that is not installed.
    """
    picked = _heaviest(units)
    if not picked:
        raise SlimlineError(
            "round_to: auto finds no convolution or linear layer that it could time: give a number, such as 8."
        )
    remaining = _remaining_width(step)
    widest = max(size for layer in picked for size, changes in _widths(units, layer) if changes)
    shrinks = {m: all(_shrinks(units, layer, remaining, m) for layer in picked) for m in MULTIPLES}
    allowed = [m for m in MULTIPLES if m == 1 or (shrinks[m] and m <= widest)]
    sized = {layer.layer: {m: _sized(units, layer, remaining, m) for m in allowed} for layer in picked}
    every = tuple(dict.fromkeys(variant for of in sized.values() for pair in of.values() for variant in pair))
    seconds = dict(zip(every, (timer or measured)(target, every), strict=True))
    cost = {
        name: {
            m: float(np.mean([seconds[variant] / (len(variant.chain) * variant.macs) for variant in pair]))
            for m, pair in of.items()
        }
        for name, of in sized.items()
    }
    weight = {layer.layer: _macs(units, layer) for layer in picked}
    total = {m: sum(weight[name] * of[m] / min(of.values()) for name, of in cost.items()) for m in allowed}
    rounded = {name: {m: float(f"{1e12 * t:.4g}") for m, t in of.items()} for name, of in cost.items()}
    return Rounding(smallest_good(total, TOLERANCE), target, rounded)


def _remaining_width(step: ChannelPruning) -> float:
    """The part of a width that is left, about: MACs and parameters go with its square."""
    if step.ratio is not None:
        return 1 - step.ratio
    return math.sqrt(step.target_macs or step.target_parameters or 1.0)


def _macs(units: Units, layer: LayerMatrix) -> int:
    node = next(n for n in units.graph.nodes if n.name == layer.node)
    return node_macs(node, lambda name: units.graph.values[name].shape)


def _heaviest(units: Units) -> list[LayerMatrix]:
    """The layers with most multiply-accumulates, of different shapes, whose widths change and that can be timed."""
    by_shape: dict[tuple[Any, ...], LayerMatrix] = {}
    for layer in sorted(matrices(units.graph), key=lambda m: -_macs(units, m)):
        groups, outputs, inputs = layer.shape
        depthwise = groups > 1 and outputs == 1 and inputs == math.prod(layer.kernel)
        plain = layer.one_to_one and (groups == 1 or depthwise)
        if plain and any(_changes(units, layer, terms) for terms in (layer.groups, layer.outputs, layer.inputs)):
            by_shape.setdefault((layer.shape, units.graph.values[layer.output].shape), layer)
    return list(by_shape.values())[:LAYERS]


def _changes(units: Units, layer: LayerMatrix, terms: Sequence[tuple[str, int]]) -> bool:
    """Whether some positions of a product of axes can go."""
    free = [atom for unit in units.units for atom in unit.atoms]
    return units.carries(layer.node, (name for name, _ in terms), free)


def _widths(units: Units, layer: LayerMatrix) -> tuple[tuple[int, bool], tuple[int, bool]]:
    """Of a layer's inputs and outputs how many there are, and whether some can go."""
    groups, outputs, inputs = layer.shape
    if groups > 1:
        return ((groups, _changes(units, layer, layer.groups)),) * 2
    inputs //= math.prod(layer.kernel)
    return (inputs, _changes(units, layer, layer.inputs)), (outputs, _changes(units, layer, layer.outputs))


def _shrinks(units: Units, layer: LayerMatrix, remaining: float, multiple: int) -> bool:
    """Whether some width of a layer is still less than it was when what is left of it is rounded."""
    sizes = [size for size, changes in _widths(units, layer) if changes]
    return any(round_width(round(remaining * size), size, multiple) < size for size in sizes) or remaining == 1


def _sized(units: Units, layer: LayerMatrix, remaining: float, multiple: int) -> tuple[Layer, Layer]:
    """The layer at the widths next to those left that are multiples of `multiple` and of no more."""
    groups, outputs, _ = layer.shape
    kernel = layer.kernel
    shape = units.graph.values[layer.output].shape
    ends = [around(remaining * n, n, multiple) if changes else (n, n) for n, changes in _widths(units, layer)]
    dilation = layer.window.dilation if layer.window is not None else ()
    places = layer.places(shape) if kernel else (math.prod(shape) // outputs // units.graph.batch,)
    less, more = (Layer(i, o, places, kernel, dilation, groups > 1) for i, o in zip(*ends, strict=True))
    return less, more


@lru_cache(maxsize=32)
def measured(target: str, layers: tuple[Layer, ...]) -> tuple[float, ...]:
    """Seconds per sample of each layer's `Runtime.sample`, one thread: the fastest of interleaved runs."""
    backend = runtime(target)
    if missing := backend.available():
        raise SlimlineError(missing)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(prefix="slimline-rounding-") as folder:
        runs = []
        for number, layer in enumerate(layers):
            path = Path(folder, f"{number}{backend.suffix}")
            backend.sample(layer, path)
            batch = min(max(1, round(WORK / len(layer.chain) / layer.macs)), 32)
            rows = batch if layer.kernel else batch * layer.places[0]
            ((_, shape, _),) = backend.input_specs(path)
            x = rng.normal(size=[n or rows for n in shape]).astype(np.float32)
            session = backend.load(path)
            session.outputs((x,))
            runs.append((session, x, batch))
        best = [math.inf] * len(runs)
        start = perf_counter()
        for round_number in range(ROUNDS):
            if round_number > 2 and perf_counter() - start > SECONDS:
                break
            for i, (session, x, batch) in enumerate(runs):
                before = perf_counter()
                session.outputs((x,))
                best[i] = min(best[i], (perf_counter() - before) / batch)
    return tuple(best)
