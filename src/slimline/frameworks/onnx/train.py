"""Training ONNX models: PyTorch's adapter trains a torch module of the graph, and its weights are written back.

Batch-norm statistics need no gradients: before training begins ONNX Runtime computes them anew.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from slimline.basics.errors import SlimlineError
from slimline.frameworks.base import Adapter, Array, Batch, See, Term, Trainer, adapter, teachers_of
from slimline.frameworks.onnx.native import Editor, Native, is_standard, reduce_node
from slimline.frameworks.onnx.operators import attribute, stored
from slimline.frameworks.onnx.rewrite import replace
from slimline.frameworks.onnx.run import Part, Session, outline, part

if TYPE_CHECKING:
    from slimline.frameworks.onnx.trainable import Trainable
    from slimline.methods.outputs import Output
    from slimline.recipe.training import Training


def has_torch() -> bool:
    """Whether PyTorch is installed."""
    return importlib.util.find_spec("torch") is not None


def torch_adapter() -> Adapter:
    """PyTorch's adapter, which trains."""
    return adapter("torch")


def obstacle(native: Native) -> str | None:
    """Why a model has no gradients, as a clause behind "but"; None where it has."""
    converted = _converted(native)
    return converted if isinstance(converted, str) else None


def _converted(native: Native) -> Trainable | str:
    """The torch module of a model, or what is in the way."""
    if not has_torch():
        return "ONNX models are trained by PyTorch, which is not installed (pip install 'slimline[torch]')"
    from slimline.frameworks.onnx.trainable import Untrainable, trainable

    try:
        return trainable(native)
    except Untrainable as reason:
        return str(reason)


def _trainable(native: Native) -> Trainable:
    """The torch module of a model.

    Raises
    ------
    SlimlineError : there is none.
    """
    converted = _converted(native)
    if isinstance(converted, str):
        raise SlimlineError(
            f"Training and criteria of gradients need gradients, but {converted}: use criteria of weights or "
            "activations, compensation, sparsity and quantization, or load the network in the framework that trained "
            "it."
        )
    return converted


def gradients(
    native: Native,
    batches: Iterable[Batch],
    loss: str,
    see: Callable[[Mapping[str, Array]], None] | None,
    outputs: Sequence[Output] | None,
) -> dict[str, Array]:
    """Mean gradient of each trained weight; see `slimline.frameworks.base.Adapter.gradients`."""
    form = _trainable(native)

    def renamed(arrays: Mapping[str, Array]) -> None:
        if see is not None:
            see(form.named(arrays))

    return form.named(torch_adapter().gradients(form.module, batches, loss, renamed, outputs))


