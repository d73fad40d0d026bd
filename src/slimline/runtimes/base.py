"""What a deployment runtime must be able to do. One file per target; each loads its packages when first used."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

import numpy as np

from slimline.basics.errors import SlimlineError, unknown
from slimline.basics.plugins import installed, registered
from slimline.methods.dynamic import DynamicGrid
from slimline.methods.formats import Format, IntegerGrid

if TYPE_CHECKING:
    from slimline.graph.placement import Policy
    from slimline.runtimes.forms import Form


ABILITIES = ("run", "time", "profile", "count integer kernels", "time single layers")
"""What a target may be asked."""

Specs = Sequence[tuple[str, tuple[int | None, ...], str]]
"""Name, shape (None where any size goes) and numpy dtype of each input of an artifact."""


@dataclass(frozen=True)
class Layer:
    """A layer by itself, to be timed.

    Attributes
    ----------
    inputs, outputs : channels; equal where it is `depthwise`.
    places : sizes of the output's spatial dimensions; of a linear layer the number of rows.
    kernel, dilation : per spatial dimension; empty for a linear layer.
    """

    inputs: int
    outputs: int
    places: tuple[int, ...]
    kernel: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    depthwise: bool = False

    @property
    def macs(self) -> int:
        """Multiply-accumulates per sample."""
        wide = self.outputs if self.depthwise else self.inputs * self.outputs
        return wide * math.prod(self.kernel) * math.prod(self.places)

    @property
    def chain(self) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs of the layers of `Runtime.sample`: there and back, twice."""
        return ((self.inputs, self.outputs), (self.outputs, self.inputs)) * 2


