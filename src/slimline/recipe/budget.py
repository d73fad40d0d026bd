"""What a compression may cost and must reach."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, ValidationInfo, field_validator

from slimline.basics.errors import SlimlineError, shown
from slimline.basics.quantities import SIZE, TIME
from slimline.recipe.config import Config

Part = Annotated[float, Field(gt=0, le=1)]

KINDS = {"max_latency": TIME, "max_size": SIZE, "max_memory": SIZE}
"""Of the limits that may be given in absolute terms."""


class Budget(Config):
    """Limits on the compressed model; None sets no limit.

    A limit is a part of the original's on the same runtime, in (0, 1], or a text with a unit that says it in absolute
    terms. Times take ns, us, ms and s; sizes B, kB, MB, GB, KiB, MiB and GiB, where 1 kB is 1000 B and parts of a byte
    are left out. A text is kept in one spelling (times in ms, sizes in the largest decimal unit), so that budgets that
    mean the same are equal: ``"0.005 s"`` is kept as ``"5 ms"``.

    Attributes
    ----------
    max_drop : accuracy that may be lost, in parts of one (0.01 is one point), in [0, 1]; None only measures it.
    max_latency : median latency at the largest batch size, a part of the original's or a time a batch, such as
        ``"5 ms"``.
    max_size : bytes of the artifact, a part of the original's or a size, such as ``"2 MB"``.
    max_memory : most resident memory of a process that loads the artifact and runs it at the largest batch size, a part
        of the original's or a size. It is what reports show as peak memory: the interpreter and the runtime's own
        libraries are in it, so that of a small network hardly any part can be saved.
    max_macs : part of the original's multiply-accumulates, in (0, 1].
    confidence : of the bound on the drop, in (0.5, 1).
    """

    max_drop: Annotated[float, Field(ge=0, le=1)] | None = 0.01
    max_latency: Part | str | None = None
    max_size: Part | str | None = None
    max_memory: Part | str | None = None
    max_macs: Part | None = None
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95

    @field_validator(*KINDS, mode="before")
    @classmethod
    def _one_spelling(cls, value: Any, info: ValidationInfo) -> Any:
        """Text with a unit in its one spelling, text without one as the number that it is."""
        kind = KINDS[str(info.field_name)]
        wrong = SlimlineError(
            f"{info.field_name} is {shown(value)}: give a part of the original's such as 0.2, or {kind.name} such as "
            f"'{kind.example}'."
        )
        if isinstance(value, str):
            amount = kind.read(value)
            if amount is not None:
                return kind.write(amount)
            try:
                value = float(value)
            except ValueError:
                raise wrong from None
        if isinstance(value, int | float) and value > 1:
            raise wrong
        return value