class OnnxTrainer:
    """`slimline.frameworks.base.Trainer` by that of PyTorch, which begins when it is first needed.

    Parameters
    ----------
    native, teacher : ONNX models.
    step, seed, total_steps, outputs : as of `slimline.frameworks.base.Adapter.trainer`.
    """

    def __init__(
        self,
        native: Native,
        teacher: Native | tuple[Native, ...] | None,
        step: Training,
        seed: int,
        total_steps: int,
        outputs: Sequence[Output] | None = None,
    ) -> None:
        self._native, self._teacher = native, teacher
        self._settings = step, seed, total_steps, outputs
        self._begun = False

    @cached_property
    def _form(self) -> Trainable:
        return _trainable(self._native)

    @cached_property
    def _tutors(self) -> tuple[Trainable, ...]:
        return tuple(_trainable(each) for each in teachers_of(self._teacher))

    @cached_property
    def _trainer(self) -> Trainer:
        self._begun = True
        tutors = tuple(each.module for each in self._tutors)
        return torch_adapter().trainer(self._form.module, tutors, *self._settings)

    def refresh(self, batches: Iterable[Batch]) -> None:
        """Set every batch norm's statistics to the mean of those of `batches`, each normalised by its own."""
        if self._begun:
            self._trainer.refresh(batches)
        else:
            self._native = _refreshed(self._native, batches)

    def step(self, batch: Batch, rate: float, answers: Sequence[tuple[Array, ...]] | None = None) -> float:
        """One step of the optimiser at learning rate `rate`; the loss before it."""
        return self._trainer.step(batch, rate, answers)

    def taught(self, inputs: tuple[Array, ...]) -> list[tuple[Array, ...]]:
        """Of each teacher its outputs as the loss compares them."""
        return self._trainer.taught(inputs)

    def hold(self, masks: Mapping[str, Array]) -> None:
        """Keep weights at zero where their masks are False."""
        own = self._form.tensors
        self._trainer.hold({own[name]: mask for name, mask in masks.items() if name in own})

    def pace(self, factors: Mapping[str, float]) -> None:
        """Let weights learn at so many times the rate of the others."""
        own = self._form.tensors
        self._trainer.pace({own[name]: factor for name, factor in factors.items() if name in own})

    def add(self, term: Term) -> None:
        """Add a term to the training loss."""
        students = tuple(self._form.values[name] for name in term.students)
        teachers = tuple(self._tutors[0].values[name] for name in term.teachers)
        self._trainer.add(dataclasses.replace(term, students=students, teachers=teachers))

    def follow(self, others: Sequence[OnnxTrainer]) -> None:
        """Learn from the students of other trainers too, as they are at every step."""
        self._trainer.follow([other._trainer for other in others])

    def weights(self) -> dict[str, Array]:
        """Copies of the trained weights."""
        return self._form.named(self._trainer.weights())

    def set_weights(self, weights: Mapping[str, Array]) -> None:
        """Replace some of the trained weights."""
        self._trainer.set_weights({self._form.tensors[name]: array for name, array in weights.items()})

    def slopes(self) -> dict[str, Array]:
        """The gradients of the last step."""
        return self._form.named(self._trainer.slopes())

    def gradients(self, batch: Batch) -> dict[str, Array]:
        """Of the training loss in inference mode; nothing is changed."""
        return self._form.named(self._trainer.gradients(batch))

    def outputs(self, inputs: tuple[Array, ...]) -> tuple[Array, ...]:
        """All outputs in inference mode; until training begins by ONNX Runtime."""
        return self._trainer.outputs(inputs) if self._begun else tuple(self._native.session(inputs))

    def state(self) -> dict[str, Array]:
        """That of PyTorch's trainer."""
        return self._trainer.state()

    def restore(self, state: Mapping[str, Array]) -> None:
        """Continue exactly from `state`."""
        self._trainer.restore(state)

    def native(self) -> Native:
        """A copy of the model with the weights and statistics as they are now.

        Raises
        ------
        SlimlineError : it computes other numbers than the torch module that was trained.
        """
        if not self._begun:
            return self._native
        from slimline.frameworks.onnx.trainable import Untrainable, compare

        trained = self._trainer.native()
        written = replace(self._native, self._form.named(torch_adapter().parameters(trained)))
        try:
            compare(written, trained)
        except Untrainable as reason:
            raise SlimlineError(
                f"The weights that were trained mean something else in the ONNX model ({reason}): report this model to "
                "slimline."
            ) from reason
        return written

    def network(self, see: See | None) -> Any:
        """There is none.

        Raises
        ------
        SlimlineError : always.
        """
        raise SlimlineError(
            "ONNX models have no loop of one's own: use slimline.apply, or load the network in its framework."
        )


def _refreshed(native: Native, batches: Iterable[Batch]) -> Native:
    """A copy with the statistics of `batches`, by ONNX Runtime."""
    session: Session | None = None
    sums: dict[str, Array] = {}
    names: dict[str, tuple[str, str]] = {}
    counts: dict[str, int] = {}
    seen = 0
    for inputs, _ in batches:
        if session is None:
            message, names, shapes = _by_batch(native, inputs)
            if not names:
                return native
            session = Session(message)
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
    return replace(native, {name: total / seen for name, total in sums.items()}) if seen else native


def _by_batch(
    native: Native, inputs: tuple[Array, ...]
) -> tuple[Part, dict[str, tuple[str, str]], dict[str, tuple[int, ...]]]:
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
