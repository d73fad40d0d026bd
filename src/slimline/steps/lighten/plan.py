"""Which layers become lighter, what they are fitted to, and the plan that puts them in."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from slimline.basics.errors import SlimlineError, unknown
from slimline.graph.edits import Compute, PutTensors
from slimline.graph.ir import Graph
from slimline.graph.matrix import matrices
from slimline.graph.operators import Convolution, Operator
from slimline.methods.factorization import allocate
from slimline.methods.light import grouped, relative_error, separable, spread
from slimline.plans import Replacement, ReplacementPlan
from slimline.plans.replacement import inputs_after
from slimline.recipe.layers import refuse_unmatched, selected
from slimline.steps.layer_fit import Evidence, Layer, Target, fitting_batches, part_name, refusal
from slimline.steps.lighten.activations import Activation, activations, errors
from slimline.steps.lighten.step import Lighten

if TYPE_CHECKING:
    from slimline.data import Data
    from slimline.model import Model

Array = np.ndarray[Any, np.dtype[Any]]
NOTHING: Mapping[str, str] = MappingProxyType({})
TINY = 1e-9  # of its energy that a layer is taken to retain at least


@dataclass(frozen=True)
class Swap:
    """An activation that becomes another function; `error` as of `Replacement`, None where it is not known."""

    activation: Activation
    function: str
    error: float | None


class LightPlan(ReplacementPlan):
    """Layers that become lighter. Printable and JSON-serialisable, without the weights; `mask` and `apply` carry it
    out.

    Parameters
    ----------
    graph : of the model it is for.
    convolution : what convolutions become.
    replacements, swaps : convolutions and activations that change, in graph order.
    dense : of the chosen layers that stay as they are, why.
    """

    def __init__(
        self,
        graph: Graph,
        convolution: str,
        replacements: Sequence[Replacement],
        swaps: Sequence[Swap],
        dense: Mapping[str, str],
    ) -> None:
        super().__init__(graph, replacements, dense, "lighten", computed(swaps))
        self.convolution = convolution
        self.swaps = tuple(swaps)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the layers that change, in the order of the graph."""
        order = {name: place for place, node in enumerate(self.graph.nodes) for name in node.outputs}
        outputs = {r.name: r.matrix.output for r in self.replacements}
        outputs |= {s.activation.name: s.activation.value for s in self.swaps}
        return tuple(sorted(outputs, key=lambda name: order[outputs[name]]))

    @property
    def shapes(self) -> tuple[object, ...]:
        return (*super().shapes, *((s.activation.name, s.activation.function, s.function) for s in self.swaps))

    def without(self, names: Collection[str]) -> LightPlan:
        replacements = [r for r in self.replacements if r.name not in names]
        swaps = [s for s in self.swaps if s.activation.name not in names]
        return LightPlan(self.graph, self.convolution, replacements, swaps, self.dense)

    def summary(self) -> dict[str, Any]:
        """What becomes what, ready for JSON."""
        return {
            "layers": [
                {"layer": r.name, "becomes": self.convolution, **r.record(self.graph.batch)} for r in self.replacements
            ],
            "functions": [
                {
                    "layer": s.activation.name,
                    "function": s.activation.function,
                    "becomes": s.function,
                    "error": None if s.error is None else float(f"{s.error:.4g}"),
                }
                for s in self.swaps
            ],
            "dense": [{"layer": name, "reason": reason} for name, reason in self.dense.items()],
            "frozen": [],
            "notes": [],
            **self.totals,
        }

    def __str__(self) -> str:
        rows = [
            f"  {r.name}: {self.convolution}, loses {r.error:.2%}, parameters {r.parameters[0]:,} -> "
            f"{r.parameters[1]:,}  ({', '.join(r.parts)})"
            for r in self.replacements
        ]
        for s in self.swaps:
            loses = "" if s.error is None else f", loses {s.error:.2%}"
            rows.append(f"  {s.activation.name}: {s.activation.function} -> {s.function}{loses}")
        dense = [f"  {name} stays: {reason}" for name, reason in self.dense.items()]
        return "\n".join([self.headline, *rows, *dense])


def computed(swaps: Sequence[Swap]) -> tuple[Compute, ...]:
    """The edit that makes activations other functions, if there are any."""
    functions = {s.activation.value: (s.function, s.activation.input) for s in swaps}
    return (Compute(functions),) if functions else ()


