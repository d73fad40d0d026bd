"""Grids of the weights, and the numbers on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from slimline.evidence.grams import collect
from slimline.evidence.propagation import layer_by_layer
from slimline.graph.edits import FoldNorms
from slimline.graph.ir import Graph
from slimline.graph.matrix import LayerMatrix, matrices
from slimline.graph.placement import Placement
from slimline.methods.formats import IntegerGrid, Scaled, along
from slimline.methods.gram import Gram
from slimline.methods.ranges import symmetric_grid
from slimline.methods.scales import widest
from slimline.model import Model
from slimline.steps.quantization.choices import Choices
from slimline.steps.quantization.preparation import equalized, mean_inputs
from slimline.steps.quantization.step import StaticQuantization, WeightType
from slimline.steps.weight_rounding import MEASURED, WeightRounding

Array = np.ndarray[Any, np.dtype[Any]]
_BIAS_STEPS = 2**30  # of the product of both scales that a bias may take: half of what int32 holds


class QuantizedWeights:
    """The weights of integer layers.

    Attributes
    ----------
    grids : by parameter, symmetric; of integers wide enough that every bias fits int32 steps of input times weight
        scale. (Folded batch norm can leave a channel with next to no weight and an ordinary bias; on the grid of that
        weight alone the bias would overflow.)
    tensors : by parameter, numbers of its grid in place of the float ones, where not each is rounded to the nearest;
        and corrected biases.
    """

    def __init__(
        self,
        model: Model,
        placement: Placement,
        step: StaticQuantization,
        activations: Mapping[str, Scaled],
        bits: int,
        masks: Mapping[str, Array],
    ) -> None:
        self.grids: dict[str, Scaled] = {}
        self.tensors: dict[str, Array] = {}
        self.step, self.placement, self.activations, self.bits, self.masks = step, placement, activations, bits, masks
        self.choices, self.readers = Choices.of(step, model.graph), model.graph.consumers()
        self.parameters, self.layers = model.parameters(), integer_matrices(model.graph, placement)

    def round_all(self, grams: Mapping[str, Gram], means: Mapping[str, Array]) -> None:
        """Round each by itself.

        Parameters
        ----------
        grams : by operator, of what it reads; may lack any.
        means : by weight, the mean of each input of its layer; may lack any.
        """
        for name in self.placement.weights:
            layer = self.layers.get(name)
            self._round(name, grams.get(layer.node) if layer is not None else None, means.get(name))

    def round_in_order(self, model: Model, batches: Sequence[tuple[Array, ...]], means: Mapping[str, Array]) -> None:
        """Round one layer after the other, those behind making up for the error of those before; `means` as above."""
        alone = {name: layer for name, layer in self.layers.items() if len(self.readers[name]) == 1}
        for name in [name for name in self.placement.weights if name not in alone]:
            self._round(name, None, None)

        def change(layer: LayerMatrix, gram: Gram) -> dict[str, Array]:
            self._round(layer.weight, gram, means.get(layer.weight))
            return {name: self.tensors[name] for name in (layer.weight, layer.bias) if name in self.tensors}

        layer_by_layer(model, list(alone.values()), batches, self.tensors, change)

    def _round(self, name: str, gram: Gram | None, mean: Array | None) -> None:
        axis, layer, parameters = self.placement.weights[name], self.layers.get(name), self.parameters
        worker = WeightRounding(parameters[name], layer, gram, self.masks.get(name))
        choice = self.choices.of_layers([node.layer for node in self.readers[name]])
        grid = widest_grid(worker.visible, axis, choice.type, self.bits)
        fitted = worker.fitted(grid, self.step.rounding)
        if isinstance(fitted, IntegerGrid):
            fitted = with_room(fitted, name, axis, parameters, self.placement, self.activations)
        self.grids[name] = fitted
        rounded = worker.rounded(self.grids[name], self.step.rounding)
        if layer is not None:
            self._correct(layer, worker.target - rounded, rounded, gram, mean)
        if self.step.rounding != "nearest":
            self.tensors[name] = rounded

    def _correct(
        self, layer: LayerMatrix, change: Array, rounded: Array, gram: Gram | None, mean: Array | None
    ) -> None:
        """Let the bias make up for what the lack of `change`, or all errors so far, take from the mean output."""
        if layer.bias is None or len(self.readers[layer.bias]) != 1 or self.step.bias_correction is None:
            return
        if mean is not None:
            lack = np.einsum("goi,gi->go", np.asarray(layer.matrix(change), np.float64), mean)
        elif self.step.bias_correction == "empirical" and gram is not None and gram.paired:
            now = np.asarray(layer.matrix(rounded), np.float64)
            lack = gram.others_mean - np.einsum("goi,gi->go", now, gram.mean)
        else:
            return
        bias = self.parameters[layer.bias]
        vector = layer.vector(bias)
        if vector is not None:
            self.tensors[layer.bias] = layer.as_bias(vector + lack, bias.shape).astype(bias.dtype)


def widest_grid(weight: Array, axis: int | None, kind: WeightType, bits: int) -> Scaled:
    """The grid of a weight that holds all of it; `bits` are those of an int8 one."""
    if kind == "fp8_e4m3":
        return widest(weight, "float8_e4m3fn", () if axis is None else along(axis, weight.ndim))
    grid = symmetric_grid(weight, axis, bits)
    if kind == "int4":
        return widest(weight, "int4", grid.blocks)
    return grid


def with_room(
    grid: IntegerGrid,
    name: str,
    axis: int | None,
    parameters: Mapping[str, Array],
    placement: Placement,
    activations: Mapping[str, Scaled],
) -> IntegerGrid:
    """`grid`, made wide enough for the bias of its layer."""
    if name not in placement.biases:
        return grid
    read, bias = placement.biases[name]
    size = np.abs(np.asarray(parameters[bias], np.float64)).ravel()
    step = float(activations[read].scale) * _BIAS_STEPS
    own = size if axis is not None and size.size == grid.scale.size else size.max(keepdims=True)
    scale = np.maximum(grid.scale.ravel(), own / step).astype(np.float32)
    return replace(grid, scale=scale.reshape(grid.scale.shape))


def table_grids(model: Model, placement: Placement) -> dict[str, IntegerGrid]:
    """Of the tables of embeddings, whose numbers are added up with no other codes, so that all 8 bits can be used."""
    stored = model.parameters() if placement.tables else {}
    return {name: symmetric_grid(stored[name], 0, 8) for name in placement.tables}


def integer_matrices(graph: Graph, placement: Placement) -> dict[str, LayerMatrix]:
    """By weight, the matrix of the integer layer that reads it; none where several do."""
    layers: dict[str, list[LayerMatrix]] = {}
    for layer in matrices(graph):
        if layer.weight in placement.weights:
            layers.setdefault(layer.weight, []).append(layer)
    return {weight: each[0] for weight, each in layers.items() if len(each) == 1}


def layer_grams(
    model: Model,
    placement: Placement,
    step: StaticQuantization,
    batches: Sequence[tuple[Array, ...]],
    known: dict[str, Gram],
) -> Mapping[str, Gram]:
    """By operator the Gram matrix of what it reads, where rounding asks for it; those that are not `known` are added
    to it."""
    if in_order(step) or (step.rounding not in MEASURED and step.bias_correction != "empirical"):
        return {}
    layers = [layer for layer in integer_matrices(model.graph, placement).values() if layer.node not in known]
    if layers:
        known.update(collect(model, layers, batches))
    return known


def layer_means(
    model: Model, folded: Model, placement: Placement, step: StaticQuantization, grams: Mapping[str, Gram]
) -> Mapping[str, Array]:
    """By weight, the mean of each input of its layer, where biases are corrected by it.

    Parameters
    ----------
    model, folded : with its batch norms in place; without them, as it is quantized.
    grams : of `layer_grams`.
    """
    if step.bias_correction is None:
        return {}
    if step.bias_correction == "analytic":
        plain = Model(model.adapter, model.edit(FoldNorms()), model.example) if step.equalize else None
        return mean_inputs(model, equalized(plain)[1] if plain is not None else {})
    if in_order(step):  # which sees the means of the inputs as they have become
        return {}
    layers = integer_matrices(folded.graph, placement)
    return {name: grams[layer.node].mean for name, layer in layers.items()}


def in_order(step: StaticQuantization) -> bool:
    """Whether layers are rounded one after the other."""
    return step.propagate and step.rounding in MEASURED


def short_weights(graph: Graph, placement: Placement, choices: Choices) -> list[str]:
    """Layers whose weights have fewer than 8 bits."""
    readers = graph.consumers()
    layers = {name: [node.layer for node in readers[name]] for name in placement.weights}
    return [names[0] for names in layers.values() if choices.of_layers(names).type == "int4"]