class Session(Protocol):
    """An artifact loaded by its runtime."""

    @property
    def output_names(self) -> Sequence[str]:
        """Of `outputs`, where the artifact holds them; need not be there."""

    def run(self, inputs: tuple[np.ndarray, ...]) -> np.ndarray:
        """The first of `outputs`, for artifacts that have one."""

    def outputs(self, inputs: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        """All outputs for inputs of any batch size the artifact takes, in the order of the model's."""


class Runtime(Protocol):
    """One target; what has a body here need not be there."""

    name: str
    extra: str
    suffix: str
    forms: tuple[str, ...]
    """Exchange forms that it takes (`slimline.runtimes.forms`), best first."""
    policy: Policy
    """What it runs in integers."""
    policies: Mapping[str, Policy] = MappingProxyType({})
    """What it runs with activations of other types than integers of 8 bits, by their names in a recipe."""
    description: str
    packages: tuple[str, ...] = ()
    """Whose versions decide what its artifacts do."""
    elsewhere: str = ""
    """Where its artifacts run, such as ``on Apple devices``, if that is not here: they are then checked by `verify`,
    and nothing is measured. Empty where they run here."""
    precisions: tuple[str, ...] = ("float32", "int8")
    """What its artifacts may compute in."""
    abilities: frozenset[str] = frozenset({"run", "time"})
    """Those of `ABILITIES` that it has on this machine, once it is installed."""

    writes: str = "integer grids of 8 bits, symmetric for weights, with one scale per tensor or per position of an axis"
    """Formats of tensors that it can write, in words."""

    short_weights: str = ""
    """What it does with int4 weights of layers that compute in integers; empty where it takes none."""

    def can_write(self, each: Format, stored: bool) -> bool:
        """Whether its artifact can hold a tensor in a format.

        Parameters
        ----------
        stored : whether it is a weight, whose codes are in the file; else an activation.
        """
        short = stored and bool(self.short_weights)
        # 7 where the kernels bear no more
        if not isinstance(each, IntegerGrid) or not (each.bits in (7, 8) or (short and each.bits == 4)):
            return False
        if not stored:
            return each.per_tensor
        return each.signed and each.zero_point is None and (each.per_tensor or each.axis is not None)

    stores: str = ""
    """Formats in which it can hold weights whose layers compute in float, in words; empty where there are none."""
    storage: str = ""
    """What it does with such weights when it runs, in words."""

    def can_store(self, each: Format) -> bool:
        """Whether its artifact can hold weights in a format while their layers compute in float."""
        return False

    def container(self, each: Format) -> int:
        """Bits that a code of such a weight takes in its artifact."""
        return each.stored_bits

    shrinks: frozenset[str] = frozenset()
    """What makes its artifacts smaller by itself, of ``zeros`` and ``shared values``."""

    dynamic: frozenset[str] = frozenset()
    """Layers (``linear``, ``conv``, ``lstm``) that it computes in integers whose ranges are found at run time, and
    ``embedding`` where it stores such layers' weights beside them."""
    dynamic_grid: DynamicGrid = "uint8_per_tensor"
    """The grid of these ranges."""
    dynamic_instead: str = ""
    """Where it is told of no such layers, what takes their place, as a clause that goes on behind "as"."""
    short_group: int | None = 32
    """Inputs of an output that share a scale of the int4 weights of such a linear layer; None for all."""
    short_scales: str = "float32"
    """The type of these scales."""
    short_multiple: int = 1
    """Of what the inputs of such a linear layer have to be a multiple for int4 weights; others take int8."""
    rounds_short: bool = False
    """Whether it rounds what it multiplies by int4 weights in a way of its own, which models do not simulate."""

    def can_multiply(self, each: Format) -> bool:
        """Whether such layers can have weights in a format."""
        return self.can_store(each)

    marked_weights: bool = True
    """Whether it has to be told which tensors of its form it stores as codes; else it finds them by their numbers."""

    def rounds_inputs(self, each: Format) -> bool:
        """Whether, unasked, it rounds what it multiplies by weights that are stored in a format."""
        return False

    @property
    def rounds_reals(self) -> bool:
        """Whether it is told to compute real numbers in fewer than 32 bits, and then differs from the model by that."""
        return False

    def available(self) -> str | None:
        """None if its packages are installed, else the sentence with the pip command."""

    def versions(self) -> dict[str, str]:
        """Versions of those of `packages` that are installed."""
        return installed(self.packages)

    def settings(self) -> Mapping[str, Mapping[str, str]]:
        """By kind, the words that may stand behind its name and a colon on this machine, and what each does."""
        return {}

    def configured(self, name: str, chosen: Mapping[str, str]) -> Runtime:
        """The same target under another name, with a word of some kinds of `settings`."""
        raise SlimlineError(f"{self.name} has no settings: leave out what stands behind its name in {name}.")

    @property
    def weight_bits(self) -> int:
        """Bits of an int8 weight that its integer kernels take exactly on this processor: 8, or 7."""
        return 8

    def files(self, path: Path) -> tuple[Path, ...]:
        """Where the files of the artifact at `path` may lie, itself first."""
        return (path,)

    def lower(self, form: Form, path: Path) -> None:
        """Write the artifact of a network in one of `forms` atomically and deterministically, integer where it says so.

        What else belongs to the artifact lies beside `path`, which is in a folder of its own. Nothing but
        `slimline.model.lowering` calls it: what it wrote has to be compared with the model.
        """

    def verify(self, form: Form, path: Path) -> Session | None:
        """Check an artifact of a target whose artifacts run `elsewhere` against the form that it was made of, as
        `lower` left it: types, sizes, shapes, weights, the target's own rules.

        Returns
        -------
        What answers as the artifact has to, where another runtime can; it is then compared with the model.

        Raises
        ------
        SlimlineError : the artifact is not what the form says.
        """
        raise SlimlineError(f"{self.name} does not say how its artifacts are checked: choose another target.")

    def sample(self, layer: Layer, path: Path) -> None:
        """Write an artifact of float layers such as `layer`, one behind the other as `Layer.chain` says: a runtime may
        lay data out anew before and after such a run. Its input is ``(batch, *places)`` with channels where the runtime
        has them, of a linear layer ``(rows, channels)``."""
        raise SlimlineError(f"{self.name} times no single layers: give round_to a number.")

    def load(self, path: Path, threads: int = 1) -> Session:
        """Load an artifact; refuses a file that is none in one sentence."""
        raise SlimlineError(f"{path} runs {self.elsewhere}, not here: {self.name} artifacts cannot be measured here.")

    def integer_layers(self, path: Path) -> Mapping[str, str]:
        """Operators that the runtime really executes, after its own optimisation: name to
        ``"integer"`` or ``"float"``; empty where it does not tell. For checks and for the report."""
        return {}

    def profile(
        self, path: Path, inputs: tuple[np.ndarray, ...], threads: int = 1, runs: int = 30
    ) -> Mapping[str, float]:
        """Median milliseconds of each operator that runs, named after its layer; empty where the runtime tells none."""
        return {}

    def input_specs(self, path: Path) -> list[tuple[str, tuple[int | None, ...], str]]:
        """Name, shape (None where any size goes) and dtype of each input."""


def conform(artifact: str, specs: Specs, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """`inputs` as contiguous arrays of the dtypes of `specs`; for runtimes that do not check shapes themselves.

    Raises
    ------
    SlimlineError : there are more or fewer, or one has another shape.
    """
    if len(inputs) != len(specs):
        raise SlimlineError(f"{artifact} takes {len(specs)} inputs, not {len(inputs)}.")
    arrays = []
    for (name, shape, dtype), array in zip(specs, inputs, strict=True):
        fits = len(shape) == array.ndim and all(a in (None, b) for a, b in zip(shape, array.shape, strict=True))
        if not fits:
            sizes = ", ".join("any" if size is None else str(size) for size in shape)
            raise SlimlineError(
                f"Input {name!r} of {artifact} has shape ({sizes}), not {array.shape}: "
                "give arrays (batch, …) of these sizes."
            )
        arrays.append(np.ascontiguousarray(array, dtype))
    return arrays


@cache
def _runtimes() -> Mapping[str, Runtime]:
    return registered("target", "slimline.runtimes", "runtime", "slimline.targets", lambda target: target.name)


def names() -> list[str]:
    """The targets there are: one for every module of `slimline.runtimes` with a ``runtime``, and the entry points
    ``slimline.targets`` of other packages."""
    return list(_runtimes())


def runtime(name: str) -> Runtime:
    """The target called `name`, such as ``onnxruntime``, or with settings, such as ``onnxruntime:cuda,basic``.

    Raises
    ------
    SlimlineError : there is no such target, or it has no such setting on this machine.
    """
    plain, colon, words = name.partition(":")
    if plain not in _runtimes():
        raise unknown("target", plain, _runtimes())
    target: Runtime = _runtimes()[plain]
    if not colon:
        return target
    kinds = {word: kind for kind, known in target.settings().items() for word in known}
    chosen: dict[str, str] = {}
    for word in words.split(","):
        if word not in kinds:
            raise unknown(f"setting of {plain} on this machine", word, kinds)
        if kinds[word] in chosen:
            raise SlimlineError(f"{name} names two settings of {kinds[word]}: leave {word} out.")
        chosen[kinds[word]] = word
    return target.configured(name, chosen)


def files_of(artifact: Path) -> list[Path]:
    """The files that make up an artifact, the one by which it is called first: of a folder all that are in it."""
    if artifact.is_dir():
        return sorted(file for file in artifact.rglob("*") if file.is_file())
    loads = next((each for each in _runtimes().values() if each.suffix == artifact.suffix), None)
    return [file for file in (loads.files(artifact) if loads else (artifact,)) if file.is_file()]


def runtime_for(path: Path) -> Runtime:
    """The target that loads files such as `path`, by suffix."""
    suffixes = {each.suffix: each for each in reversed(tuple(_runtimes().values()))}
    if path.suffix not in suffixes:
        raise unknown("runtime for files ending in", path.suffix or path.name, suffixes)
    target: Runtime = suffixes[path.suffix]
    return target