def plan_lighten(
    model: Model,
    step: Lighten,
    data: Data | None = None,
    before: LightPlan | None = None,
    back: Mapping[str, str] = NOTHING,
) -> LightPlan:
    """Which layers of `model` become lighter, and their weights, without putting them in.

    Parameters
    ----------
    before : a plan of this; then what it changes does, and no other layer.
    back : layers of it that stay as they are all the same, and why.

    Raises
    ------
    SlimlineError : nothing that can be changed, a glob or function that is not there, or data missing.
    """
    layers, swaps, dense = candidates(model, step)
    batches = _batches(step, data)
    lost = errors(model, {s.activation.value: (s.activation, s.function) for s in swaps}, batches)
    swaps = [replace(s, error=lost.get(s.activation.value)) for s in swaps]
    only = None if before is None else set(before.names) - set(back)
    if only is not None:
        layers = [layer for layer in layers if layer.name in only]
        swaps = [s for s in swaps if s.activation.name in only]
    if step.error is not None:
        over = [s for s in swaps if s.error is not None and s.error > step.error]
        dense |= {s.activation.name: _over(s.error or 0.0, step.error) for s in over}
        swaps = [s for s in swaps if s not in over]
    evidence = Evidence(model, layers, batches)
    lights = [Light.fit(layer, evidence.target(layer), step) for layer in layers]
    if before is not None:
        dense = {**before.dense, **back}
    else:
        lights, reasons = _chosen(lights, step)
        dense |= reasons
    return LightPlan(
        model.graph, step.convolution or "", _replacements(model, step, evidence, lights, swaps), swaps, dense
    )


def candidates(model: Model, step: Lighten) -> tuple[list[Layer], list[Swap], dict[str, str]]:
    """The chosen convolutions and activations that can change, and why others cannot.

    Raises
    ------
    SlimlineError : a glob that matches nothing, a function that the model has not, or nothing that can change.
    """
    graph, types = model.graph, model.graph.types
    nodes, readers = {n.name: n for n in graph.nodes}, graph.consumers()
    every = matrices(graph)
    convolutions = [m for m in every if nodes[m.node].kind == "conv"] if step.convolution else []
    functions = activations(graph) if step.activations else []
    names = [m.layer for m in convolutions] + [n for a in functions for n in (a.layer, a.name) if n]
    for field, globs in (("layers", step.layers), ("keep", step.keep)):
        refuse_unmatched(f"layer that Lighten could change for {field}", globs, names, types)
    for name in step.functions:
        if all(a.function != name for a in functions):
            raise unknown("activation in the model called", name, sorted({a.function for a in functions}))
    layers, dense = [], {}
    for matrix in convolutions:
        if not selected((matrix.layer,), step.layers, step.keep, types):
            continue
        node = nodes[matrix.node]
        reason = refusal(graph, node, matrix, readers)
        if not reason:
            layer = Layer.of(graph, node, matrix, part_name(graph, matrix, [m.layer for m in every]))
            reason = misfit(layer, step)
        if reason:
            dense[matrix.layer] = reason
        else:
            layers.append(layer)
    swaps = [
        Swap(a, step.functions[a.function], None)
        for a in functions
        if a.function in step.functions and selected([n for n in (a.layer, a.name) if n], step.layers, step.keep, types)
    ]
    if not layers and not swaps:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(dense.items())[:3])
        raise SlimlineError(f"Nothing can be made lighter ({why or 'no such layer is left'}): choose other layers.")
    return layers, swaps, dense


def misfit(layer: Layer, step: Lighten) -> str:
    """Why a convolution does not become lighter, or ''."""
    groups, outputs, _ = layer.matrix.shape
    if groups > 1 and layer.channels == 1:
        return "it is depthwise already"
    if step.convolution == "grouped":
        by = step.groups or 1
        if layer.channels % by or outputs % by:
            return f"{by} groups do not divide its {layer.channels} inputs and {outputs} outputs"
        return ""
    positions = math.prod(layer.kernel)
    if positions == 1:
        return "its kernel looks at one position alone"
    if step.multiplier > min(positions, outputs):
        return f"{step.multiplier} filters of a channel are more than its kernel or outputs can use"
    parameters, macs = cost_of(layer, step)
    if parameters >= layer.parameters or macs >= layer.macs:
        return "it would have no fewer parameters or MACs"
    return ""


def cost_of(layer: Layer, step: Lighten) -> tuple[int, int]:
    """Numbers in the weights of what takes a convolution's place, and its multiply-accumulates of the whole batch."""
    groups, outputs, inputs = layer.matrix.shape
    if step.groups is not None:
        parameters = groups * outputs * inputs // step.groups
    else:
        parameters = groups * step.multiplier * (inputs + layer.channels * outputs)
    return parameters, parameters * layer.times * math.prod(layer.after)


