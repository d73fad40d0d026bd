"""The parity gate: does the artifact compute what the in-framework model computes?

Means hide what is rare: a destroyed row among 256 moves them by less than rounding does. So every output is looked at
three times: as a whole, by slices (a row, a channel, a position: one index of one dimension), and by lines (the classes
of one position of one row: all indices of one dimension).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from slimline.basics.errors import SlimlineError
from slimline.measure.accuracy import agreement
from slimline.methods.outputs import Output, bare

FLOAT_TOLERANCE = 1e-3
"""Largest absolute difference of a float artifact, relative to the largest reference output."""
FLOAT_SLICE = 1e-2
"""Largest absolute difference in a slice of a float artifact's outputs, relative to the largest of the slice."""
FLOAT_NOISE = 1e-5
"""What a slice of small outputs may differ beyond that, relative to the largest output of all: they come of large
numbers that cancel."""
INTEGER_AGREEMENT = 0.99
"""Least part of classes that an integer artifact must keep, near-ties aside."""
INTEGER_TOLERANCE = 0.05
"""Largest mean absolute difference of an integer artifact, relative to the outputs' standard deviation."""
INTEGER_WORST = 0.5
"""Largest mean absolute difference of any line of an integer artifact's outputs, relative to the same."""
UNSTABLE = 1.5
"""How many times as far as its own simulation moves an integer artifact may be from it, where that is further: both
have roundings of their own then."""
GROSS = 1.0
"""A mean difference of half this, or of a line of this, is no rounding: such an integer artifact is refused."""
_ENOUGH = 8  # numbers that a slice must hold for its spread to be known
_TINY = 1e-30  # instead of zero, where all reference outputs are equal


