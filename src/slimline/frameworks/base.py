"""What a framework must be able to do. Everything above the adapters uses only this.

An adapter is a class with the methods of `Adapter`, found by name through `adapter`; ``native`` is the
framework's own model (a torch `GraphModule`, a `keras.Model`, …). No method changes the native model it is given.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np

from slimline.basics.arrays import Example
from slimline.basics.errors import SlimlineError, unknown
from slimline.basics.named import Labels, rows
from slimline.basics.plugins import plugins
from slimline.methods.formats import Format
from slimline.runtimes.forms import EXPORTED_PROGRAM, ONNX, PLAIN, TENSORFLOW_FUNCTION

if TYPE_CHECKING:
    from slimline.files.slim.archive import Span
    from slimline.graph.edits import Edit
    from slimline.graph.ir import Graph
    from slimline.graph.quantization import Quantization
    from slimline.methods.outputs import Output
    from slimline.recipe.training import Training

Array = np.ndarray
Batch = tuple[tuple[Array, ...], Labels]
"""The model's inputs, each ``(batch, …)``, and the labels: an array of the first output's, several, or None."""

See = Callable[[tuple[Array, ...], int], tuple[Array, ...]]
"""The view of a batch of inputs, by its number."""


class Delaying(Protocol):
    """A network in the user's own training loop in which things begin later, see `slimline.steps.base.Prepared`."""

    @property
    def native(self) -> Any:
        """The framework's model, which is trained in place."""

    @property
    def delay(self) -> int:
        """Epochs before activations are rounded."""

    @property
    def fold_norms(self) -> int | None:
        """Epochs after which batch norms stay as they are; None where they train until the end."""

    @property
    def masks(self) -> Mapping[str, Array]:
        """By weight name, boolean; True stays."""

    @property
    def observe(self) -> Callable[[], Quantization]:
        """The formats of the activations, from ranges that are observed on the network as it is now."""


class Masking(Protocol):
    """Masks that change while a network trains in the user's own loop."""

    @property
    def masks(self) -> Mapping[str, Array]:
        """By weight name, boolean; True stays."""

    @property
    def sparsity(self) -> float:
        """The part of the weights that is masked now."""

    @property
    def complete(self) -> bool:
        """Whether the masks have reached the amount and stay."""

    @property
    def gradient(self) -> bool:
        """Whether updates read gradients."""

    def advance(self, weights: Callable[[], Mapping[str, Array]], gradients: Callable[[], Mapping[str, Array]]) -> bool:
        """Count an optimiser step; whether it changed the masks."""


@runtime_checkable
class Masked(Protocol):
    """A model that carries masks, as `slimline.model.Model` does."""

    @property
    def framework(self) -> str:
        """Name of its adapter."""

    @property
    def native(self) -> Any:
        """The framework's model."""

    @property
    def masks(self) -> Mapping[str, Array]:
        """By weight name, boolean; True stays."""


@dataclass(frozen=True)
class Term:
    """A part of a training loss that is about inner values.

    Attributes
    ----------
    students, teachers : names of the values that are read, in the graphs of the student and of the teacher.
    learned : by name the first values of weights that are trained for it with the student, and are no part of it.
    value : ``value(xp, students, teachers, learned)``, a scalar of the array namespace, of these arrays as float32.
    """

    students: tuple[str, ...]
    teachers: tuple[str, ...]
    value: Callable[[Any, Sequence[Any], Sequence[Any], Mapping[str, Any]], Any]
    learned: Mapping[str, Array] = field(default_factory=dict)

    @classmethod
    def mean(cls, values: Sequence[str], of: Callable[[Any, Any], Any], strength: float) -> Term:
        """`strength` times the mean of ``of(xp, value)`` over the student's `values`, see
        `slimline.methods.activations`."""
        return cls(tuple(values), (), lambda xp, seen, *_: strength / len(seen) * sum(of(xp, each) for each in seen))


