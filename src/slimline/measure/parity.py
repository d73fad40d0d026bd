"""The parity gate: does the artifact compute what the in-framework model computes?"""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel, ConfigDict

from slimline.errors import SlimlineError
from slimline.measure.accuracy import agreement

FLOAT_TOLERANCE = 1e-3
"""Largest absolute difference of a float artifact, relative to the largest reference output."""
INTEGER_AGREEMENT = 0.99
"""Least part of classes that an integer artifact must keep, near-ties aside."""
INTEGER_TOLERANCE = 0.05
"""Largest mean absolute difference of an integer artifact, relative to the outputs' standard deviation."""
_TINY = 1e-30  # instead of zero, where all reference outputs are equal


class Parity(BaseModel):
    """How an artifact's outputs differ from the in-framework model's on the same inputs.

    Attributes
    ----------
    passed : whether the artifact may be used.
    integer : which tolerances applied.
    n : rows compared.
    max_error : largest absolute difference; None where outputs are not finite.
    relative_error : that, relative to the largest absolute reference output.
    mean_error : mean absolute difference, relative to the standard deviation of the reference outputs.
    agreement : part of the rows with the same largest class; None where the largest output names none.
    reason : why it did not pass, else empty.
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

    def __str__(self) -> str:
        if not self.passed:
            return f"failed on {self.n:,} rows: {self.reason}"
        error = self.relative_error
        said = "" if error is None else f", largest error {error:.2g} of the largest output"
        return f"passed on {self.n:,} rows{said}"


def parity(
    reference_outputs: np.ndarray,
    artifact_outputs: np.ndarray,
    integer: bool = False,
    classes: bool = True,
    class_axis: int | None = None,
) -> Parity:
    """Compare outputs ``(n, …)`` of the in-framework model and of its artifact.

    A float artifact passes if no output differs by more than `FLOAT_TOLERANCE` of the largest. An integer one, whose
    roundings may fall on the other side, passes if outputs differ on average by no more than `INTEGER_TOLERANCE` of
    their spread and `INTEGER_AGREEMENT` of the classes stay; a change between two classes which the reference has
    closer together than roundings of that size can move is no loss.

    Parameters
    ----------
    integer : whether the artifact computes in integers (`reference_outputs` then simulate them).
    classes : whether the largest output names a class; False (regression, embeddings) leaves the agreement out.
    class_axis : the axis of classes where the outputs have more than two dimensions.
    """
    if reference_outputs.shape != artifact_outputs.shape or not reference_outputs.size:
        raise SlimlineError(
            f"The artifact gives outputs of shape {artifact_outputs.shape}, the model {reference_outputs.shape}: "
            "the first output must be the same in both, for at least one row."
        )
    n = len(reference_outputs)
    reference, artifact = reference_outputs.astype(np.float64), artifact_outputs.astype(np.float64)
    axis = 1 if class_axis is None and reference.ndim == 2 else class_axis
    same = None
    if classes and axis is not None and reference.shape[axis] > 1:
        same = float(agreement(artifact, reference, axis).mean())
    if not (np.isfinite(reference).all() and np.isfinite(artifact).all()):
        whose = "model's" if not np.isfinite(reference).all() else "artifact's"
        return Parity(
            passed=False,
            integer=integer,
            n=n,
            max_error=None,
            relative_error=None,
            mean_error=None,
            agreement=same,
            reason=f"the {whose} outputs are not all finite",
        )
    error = np.abs(artifact - reference)
    largest = float(error.max())
    relative = largest / max(float(np.abs(reference).max()), _TINY)
    mean = float(error.mean()) / max(float(reference.std()), _TINY)
    reasons = []
    if not integer and relative > FLOAT_TOLERANCE:
        reasons.append(f"an output differs by {relative:.2g} of the largest, more than {FLOAT_TOLERANCE:g}")
    if integer and axis is not None and same is not None:
        named = np.take_along_axis(reference, artifact.argmax(axis, keepdims=True), axis)
        near = reference.max(axis, keepdims=True) - named <= 2 * INTEGER_TOLERANCE * reference.std()
        if near.mean() < INTEGER_AGREEMENT:
            reasons.append(f"{100 * near.mean():.1f} % of the classes stay, fewer than {100 * INTEGER_AGREEMENT:g} %")
    if integer and mean > INTEGER_TOLERANCE:
        reasons.append(f"outputs differ on average by {mean:.2g} of their spread, more than {INTEGER_TOLERANCE:g}")
    return Parity(
        passed=not reasons,
        integer=integer,
        n=n,
        max_error=largest,
        relative_error=relative,
        mean_error=mean,
        agreement=same,
        reason="; ".join(reasons),
    )
