"""All of a trainer that needs no gradients: batch-norm statistics are computed anew."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import onnx_ir as ir

from slimline.basics.errors import SlimlineError
from slimline.frameworks.base import Array, Batch
from slimline.frameworks.onnx.native import Editor, Native, is_standard, reduce_node
from slimline.frameworks.onnx.operators import attribute, stored
from slimline.frameworks.onnx.rewrite import replace
from slimline.frameworks.onnx.run import Session, outline, part


def no_training() -> NoReturn:
    """Refuse what needs gradients."""
    raise SlimlineError(
        "ONNX files have no gradients here, so nothing is trained and no criterion reads gradients: use criteria of "
        "weights or activations, compensation, sparsity and quantization, or load the network in the framework that "
        "trained it."
    )


class OnnxTrainer:
    """`slimline.frameworks.base.Trainer` that takes no step."""

    def __init__(self, native: Native) -> None:
        self._native = native

    def refresh(self, batches: Iterable[Batch]) -> None:
        """Set every batch norm's statistics to the mean of those of `batches`, each normalised by its own."""
        session: Session | None = None
        sums: dict[str, Array] = {}
        names: dict[str, tuple[str, str]] = {}
        counts: dict[str, int] = {}
        seen = 0
        for inputs, _ in batches:
            if session is None:
                proto, names, shapes = _by_batch(self._native, inputs)
                if not names:
                    return
                session = Session(proto)
                counts = {name: math.prod(shape) // shape[1] for name, shape in shapes.items()}
                rows = len(inputs[0])
            statistics = dict(zip(names, session(inputs, list(names)), strict=True))
            for name, array in statistics.items():
                stat, value = names[name]
                n = counts[value] * len(inputs[0]) // rows
                # The variance that is stored is the unbiased one, as frameworks keep it.
                factor = n / max(n - 1, 1) if name.endswith("_variance") else 1.0
                sums[stat] = sums.get(stat, np.zeros(())) + factor * array.astype(np.float64)
            seen += 1
        if seen:
            self._native = replace(self._native, {name: total / seen for name, total in sums.items()})

    def hold(self, masks: Mapping[str, Array]) -> None:
        """Nothing: no weight changes."""

    def outputs(self, inputs: tuple[Array, ...]) -> tuple[Array, ...]:
        """All outputs."""
        return tuple(self._native.session(inputs))

    def weights(self) -> dict[str, Array]:
        """None that are trained."""
        return {}

    def state(self) -> dict[str, Array]:
        """Stored vectors, statistics among them."""
        return {name: array.copy() for name, array in self._native.tensors.items() if array.ndim == 1}

    def restore(self, state: Mapping[str, Array]) -> None:
        """Continue from `state`."""
        self._native = replace(self._native, state)

    def native(self) -> Native:
        """The model as it is now."""
        return self._native

    def step(self, batch: Batch, rate: float) -> float:
        """Refused."""
        no_training()

    def penalise(self, values: Sequence[str], term: Callable[[Any, Any], Any], strength: float) -> None:
        """Refused."""
        no_training()

    def set_weights(self, weights: Mapping[str, Array]) -> None:
        """Refused."""
        no_training()

    def slopes(self) -> dict[str, Array]:
        """Refused."""
        no_training()

    def gradients(self, batch: Batch) -> dict[str, Array]:
        """Refused."""
        no_training()


def _by_batch(
    native: Native, inputs: tuple[Array, ...]
) -> tuple[Any, dict[str, tuple[str, str]], dict[str, tuple[int, ...]]]:
    """The model with norms by each batch's own statistics; by value that tells one the tensor it is for and the norm's
    input; shapes of these inputs."""
    editor = Editor(native)
    shapes = {name: value.shape for name, value in outline(native.model, inputs).items()}
    shapes |= {str(v.name): x.shape for v, x in zip(native.model.graph.inputs, inputs, strict=True)}
    names: dict[str, tuple[str, str]] = {}
    read: dict[str, tuple[int, ...]] = {}
    for node in list(editor.graph):
        x = node.inputs[0] if node.inputs else None
        if not is_standard(node, "BatchNormalization") or x is None or any(stored(v) is None for v in node.inputs[1:5]):
            continue
        shape = shapes[str(x.name)]
        axes = [d for d in range(len(shape)) if d != 1]
        mean = reduce_node(editor, node, "ReduceMean", x, axes)
        centre = editor.insert(node, "Sub", [x, mean])
        variance = reduce_node(editor, node, "ReduceMean", editor.insert(node, "Mul", [centre, centre]), axes)
        kind = np.dtype(np.asarray(stored(node.inputs[3])).dtype)
        eps = editor.constant(np.array(attribute(node, "epsilon", 1e-5), kind), f"{node.outputs[0].name}_eps")
        value = editor.insert(
            node, "Div", [centre, editor.insert(node, "Sqrt", [editor.insert(node, "Add", [variance, eps])])]
        )
        for operator, vector in zip(("Mul", "Add"), node.inputs[1:3], strict=True):
            content = np.asarray(stored(vector)).reshape(-1, *[1] * (len(shape) - 2))
            value = editor.insert(node, operator, [value, editor.constant(content, f"{node.outputs[0].name}_vector")])
        flat = editor.constant(np.array([-1], np.int64), f"{node.outputs[0].name}_flat")
        for statistic, source, ending in ((node.inputs[3], mean, "mean"), (node.inputs[4], variance, "variance")):
            flattened = editor.insert(node, "Reshape", [source, flat], name=f"{node.outputs[0].name}_{ending}")
            names[str(flattened.name)] = (_name(statistic), str(x.name))
        read[str(x.name)] = shape
        editor.redirect(node.outputs[0], value)
    return part(editor.model, list(names)), names, read


def _name(value: ir.Value | None) -> str:
    return "" if value is None else str(value.name)