class Trainer(Protocol):
    """One student under training; the loop around it is `slimline.training.loop`."""

    def refresh(self, batches: Iterable[Batch]) -> None:
        """Recompute batch-norm statistics (cumulative mean over `batches`); no weights change."""

    def step(self, batch: Batch, rate: float, answers: Sequence[tuple[Array, ...]] | None = None) -> float:
        """One optimiser step at learning rate `rate`; the loss before it.

        `answers` are what `taught` gives for the batch; with None the teachers are asked.
        """

    def taught(self, inputs: tuple[Array, ...]) -> list[tuple[Array, ...]]:
        """Of each teacher its outputs as the loss compares them: real numbers as float32, logits of probabilities."""

    def hold(self, masks: Mapping[str, Array]) -> None:
        """Keep at zero, from now on, every weight whose mask (by graph name, True stays) is False; frozen weights stay
        as they are.

        Replaces what was held before; what is free again begins at zero, without momentum.
        """

    def pace(self, factors: Mapping[str, float]) -> None:
        """Let weights, by graph name, learn at so many times the rate of the others; before the first step."""

    def add(self, term: Term) -> None:
        """Add a term to the training loss; before the first step."""

    def follow(self, others: Sequence[Any]) -> None:
        """Learn from the students of other trainers of the framework too, as they are at every step; before the first.
        They answer in inference mode."""

    def weights(self) -> dict[str, Array]:
        """Copies of the weights that are trained as they are, by graph name; frozen ones are not among them."""

    def set_weights(self, weights: Mapping[str, Array]) -> None:
        """Replace some of the trainable weights, by graph name; what the optimiser remembers of them stays."""

    def slopes(self) -> dict[str, Array]:
        """The gradients that the last `step` took of its loss, by graph name; copies."""

    def gradients(self, batch: Batch) -> dict[str, Array]:
        """Of the training loss in inference mode, by graph name, of held weights too; nothing is changed."""

    def outputs(self, inputs: tuple[Array, ...]) -> tuple[Array, ...]:
        """All outputs of the student in inference mode, floats as float32."""

    def state(self) -> dict[str, Array]:
        """All that the next step depends on (weights, statistics, optimiser, counters, random state)."""

    def restore(self, state: Mapping[str, Array]) -> None:
        """Continue exactly from `state`."""

    def native(self) -> Any:
        """The student as it is now, as a new native model in inference mode."""

    def network(self, see: See | None) -> Any:
        """The student, to be trained in a loop of the user's own towards what this trainer knows of: a model of the
        framework that shares its weights, in place of `step`.

        Raises
        ------
        SlimlineError : the framework has no such loop.
        """


def in_parts(batch: Batch, number: int) -> list[Batch]:
    """A batch as at most so many of nearly equal size."""
    inputs, labels = batch
    bounds = np.linspace(0, len(inputs[0]), min(number, len(inputs[0])) + 1).astype(int)
    slices = [slice(start, stop) for start, stop in pairwise(bounds)]
    return [(tuple(x[part] for x in inputs), rows(labels, part)) for part in slices] if number > 1 else [batch]


def answers_in_parts(answers: Sequence[tuple[Array, ...]] | None, number: int) -> list[list[tuple[Array, ...]] | None]:
    """Those to the batches that `in_parts` makes; None of each where there are none."""
    if answers is None:
        return [None] * number
    every = [in_parts((each, None), number) for each in answers]
    return [[inputs for inputs, _ in part] for part in zip(*every, strict=True)]


def teachers_of(teacher: Any) -> tuple[Any, ...]:
    """The native models that teach, of a `trainer`'s argument."""
    if isinstance(teacher, tuple):
        return teacher
    return () if teacher is None else (teacher,)