class Parity(BaseModel):
    """How an artifact's outputs differ from the in-framework model's on the same inputs.

    Attributes
    ----------
    passed : whether the artifact may be used.
    integer : which tolerances applied.
    n : rows compared.
    max_error : largest absolute difference; None where outputs are not finite or not of one shape.
    relative_error : that, relative to the largest absolute reference output.
    mean_error : mean absolute difference, relative to the standard deviation of the reference outputs.
    agreement : part of the rows with the same largest class, or of their positions, the worse of both where either the
        second or the last dimension may count classes; None where the largest output names none.
    reason : why it did not pass, else empty.
    worst_line : largest mean absolute difference of a line of outputs (the classes of one row at one position),
        relative to the standard deviation of all.
    instability : of the in-framework model, where it was asked for: see `parity`.
    outputs : how many outputs were compared; the figures are those of the worst.
    output : its name; empty where there is only one.
    each : where there are several, how each of them differs, in their order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    passed: bool
    integer: bool
    n: int
    max_error: float | None
    relative_error: float | None
    mean_error: float | None
    agreement: float | None
    reason: str = ""
    worst_line: float | None = None
    instability: float | None = None
    outputs: int = 1
    output: str = ""
    each: tuple[Parity, ...] = ()

    @property
    def gross(self) -> bool:
        """Whether the difference is none that rounding can make."""
        if self.passed:
            return False
        if not self.integer or self.mean_error is None:
            return True
        return self.mean_error > GROSS / 2 or (self.worst_line or 0.0) > GROSS

    def __str__(self) -> str:
        if not self.passed:
            return f"failed on {self.n:,} rows: {self.reason}"
        error = self.relative_error
        error_text = "" if error is None else f", largest error {error:.2g} of the largest output"
        unstable = (
            ""
            if self.instability is None or self.mean_error is None
            else f"; outputs differ on average by {self.mean_error:.2g} of their spread, where those of the model by "
            f"itself move by {self.instability:.2g}"
        )
        return f"passed on {self.n:,} rows{error_text}{unstable}"


def compare(
    references: Sequence[np.ndarray],
    artifacts: Sequence[np.ndarray],
    integer: bool = False,
    known: Sequence[Output] = (),
    spreads: Sequence[float] | None = None,
    echoes: Sequence[np.ndarray] | None = None,
) -> Parity:
    """The worst `parity` of all outputs of a model and of its artifact; their number, dtypes and shapes count too.

    Parameters
    ----------
    known : what each output is called and means; one whose kind is not known may name classes. By default they are
        called by their positions.
    spreads, echoes : of each output, see `parity`.
    """
    n = len(references[0]) if references and references[0].ndim else 1
    if len(references) != len(artifacts):
        return _different(f"the artifact gives {len(artifacts)} outputs, the model {len(references)}", integer, n)
    if not references:
        return _different("the model has no outputs", integer, n, 0)
    each = []
    known = known or bare((), references)
    wide: Sequence[float | None] = [None] * len(known) if spreads is None else spreads
    again: Sequence[np.ndarray | None] = [None] * len(known) if echoes is None else echoes
    for output, reference, artifact, spread, echo in zip(known, references, artifacts, wide, again, strict=True):
        if reference.shape != artifact.shape or reference.dtype != artifact.dtype:
            kinds = [f"{x.dtype}{x.shape}" for x in (artifact, reference)]
            result = _different(f"the artifact gives {kinds[0]}, the model {kinds[1]}", integer, n)
        elif not reference.size:
            result = _different(f"it is empty, {reference.shape}", integer, n)
        else:
            axis = None if output.assumed else output.axis
            classes = output.kind in (None, "classes")
            result = parity(reference, artifact, integer, classes, axis, spread, echo)
        if len(references) > 1:
            reason = f"output {output.name!r}: {result.reason}" if result.reason else ""
            result = result.model_copy(update={"output": output.name, "reason": reason})
        each.append(result)
    worst = max(each, key=_badness)
    several = tuple(each) if len(each) > 1 else ()
    return worst.model_copy(update={"outputs": len(references), "each": several})


def parity(
    reference_outputs: np.ndarray,
    artifact_outputs: np.ndarray,
    integer: bool = False,
    classes: bool = True,
    class_axis: int | None = None,
    spread: float | None = None,
    echo: np.ndarray | None = None,
) -> Parity:
    """Compare one output ``(n, …)`` of the in-framework model and of its artifact.

    A float artifact passes if no output differs by more than `FLOAT_TOLERANCE` of the largest, nor by more than
    `FLOAT_SLICE` of the largest of its row, channel or position. An integer one, whose roundings may fall on the other
    side, passes if outputs differ
    on average by no more than `INTEGER_TOLERANCE` of their spread, in every line by no more than `INTEGER_WORST` of it,
    in every slice by no more than `INTEGER_WORST` of its own, and `INTEGER_AGREEMENT` of the classes stay; a change
    between two classes which the reference has closer together than roundings of that size can move is no loss. Outputs
    that are integers themselves are equal in a float artifact, and in `INTEGER_AGREEMENT` of the places in an integer
    one. The same infinity at the same place is no difference; not-a-number always is.

    Where roundings follow roundings, one that falls on the other side can turn many behind it, until the answer has
    roundings of its own, as far from the simulation's as that is from another simulation of the same network. How far
    that is, its *instability*, is the mean absolute difference of `echo`, relative to the spread; an integer artifact
    may be `UNSTABLE` times as far on average.

    Parameters
    ----------
    integer : whether the artifact computes in integers (`reference_outputs` then simulate them).
    classes : whether the largest output names a class; False (regression, embeddings) leaves the agreement out.
    class_axis : the axis of classes where the outputs have more than two dimensions; None tries the second and the
        last.
    spread : the outputs' standard deviation on more inputs, which counts where there are fewer than 8 numbers here: one
        number has none.
    echo : what the simulation answers when its floats move by no more than their arithmetic makes them, of the same
        shape.
    """
    if reference_outputs.shape != artifact_outputs.shape or not reference_outputs.size:
        raise SlimlineError(
            f"The artifact gives outputs of shape {artifact_outputs.shape}, the model {reference_outputs.shape}: "
            "its shape must be the same in both, for at least one row."
        )
    reference = np.atleast_1d(reference_outputs).astype(np.float64)
    artifact = np.atleast_1d(artifact_outputs).astype(np.float64)
    n, counted = len(reference), reference_outputs.dtype.kind in "biu"
    axes = _class_axes(reference, class_axis) if classes and not counted else ()
    same = min((float(agreement(artifact, reference, axis).mean()) for axis in axes), default=None)
    endless = np.isinf(reference) & (reference == artifact)
    reference[endless] = artifact[endless] = 0.0
    if not (np.isfinite(reference).all() and np.isfinite(artifact).all()):
        whose = "model's" if not np.isfinite(reference).all() else "artifact's"
        return _different(f"the {whose} outputs are not all finite", integer, n).model_copy(update={"agreement": same})
    error = np.abs(artifact - reference)
    largest = float(error.max())
    if spread is None or reference.size >= _ENOUGH:
        spread = float(reference.std())
    spread = max(spread, _TINY)
    relative = largest / max(float(np.abs(reference).max()), _TINY)
    mean, line = float(error.mean()) / spread, float(_lines(error).max()) / spread
    restless = np.array([]) if echo is None or counted else _restless(reference, echo)
    instability = float(restless.mean()) / spread if restless.size else None
    if counted:
        moved = float((error != 0).mean())
        reasons = _moved(moved, 1 - INTEGER_AGREEMENT if integer else 0.0)
    elif integer:
        tolerance = max(INTEGER_TOLERANCE, min(UNSTABLE * (instability or 0.0), GROSS / 2))
        tie = 2 * INTEGER_TOLERANCE * spread
        if restless.size:  # between classes that the simulation takes for one another by itself
            tie = max(tie, UNSTABLE * float(np.quantile(restless, 0.99)))
        reasons = _rounded(reference, artifact, error, axes, mean, line, spread, tolerance, tie)
    else:
        reasons = _exact(reference, error, relative)
    return Parity(
        passed=not reasons,
        integer=integer,
        n=n,
        max_error=largest,
        relative_error=relative,
        mean_error=mean,
        agreement=same,
        reason="; ".join(reasons),
        worst_line=line,
        instability=instability,
    )


def _different(reason: str, integer: bool, n: int, outputs: int = 1) -> Parity:
    """The verdict where numbers cannot even be compared."""
    return Parity(
        passed=False,
        integer=integer,
        n=n,
        max_error=None,
        relative_error=None,
        mean_error=None,
        agreement=None,
        reason=reason,
        outputs=outputs,
    )


def _badness(parity: Parity) -> tuple[bool, float]:
    error = parity.mean_error if parity.integer else parity.relative_error
    return not parity.passed, np.inf if error is None else error


def _class_axes(reference: np.ndarray, class_axis: int | None) -> tuple[int, ...]:
    """The dimensions that may count classes."""
    if class_axis is None:
        candidates = {1, reference.ndim - 1} if reference.ndim > 1 else set()
    else:
        candidates = {class_axis % reference.ndim}
    return tuple(a for a in sorted(candidates) if reference.shape[a] > 1)


def _lines(error: np.ndarray) -> np.ndarray:
    """Mean errors along every dimension but the first, one after the other; of plain numbers the errors."""
    if error.ndim == 1:
        return error
    return np.concatenate([error.mean(axis).ravel() for axis in range(1, error.ndim)])


def _slices(array: np.ndarray, axis: int) -> np.ndarray:
    """``(indices, numbers)``: what each index of a dimension holds."""
    return np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)


def _name(axis: int, rank: int, index: int) -> str:
    return f"row {index}" if axis == 0 else f"column {index}" if rank == 2 else f"index {index} of dimension {axis}"


def common_spread(outputs: Iterable[np.ndarray]) -> float:
    """The standard deviation of all finite numbers of an output, on several inputs."""
    numbers = np.concatenate([np.ravel(x).astype(np.float64) for x in outputs])
    finite = numbers[np.isfinite(numbers)]
    return float(finite.std()) if finite.size else 0.0


def _restless(reference: np.ndarray, echo: np.ndarray) -> np.ndarray:
    """How far each output of a simulation moves by itself, those left out of which that cannot be said."""
    moved = np.abs(echo.astype(np.float64) - reference)
    return np.asarray(moved[np.isfinite(moved)])


def _exact(reference: np.ndarray, error: np.ndarray, relative: float) -> list[str]:
    """Why a float artifact does not pass."""
    if relative > FLOAT_TOLERANCE:
        return [f"an output differs by {relative:.2g} of the largest, more than {FLOAT_TOLERANCE:g}"]
    noise = FLOAT_NOISE * float(np.abs(reference).max())
    for axis in range(reference.ndim):
        most, size = _slices(error, axis).max(1), np.abs(_slices(reference, axis)).max(1)
        beyond = most - FLOAT_SLICE * size - noise
        if beyond.max() > 0:
            index = int(beyond.argmax())
            part = most[index] / max(size[index], _TINY)
            where = _name(axis, reference.ndim, index)
            return [f"{where} differs by {part:.2g} of its largest output, more than {FLOAT_SLICE:g}"]
    return []


def _rounded(
    reference: np.ndarray,
    artifact: np.ndarray,
    error: np.ndarray,
    axes: Sequence[int],
    mean: float,
    line: float,
    spread: float,
    tolerance: float,
    tie: float,
) -> list[str]:
    """Why an integer artifact does not pass."""
    reasons = []
    for axis in axes:
        named = np.take_along_axis(reference, artifact.argmax(axis, keepdims=True), axis)
        near = reference.max(axis, keepdims=True) - named <= tie
        if near.mean() < INTEGER_AGREEMENT:
            reasons.append(f"{100 * near.mean():.1f} % of the classes stay, fewer than {100 * INTEGER_AGREEMENT:g} %")
            break
    if mean > tolerance:
        reasons.append(f"outputs differ on average by {mean:.2g} of their spread, more than {tolerance:.2g}")
    if reasons:
        return reasons
    if line > INTEGER_WORST:
        reasons.append(f"the worst row or position differs by {line:.2g} of the spread, more than {INTEGER_WORST:g}")
    else:
        for axis in range(1, reference.ndim):
            if reference.size < _ENOUGH * reference.shape[axis]:
                continue
            off, own = _slices(error, axis).mean(1), _slices(reference, axis).std(1)
            beyond = off - INTEGER_WORST * own - tolerance * spread
            if beyond.max() > 0:
                index = int(beyond.argmax())
                part = off[index] / max(own[index], _TINY)
                where = _name(axis, reference.ndim, index)
                reasons.append(f"{where} differs by {part:.2g} of its own spread, more than {INTEGER_WORST:g}")
                break
    return reasons


def _moved(part: float, allowed: float) -> list[str]:
    return [f"{100 * part:.2g} % of the integers that it gives are others"] if part > allowed else []
