"""What a deployment runtime must be able to do. One file per target; each loads its packages when first used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from slimline.basics.errors import SlimlineError, unknown
from slimline.basics.plugins import installed, registered

if TYPE_CHECKING:
    from slimline.graph.placement import Policy
    from slimline.runtimes.forms import Form


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

    def run(self, inputs: tuple[np.ndarray, ...]) -> np.ndarray:
        """The first output for inputs of any batch size the artifact takes."""

    def outputs(self, inputs: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        """All outputs, in the order of the model's."""


class Runtime(Protocol):
    """One target; what has a body here need not be there."""

    name: str
    extra: str
    suffix: str
    forms: tuple[str, ...]
    """Exchange forms that it takes (`slimline.runtimes.forms`), best first."""
    policy: Policy
    """What it runs in integers."""
    description: str
    packages: tuple[str, ...] = ()
    """Whose versions decide what its artifacts do."""
    elsewhere: str = ""
    """Where its artifacts run, such as ``on Apple devices``, if that is not here: they are then checked by `verify`,
    and nothing is measured. Empty where they run here."""

    def available(self) -> str | None:
        """None if its packages are installed, else the sentence with the pip command."""

    def versions(self) -> dict[str, str]:
        """Versions of those of `packages` that are installed."""
        return installed(self.packages)

    @property
    def weight_bits(self) -> int:
        """Bits of an int8 weight that its integer kernels take exactly on this processor: 8, or 7."""
        return 8

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


@cache
def _runtimes() -> Mapping[str, Runtime]:
    return registered("target", "slimline.runtimes", "runtime", "slimline.targets", lambda found: found.name)


def names() -> list[str]:
    """The targets there are: one for every module of `slimline.runtimes` with a ``runtime``, and the entry points
    ``slimline.targets`` of other packages."""
    return list(_runtimes())


def runtime(name: str) -> Runtime:
    """The target called `name`."""
    if name not in _runtimes():
        raise unknown("target", name, _runtimes())
    return _runtimes()[name]


def runtime_for(path: Path) -> Runtime:
    """The target that loads files such as `path`, by suffix."""
    suffixes = {each.suffix: each for each in reversed(tuple(_runtimes().values()))}
    if path.suffix not in suffixes:
        raise unknown("runtime for files ending in", path.suffix or path.name, suffixes)
    found: Runtime = suffixes[path.suffix]
    return found