class Parts(Protocol):
    """Submodules of a model whose control flow depends on data, see `slimline.model.parts`."""

    def take_apart(self, module: Any, args: tuple[Any, ...], names: tuple[str, ...]) -> tuple[Any, dict[str, Any]]:
        """A copy of `module` that runs captured parts, and by name each part's native model and example inputs."""

    def interfaces(self, records: Sequence[Mapping[str, Any]]) -> Sequence[Any]:
        """What `records` wrote; KeyError, TypeError or ValueError for what it does not write."""

    def put_together(self, module: Any, interfaces: Sequence[Any], natives: Mapping[str, Any]) -> Any:
        """A copy of `module` that runs these parts."""

    def exchange(self, whole: Any, new: Mapping[str, Any]) -> Any:
        """A copy that runs other parts."""

    def records(self, whole: Any) -> list[dict[str, Any]]:
        """The interfaces of the parts, ready for JSON."""

    def names(self, module: Any) -> set[str]:
        """Of all submodules."""

    def size(self, whole: Any) -> int:
        """How many numbers are trained, parts and rest together."""

    def outer_state(self, whole: Any) -> dict[str, Array]:
        """Stored tensors that are no part's."""

    def load_outer_state(self, whole: Any, state: Mapping[str, Array]) -> None:
        """Put them back."""


