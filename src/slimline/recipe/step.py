"""What all steps share.

A step says what is wanted; `slimline.apply` does it. Layers are named by fnmatch globs on the user's
own names (``stages.*.conv1``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from slimline.basics.errors import SlimlineError, shown
from slimline.recipe.config import Config

Ratio = Annotated[float, Field(ge=0, lt=1)]
Kind = Literal["structural", "sparse", "sharing", "training", "recovery", "quantization"]


class Step(Config):
    """What all steps share.

    Attributes
    ----------
    kind : decides what may follow what (`slimline.recipe.recipe.ORDER`).
    refines : names of steps behind which it has a meaning although their kinds say that it has none.
    step : the name of its class, as recipes write it.
    needs : the roles of the samples the step reads (`slimline.data.ROLES`).
    """

    kind: ClassVar[Kind]
    refines: ClassVar[tuple[str, ...]] = ()
    step: str

    @property
    def needs(self) -> tuple[str, ...]:
        return ()

    @property
    def computes_in_integers(self) -> bool:
        """Whether it is to have the runtime multiply in integers."""
        return False

    @property
    def needs_gradients(self) -> bool:
        """Whether it trains, or reads gradients of the network."""
        return False

    @property
    def reads_together(self) -> int | None:
        """How many samples it must get in one batch; None where any number will do."""
        return None

    def joins(self, following: Step) -> bool:
        """Whether it does its work together with the step right behind it."""
        return following.kind == "recovery"

    def misplaced(self, earlier: Sequence[str], following: Step | None) -> str:
        """Why it has no meaning between these, as a sentence that says where it should stand; '' where it has one.

        Parameters
        ----------
        earlier : names of the steps before it, of those that the model went through too.
        following : the step right behind it.
        """
        return ""


def are_steps(name: str, value: Any) -> None:
    """Refuse an argument that is neither a step nor several; see `slimline.basics.arguments.takes`."""
    for each in value if isinstance(value, Sequence) and not isinstance(value, str) else (value,):
        if not isinstance(each, Step):
            what = each.__name__ if isinstance(each, type) else shown(each)
            raise SlimlineError(f"{what} is no step: give one or a list, such as slimline.ChannelPruning(ratio=0.5).")