@dataclass(frozen=True)
class Light:
    """A convolution and what takes its place.

    Attributes
    ----------
    weights : of the parts, ``(outputs, inputs / groups, *kernel)`` each.
    product : what they compute, as the convolution's own ``(groups, outputs, inputs)``.
    error : part of the energy of its outputs (or weights) that is lost.
    """

    layer: Layer
    weights: tuple[Array, ...]
    product: Array
    error: float

    @classmethod
    def fit(cls, layer: Layer, target: Target, step: Lighten) -> Light:
        """The nearest to what a layer is to give."""
        groups, outputs, _ = layer.matrix.shape
        ones = (1,) * len(layer.kernel)
        weight, second = target.weight, target.second
        if step.groups is not None:
            fit = grouped(weight, second, step.groups, step.damping)
            product = spread(fit, step.groups)
            weights: tuple[Array, ...] = (fit.reshape(groups * outputs, -1, *layer.kernel),)
        else:
            both = separable(weight, second, math.prod(layer.kernel), step.multiplier, step.damping)
            product = both.product
            weights = (
                both.depthwise.reshape(-1, 1, *layer.kernel),
                both.pointwise.reshape(groups * outputs, -1, *ones),
            )
        return cls(layer, weights, product, relative_error(weight, product, second, step.damping))

    def operators(self, bias: Array | None) -> tuple[Operator, ...]:
        """The parts, the last with the `bias`."""
        groups, _, _ = self.layer.matrix.shape
        window = self.layer.window
        if len(self.weights) == 1:
            (weight,) = self.weights
            return (Convolution(weight, bias, window, groups * self.layer.channels // weight.shape[1]),)
        depthwise, pointwise = self.weights
        return (
            Convolution(depthwise, None, window, groups * self.layer.channels),
            Convolution(pointwise, bias, None, groups),
        )


def _batches(step: Lighten, data: Data | None) -> list[tuple[np.ndarray, ...]]:
    measured = step.needs or (data is not None and data.has("calibration"))
    return fitting_batches(step, data) if measured else []


def _over(error: float, limit: float) -> str:
    return f"it would lose {error:.2%} of its energy, more than {limit:.2%}"


def _chosen(lights: Sequence[Light], step: Lighten) -> tuple[list[Light], dict[str, str]]:
    """Those that are taken, and why others stay dense."""
    limit = 1.0 if step.error is None else step.error
    dense = {light.layer.name: _over(light.error, limit) for light in lights if light.error > limit}
    lights = [light for light in lights if light.layer.name not in dense]
    if step.ratio is None or not lights:
        return list(lights), dense
    before = [light.layer.parameters for light in lights]
    after = [cost_of(light.layer, step)[0] for light in lights]
    budget = max((1 - step.ratio) * sum(before), sum(after))
    lost = [(0.0, -math.log(max(1 - light.error, TINY))) for light in lights]
    taken = allocate(list(zip(before, after, strict=True)), lost, budget)
    assert taken is not None  # the budget is at least what all of them leave
    spared = {light.layer.name for light, place in zip(lights, taken, strict=True) if not place}
    dense |= dict.fromkeys(spared, "the other layers lose less for the same budget")
    return [light for light in lights if light.layer.name not in spared], dense


def _replacements(
    model: Model, step: Lighten, evidence: Evidence, lights: Sequence[Light], swaps: Sequence[Swap]
) -> list[Replacement]:
    """The convolutions with what takes their place; the one behind makes up for the one before, and for activations."""
    edits = computed(swaps)
    current = model.adapter.edit(model.native, edits, model.example) if edits else model.native
    read = inputs_after(model, edits)
    replacements = []
    for light in lights:
        layer, mean = light.layer, evidence.target(light.layer).mean
        input = read.get(layer.matrix.node, layer.matrix.input)
        fit = light
        if step.compensates:
            target = evidence.compensating(layer, current, input)
            fit, mean = Light.fit(layer, target, step), target.mean
        tensors, bias = evidence.tensors(layer, fit.product, mean)
        if step.compensates:
            current = model.adapter.edit(current, (PutTensors(tensors),), model.example)
        parameters, macs = cost_of(layer, step)
        replacements.append(
            Replacement(
                layer.name,
                layer.matrix,
                fit.operators(bias),
                tensors,
                light.error,
                (layer.parameters, parameters),
                (layer.macs, macs),
            )
        )
    return replacements