class Adapter(Protocol):
    """One framework."""

    name: str
    suffix: str
    """Of the files that `save` writes: ``.pt2``, ``.keras``, ``.onnx``."""
    layout: Literal["channels_first", "channels_last"]
    """Where images and outputs have their channels."""
    marks_weights: bool
    """Whether its forms keep named weights apart, so that a runtime can store codes in their place."""
    rounds_tensors: bool
    """Whether it rounds what layers read to the grid ``uint8_per_tensor`` of `slimline.methods.dynamic`."""
    learns_formats: bool
    """Whether `edit` can let formats learn (`slimline.graph.edits.LearnRounding`), and have layers read less than they
    did (`slimline.graph.edits.Subtract`)."""
    delays_formats: bool
    """Whether formats of activations can begin, and norms stop, while a loop of the user's own trains the model."""

    @property
    def namespace(self) -> Any:
        """The array namespace in which the framework differentiates, for `slimline.methods`."""

    def accepts(self, source: Any) -> bool:
        """Whether `source` (an object, never a path) is this framework's model."""

    def load(self, source: Any, example: Example | None, dynamic: bool = False) -> tuple[Any, tuple[Array, ...]]:
        """The native model of the user's `source`, and example inputs (made from the input shapes where None).

        With `dynamic`, for sources that do not say it themselves, every size that they leave free is so.
        """

    def slots(self, source: Any) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of every tensor that a file of weights fills in the user's `source`, by name."""

    def fill(self, source: Any, tensors: Mapping[str, Array]) -> None:
        """Put `tensors` into the slots of `source`, in place."""

    def masks(self, source: Any) -> dict[str, Array]:
        """Masks that the user's `source` brings along, by weight name; True stays."""

    def read(self, native: Any, example: tuple[Array, ...]) -> Graph:
        """The neutral graph."""

    def parameters(self, native: Any) -> dict[str, Array]:
        """Every stored tensor (weights, buffers, constants) under its name in the graph."""

    def edit(self, native: Any, edits: Sequence[Edit], example: tuple[Array, ...]) -> Any:
        """A copy to which the edits were done, one after the other; `native` stays as it is."""

    def format_mismatches(self, native: Any, quantization: Quantization) -> list[str]:
        """The values and parameters that `native` rounds otherwise than `quantization` says: to another format, or only
        one of both does; no name twice."""

    def softened(self, native: Any) -> dict[str, Array]:
        """By name, the weights that a `LearnRounding` has softened, each of their numbers at the code it is nearer
        to."""

    def learned(self, native: Any, quantization: Quantization) -> Quantization:
        """`quantization` as a model that a `LearnRounding` of it has made, and training has changed, rounds now."""

    def form(
        self,
        native: Any,
        kind: str,
        example: tuple[Array, ...],
        integer: bool,
        weights: Mapping[str, Format] = PLAIN,
    ) -> Any:
        """The content of one of the framework's forms.

        Parameters
        ----------
        integer : whether `native` simulates what is to be computed in integers.
        weights : by name, formats of stored tensors that the form keeps apart: a runtime stores codes in their place.

        Raises
        ------
        SlimlineError : an operator that cannot be written in that form.
        """

    @property
    def parts(self) -> Parts | None:
        """How models are taken apart and put together; None where they are always captured whole."""

    def free(self, native: Any) -> Literal["none", "batch", "sizes"]:
        """Which sizes of its inputs may change: none, the batch, or others too."""

    def input_shapes(self, native: Any, example: tuple[Array, ...]) -> list[tuple[int | None, ...]]:
        """Of each input, with None for the sizes that may change: the batch, and what else the network leaves free."""

    def outputs(self, native: Any, inputs: tuple[Array, ...]) -> tuple[Array, ...]:
        """All outputs in inference mode, in the order of an artifact's, as float32 (or as stored)."""

    def output_names(self, native: Any) -> tuple[str, ...]:
        """Names of `outputs`, as the user's structure has them: keys, fields, else positions (``0``, ``hidden.1``)."""

    def answers(self, native: Any, batches: Iterable[tuple[Array, ...]]) -> list[tuple[Array, ...]]:
        """What `outputs` gives for every batch, computed where gradients are.

        To compare models with each other; with artifacts `outputs` are compared, which are computed on the CPU.
        """

    def device(self, wished: str | None) -> str:
        """Where `gradients`, `observe`, `answers` and `trainer` compute for a wish: ``cuda:0``, ``mps``, ``cpu``.

        A wish of None is for the best there is. They ask `slimline.frameworks.device.wish` when they are called.

        Raises
        ------
        SlimlineError : it is not there.
        """

    def untrainable(self, native: Any) -> str | None:
        """Why there are no gradients of a model, as a clause that goes on behind "but"; None where there are.

        Where there are none `gradients` refuses, and so does a `trainer` once it is to do more than `refresh`.
        """

    def uncompilable(self) -> str | None:
        """Why a step that trains cannot be `compiled` here, as a clause that goes on behind "as"; None where it can, or
        is in any case."""

    def seed(self, seed: int) -> None:
        """Seed the framework's global random generator."""

    def random_state(self) -> Any:
        """Of that generator; None where it cannot be read."""

    def set_random_state(self, state: Any) -> None:
        """What `random_state` gave."""

    def gradients(
        self,
        native: Any,
        batches: Iterable[Batch],
        loss: str,
        see: Callable[[Mapping[str, Array]], None] | None = None,
        outputs: Sequence[Output] | None = None,
    ) -> dict[str, Array]:
        """Mean gradient per weight, frozen or not, of the loss of the labels (``cross_entropy``: of each output that
        which is of its kind) or of the ``norm`` of all outputs (without labels).

        `see` is told the gradient of every batch. `outputs` as of `trainer`.
        """

    def observable(self, native: Any) -> Container[str]:
        """The names of the values that `observe` can show, or begin with."""

    def observe(
        self,
        native: Any,
        batches: Iterable[tuple[Array, ...]],
        values: Sequence[str],
        see: Callable[[str, Array], None],
        sources: Sequence[str] | None = None,
    ) -> None:
        """Run the model and hand every named activation of every batch to `see`; one pass, nothing kept.

        With `sources`, the batches hold these activations instead of the model's inputs, and only what follows is run.
        """

    def trainer(
        self,
        native: Any,
        teacher: Any | None,
        step: Training,
        seed: int,
        total_steps: int,
        outputs: Sequence[Output] | None = None,
    ) -> Trainer:
        """Start to train a copy of `native` towards `teacher` and the labels.

        Several teachers are a tuple; they teach what `slimline.methods.distillation.mean_teacher` makes of them.
        `outputs` says what each output means; None leaves that to the labels of the first batch. The loss is
        `slimline.methods.distillation.joint`; a classifier that ends in a softmax is compared by its log-probabilities.
        """

    def save(self, native: Any, path: Path, example: tuple[Array, ...], metadata: Mapping[str, Any]) -> None:
        """Write the model and `metadata` to `path` atomically, without pickle, deterministically where possible."""

    def open(
        self, path: Path, allow_pickle: bool, example: Example | None = None
    ) -> tuple[Any, tuple[Array, ...], dict[str, Any]]:
        """What `save` wrote (or a file of the framework's own): native, example inputs, metadata.

        `example` is for a file that holds none.
        """

    def spans(self, content: bytes) -> list[Span]:
        """Where in a file that `open` reads, of these bytes, its arrays lie, as far as that can be said.

        Raises
        ------
        SlimlineError : a file that is not whole by itself.
        """


