"""Layers that give way to others: which can, what they cost, and what the others are fitted to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from slimline.basics.errors import SlimlineError
from slimline.data.splits import first
from slimline.evidence.grams import collect, collect_pair
from slimline.evidence.lookups import frequencies
from slimline.graph.equation import Window
from slimline.graph.ir import Graph, Node
from slimline.graph.matrix import LayerMatrix, constant_slot
from slimline.methods.gram import Gram
from slimline.methods.reconstruction import reconstruct

if TYPE_CHECKING:
    from slimline.data import Data
    from slimline.model import Model

Array = np.ndarray[Any, np.dtype[Any]]
Readers = Mapping[str, Sequence[Node]]


class Fitting(Protocol):
    """A step that fits layers, to what they give (a criterion of samples) or to their weights alone."""

    @property
    def step(self) -> str:
        """The name under which recipes know it."""

    @property
    def criterion(self) -> str:
        """``weight``, or what is measured on samples."""

    @property
    def samples(self) -> int:
        """How many calibration samples it looks at."""

    @property
    def batch_size(self) -> int:
        """How many of them at a time."""


def fitting_batches(step: Fitting, data: Data | None) -> list[tuple[Array, ...]]:
    """The calibration samples that a step fits layers to; none where it fits them to weights.

    Raises
    ------
    SlimlineError : it needs some, and there is no data.
    """
    if step.criterion == "weight":
        return []
    if data is None:
        raise SlimlineError(
            f"{step.step} by output needs data: pass slimline.Data with training or calibration samples, or use the "
            "criterion weight."
        )
    return first(data.split("calibration"), step.samples, step.batch_size)


@dataclass(frozen=True)
class Layer:
    """A layer that can give way to others.

    Attributes
    ----------
    name : under which its parts are called.
    matrix : its weight as `W`.
    kernel : sizes of its kernel, ones where it looks at every position alone; empty for a linear layer.
    window : where it looks.
    before, after : sizes of the dimensions over which it moves, in its input and in its output.
    times : how often it is applied to these, in the whole batch.
    table : whether it is an embedding (`slimline.graph.matrix.tables`), which looks rows up and multiplies nothing.
    einsum : whether it is a product that an einsum spells.
    recurrent : whether it is what a recurrent layer reads its input by (`slimline.graph.matrix.recurrences`).
    beside : of that the weights of other directions; their outputs follow those of `matrix`.
    """

    name: str
    matrix: LayerMatrix
    kernel: tuple[int, ...]
    window: Window | None
    before: tuple[int, ...]
    after: tuple[int, ...]
    times: int
    table: bool = False
    einsum: bool = False
    recurrent: bool = False
    beside: tuple[LayerMatrix, ...] = ()

    @property
    def matrices(self) -> tuple[LayerMatrix, ...]:
        """All weights of it."""
        return self.matrix, *self.beside

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(groups, outputs, inputs)`` of all of them together."""
        groups, _, inputs = self.matrix.shape
        return groups, sum(matrix.shape[1] for matrix in self.matrices), inputs

    def weight(self, stored: Mapping[str, Array]) -> Array:
        """All of them as one matrix, of `shape`."""
        return np.concatenate([matrix.matrix(stored[matrix.weight]) for matrix in self.matrices], axis=1)

    def tensors(self, weight: Array, stored: Mapping[str, Array]) -> dict[str, Array]:
        """By name the tensors that are one matrix of `shape` together: the inverse of `weight`."""
        return {
            matrix.weight: matrix.tensor(part, (old := stored[matrix.weight]).shape).astype(old.dtype)
            for matrix, part in zip(self.matrices, self._parts(weight), strict=True)
        }

    def kernels(self, weight: Array, stored: Mapping[str, Array]) -> dict[str, Array]:
        """The same of a recurrent layer that reads another number of inputs."""
        return {
            matrix.weight: matrix.kernel_of(part).astype(stored[matrix.weight].dtype)
            for matrix, part in zip(self.matrices, self._parts(weight), strict=True)
        }

    def _parts(self, weight: Array) -> list[Array]:
        return np.split(weight, np.cumsum([matrix.shape[1] for matrix in self.matrices])[:-1], axis=1)

    @property
    def parameters(self) -> int:
        """Numbers in its weight."""
        return math.prod(self.shape)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the whole batch."""
        return 0 if self.table else self.parameters * self.times * math.prod(self.after)

    @property
    def channels(self) -> int:
        """Inputs of a group, without the kernel."""
        return self.matrix.shape[2] // math.prod(self.kernel)

    @classmethod
    def of(
        cls, graph: Graph, node: Node, matrix: LayerMatrix, name: str, beside: tuple[LayerMatrix, ...] = ()
    ) -> Layer:
        """Read off the graph."""
        x, y = (graph.values[n].shape for n in (matrix.input, matrix.output))
        if node.kind == "recurrent":
            return cls(name, matrix, (), None, (), (), math.prod(x[:-1]), recurrent=True, beside=beside)
        if node.kind == "embedding":
            return cls(name, matrix, (), None, (), (), math.prod(x), table=True)
        if node.kind == "linear":
            return cls(name, matrix, (), None, (), (), math.prod(x[:-1]))
        if node.kind == "einsum":
            return cls(name, matrix, (), None, (), (), math.prod(n for _, n in matrix.carried), einsum=True)
        own = {axis for axis, _ in (*matrix.groups, *matrix.inputs)}
        dims = node.attributes["equation"].inputs[0]
        moved = [d for d, dim in enumerate(dims) if dim != ("b",) and not own & set(dim)]
        kernel = matrix.kernel or (1,) * len(moved)
        batch = math.prod(n for n, dim in zip(x, dims, strict=True) if dim == ("b",))
        return cls(name, matrix, kernel, matrix.window, tuple(x[d] for d in moved), tuple(y[d] for d in moved), batch)


def refusal(graph: Graph, node: Node, matrix: LayerMatrix, readers: Readers) -> str:
    """Why no other layers can take the place of a layer, or ''."""
    if node.attributes.get("transposed"):
        return "it is a transposed convolution"
    if any(len(readers[name]) > 1 for name in (matrix.weight, matrix.bias) if name is not None):
        return "it shares its weights with other layers"
    if matrix.weight not in graph.trainable:
        return "its weight is no parameter that was trained"
    if matrix.bias is not None and not matrix.has_own_bias(graph.values[matrix.bias].shape):
        return "its bias is not one number for every output"
    return ""


def part_name(graph: Graph, matrix: LayerMatrix, named: Sequence[str]) -> str:
    """The layer's name; where parts called by it would meet others, its operator's too."""
    taken = any(name.startswith((f"{matrix.layer}.0", f"{matrix.layer}.1")) for name in graph.parameters)
    return f"{matrix.layer}.{matrix.node}" if taken or named.count(matrix.layer) > 1 else matrix.layer


@dataclass(frozen=True)
class Target:
    """What is fitted to, instead of a layer.

    Attributes
    ----------
    weight : ``(groups, outputs, inputs)``.
    second : the Gram matrix of the inputs that are weighed by it, or their covariance; of a table its diagonal,
        ``(groups, inputs)``; None weighs all alike.
    mean : ``(groups, inputs)``, of the inputs; None where nothing is known of them.
    """

    weight: Array
    second: Array | None
    mean: Array | None


class Evidence:
    """What is known of layers that may give way to others.

    Parameters
    ----------
    model : whose layers they are.
    batches : calibration samples; empty: nothing is known but the weights.
    """

    def __init__(self, model: Model, layers: Sequence[Layer], batches: Sequence[tuple[np.ndarray, ...]]) -> None:
        self.model, self._batches = model, batches
        self.stored = model.parameters()
        lookups = [layer.matrix for layer in layers if layer.table]
        others = [layer.matrix for layer in layers if not layer.table]
        self._frequencies = frequencies(model, lookups, batches) if batches else {}
        self._grams = collect(model, others, batches) if batches else {}
        readers = model.graph.consumers()
        self._pair: tuple[object, Gram] | None = None
        self._slots = {layer.name: constant_slot(model.graph, layer.matrix, readers) for layer in layers}

    def target(self, layer: Layer) -> Target:
        """The layer's own weight, and its inputs."""
        weight = layer.weight(self.stored).astype(np.float64)
        if layer.table:
            return Target(weight, self._frequencies.get(layer.matrix.node), None)
        gram = self._grams.get(layer.matrix.node)
        return Target(weight, None, None) if gram is None else Target(weight, self._second(layer, gram), gram.mean)

    def compensating(self, layer: Layer, current: Any, input: str | None = None) -> Target:
        """The weight that gives what the layer gave from the inputs that it has in `current`, which the model has
        become, and these inputs; there its input may have another name. Layers are asked for in the order in which they
        run, `current` being changed in those before: so the inputs of two that read the same are seen once."""
        own = self.target(layer)
        if layer.table:  # nothing that changes comes before it
            return own
        reading = (layer.matrix.reading, input)
        if self._pair is None or self._pair[0] != reading:
            self._pair = reading, collect_pair(self.model, current, layer.matrix, self._batches, input)
        _, gram = self._pair
        second, cross = self._second(layer, gram), gram.cross
        if self._slots[layer.name][0] is not None and own.mean is not None:
            cross = cross - own.mean[:, :, None] * gram.mean[:, None, :]
        return Target(reconstruct(own.weight, second, own.weight @ cross), second, gram.mean)

    def tensors(self, layer: Layer, product: Array, mean: Array | None) -> tuple[dict[str, Array], Array | None]:
        """What has to be put in for the layer to compute a product of inputs with this `mean`; and the bias that its
        last part then has."""
        matrix, own = layer.matrix, self.target(layer)
        tensors = layer.tensors(product, self.stored)
        slot, negative = self._slots[layer.name]
        if slot is not None and mean is not None and own.mean is not None:
            shift = np.einsum("goi,gi->go", own.weight, own.mean) - np.einsum("goi,gi->go", product, mean)
            constant = self.stored[slot]
            shift = matrix.as_bias(shift, constant.shape) if slot == matrix.bias else shift.reshape(constant.shape)
            tensors[slot] = (constant + (-shift if negative else shift)).astype(constant.dtype)
        if matrix.bias is None:
            return tensors, None
        return tensors, tensors.get(matrix.bias, self.stored[matrix.bias]).reshape(-1)

    def _second(self, layer: Layer, gram: Gram) -> Array:
        """What an error of the weight costs: the covariance where something takes the change of the mean."""
        return gram.second if self._slots[layer.name][0] is None else gram.covariance