@dataclass(frozen=True)
class Framework:
    """What is known of a framework before it is imported.

    Attributes
    ----------
    name : of it, and of the package whose classes its models have.
    module : that has its ``adapter``.
    suffixes : of the files that its adapter opens, those that it writes first.
    forms : that its adapter gives, see `slimline.runtimes.forms`.
    target : for which its models are compressed where the user names none.
    packages : whose versions decide what it computes.
    """

    name: str
    module: str
    suffixes: tuple[str, ...]
    forms: tuple[str, ...]
    target: str
    packages: tuple[str, ...] = ()


KERAS = ("keras", "tensorflow", "tensorflow-cpu")
# Keras first: with its torch backend a keras.Model is a torch.nn.Module too.
_OWN = (
    Framework("keras", "slimline.frameworks.keras", (".keras",), (TENSORFLOW_FUNCTION, ONNX), "litert", KERAS),
    Framework(
        "torch",
        "slimline.frameworks.torch",
        (".pt2", ".pt", ".pth"),
        (ONNX, EXPORTED_PROGRAM),
        "onnxruntime",
        ("torch",),
    ),
    Framework("onnx", "slimline.frameworks.onnx", (".onnx",), (ONNX,), "onnxruntime", ("onnx", "onnxruntime")),
)


@cache
def frameworks() -> Mapping[str, Framework]:
    """Those of slimline, and the entry points ``slimline.frameworks`` of other packages."""
    own = {each.name: each for each in _OWN}
    return {**own, **plugins("framework", "slimline.frameworks", lambda each: str(each.name), own)}


def framework(name: str) -> Framework:
    """The framework called `name`."""
    if name not in frameworks():
        raise unknown("framework", name, frameworks())
    return frameworks()[name]


def written() -> tuple[str, ...]:
    """Suffixes of the files in which models are saved."""
    return tuple(each.suffixes[0] for each in frameworks().values() if each.suffixes)


def adapter(name: str) -> Adapter:
    """The adapter of a framework; imports the framework."""
    result: Adapter = import_module(framework(name).module).adapter
    return result


def adapter_for(source: Any) -> Adapter:
    """The adapter that accepts a model object, judged by where its class comes from; imports only that framework."""
    roots = {cls.__module__.partition(".")[0] for cls in type(source).__mro__}
    for name in frameworks():
        if name in roots:
            return adapter(name)
    raise SlimlineError(
        f"A {type(source).__name__} is no model slimline can read: give a torch.nn.Module, a keras.Model, an "
        "onnx.ModelProto or a path."
    )


def adapter_of_tensor(tensor: Any) -> Adapter:
    """The adapter whose framework a tensor is of.

    Raises
    ------
    SlimlineError : there is none that trains.
    """
    roots = {cls.__module__.partition(".")[0] for cls in type(tensor).__mro__}
    for name, each in frameworks().items():
        if roots & {*each.packages, name}:
            return adapter(name)
    raise SlimlineError(f"A {type(tensor).__name__} is no tensor of a framework that trains: give those of its models.")


def imported() -> list[Adapter]:
    """The adapters of the frameworks that this process has imported already, as far as they can be used here."""
    adapters = []
    for name in frameworks():
        if name in sys.modules:
            with suppress(SlimlineError):  # Keras on another backend, say, beside the torch model that is compressed
                adapters.append(adapter(name))
    return adapters


def adapter_of(path: Path) -> Adapter:
    """The adapter that opens files such as `path`, by suffix."""
    suffixes = {suffix: each.name for each in frameworks().values() for suffix in each.suffixes}
    if path.suffix not in suffixes:
        raise unknown("model format", path.suffix or path.name, suffixes)
    return adapter(suffixes[path.suffix])
