"""Structured pruning: what to remove for real."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from slimline.basics.errors import SlimlineError, shown
from slimline.recipe.config import Config
from slimline.recipe.criterion import Named, name_of, one_of
from slimline.recipe.layers import Globs, LayerPattern
from slimline.recipe.step import Ratio, Step

WITHOUT_DATA = ("l1", "l2", "batch_norm", "geometric_median", "random")
AxisKind = Literal["filters", "channels", "heads", "head_width", "mlp", "embedding"]
GRADIENTS = ("taylor", "fisher", "obd")
CRITERIA = (*WITHOUT_DATA, "obs", "feature_rank", *GRADIENTS)
CUT = ("l1", "l2", "random", "obs", "taylor")
"""Criteria that say something of one layer's inputs and of its kernel."""


def _multiple(value: Any) -> Any:
    if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise SlimlineError(f"round_to of ChannelPruning is {shown(value)} but must be 1 or more, or auto.")
    return value


Multiple = Annotated[int | Literal["auto"], BeforeValidator(_multiple)]


Axis = Literal[AxisKind, "inputs", "kernel"]


class ChannelOverride(Config):
    """What is another for some layers.

    Attributes
    ----------
    ratio : part of the units they carry that goes, in [0, 1).
    """

    ratio: Ratio


class ChannelPruning(Step):
    """Remove whole channels, filters, heads or embedding positions for real (structured pruning).

    Attributes
    ----------
    ratio : part of every unit (or, with a wider `scope`, of all units together) that goes, in [0, 1).
    criterion : what says how much a position matters.
        From the weights: ``l1``, ``l2`` (Li et al. 2017, arXiv:1608.08710, summed over every parameter slice of the
        unit), ``batch_norm`` (its scales, Liu et al. 2017, arXiv:1708.06519), ``geometric_median`` (He et al. 2019,
        arXiv:1811.00250), ``random``.
        From inputs: ``obs`` (optimal brain surgery: the error in the layers that read the positions, after least
        squares, Kurtic et al. 2023, arXiv:2302.04089), ``feature_rank`` (Lin et al. 2020, arXiv:2002.10179).
        From gradients: ``taylor`` (first order, Molchanov et al. 2019, arXiv:1906.10771), ``fisher`` (second order,
        Liu et al. 2021, arXiv:2108.00708), ``obd`` (diagonal second order, LeCun et al. 1989).
        Or a function ``(weight, gradient, gram) -> score``, itself or as ``package.module:function``, which takes the
        first one, two or three of: the weight and the loss's gradient as matrices ``(groups, outputs, inputs)``, the
        Gram matrix ``(groups, inputs, inputs)`` of the inputs; and gives ``(groups, outputs)``.
    loss : for gradients: ``cross_entropy`` (default, needs class labels), or the ``norm`` of the outputs.
    scope : ``local`` ranks inside each unit; ``global`` ranks all units together, scores divided by
        their unit's mean; ``isomorphic`` ranks together the units of equal topology (Fang et al. 2024,
        arXiv:2407.04616). The errors of ``obs`` compare as they are, by what a position saves of the target.
    target_macs, target_parameters : instead of `ratio`, the part of the original's that may stay, in (0, 1].
    round_to : keep a multiple of this many positions of each unit that has at least as many; ``auto`` times layers
        like the model's heaviest on the target and takes the smallest multiple that runs well (`rounding`).
    layers, keep : globs of the layers to prune (default all) and of those to leave alone.
    overrides : by pattern of layers, their own ``{"ratio": …}``; a unit takes that of the first pattern that one of its
        layers fits. What all other units lose is decided without them, but a target counts what is left of everything.
    axes : kinds of axes to prune, all by default: ``filters`` (or ``channels``), ``heads``, ``head_width``, ``mlp``,
        ``embedding``; see `slimline.graph.kinds`. Or one of two that a layer loses by itself (`cutting`):
        ``inputs``, the input channels that it alone reads no more, where other layers or the model's inputs keep them;
        ``kernel``, positions of its kernel, so that a smaller or dilated one is left. Theirs are the criteria ``l1``,
        ``l2``, ``random``, ``obs`` and ``taylor``.
    factors : of an axis that is a product, such as heads x head width or groups x group width, prune only
        the ``largest`` factor (of the named `axes`) or ``all`` of them.
    schedule : ``oneshot``; ``uniform`` or ``iterative`` prune in `rounds` equal parts of the remaining
        gap, ``iterative`` with the recovery step that follows run after every round.
    rounds : number of rounds of the last two.
    compensate : solve the layers that follow anew by least squares, on inputs alone, so that they give what they gave
        (`slimline.steps.channels.compensation`); by default with ``obs``.
    samples, batch_size : calibration samples that are read, and how many at a time.
    """

    kind = "structural"
    step: Literal["ChannelPruning"] = "ChannelPruning"
    ratio: Ratio | None = None
    criterion: Annotated[Named, one_of(CRITERIA)] = "l2"
    loss: Literal["cross_entropy", "norm"] | None = None
    scope: Literal["local", "global", "isomorphic"] = "local"
    target_macs: Annotated[float, Field(gt=0, le=1)] | None = None
    target_parameters: Annotated[float, Field(gt=0, le=1)] | None = None
    round_to: Multiple = 1
    layers: Globs = ("*",)
    keep: Globs = ()
    overrides: dict[LayerPattern, ChannelOverride] = Field(default_factory=dict)
    axes: tuple[Axis, ...] | None = None
    factors: Literal["largest", "all"] = "largest"
    schedule: Literal["oneshot", "uniform", "iterative"] = "oneshot"
    rounds: Annotated[int, Field(ge=1)] = 1
    compensate: bool | None = None
    samples: Annotated[int, Field(ge=1)] = 512
    batch_size: Annotated[int, Field(ge=1)] = 64

    @property
    def cut(self) -> Literal["inputs", "kernel"] | None:
        """What layers lose by themselves, if it is that which is asked for."""
        return next((axis for axis in ("inputs", "kernel") if axis in (self.axes or ())), None)

    @property
    def compensates(self) -> bool:
        """`compensate`, or what it is by default."""
        return self.criterion == "obs" if self.compensate is None else self.compensate

    @property
    def needs(self) -> tuple[str, ...]:
        return () if self.criterion in WITHOUT_DATA and not self.compensates else ("calibration",)

    @property
    def needs_gradients(self) -> bool:
        return self.criterion in GRADIENTS

    def misplaced(self, earlier: Sequence[str], following: Step | None) -> str:
        """See `Step`."""
        if self.schedule == "iterative" and (following is None or following.kind != "recovery"):
            return (
                "Iterative ChannelPruning recovers after every round: let a Distillation step follow, or use schedule: "
                "uniform."
            )
        return ""

    @model_validator(mode="after")
    def _one_goal(self) -> ChannelPruning:
        goals = [n for n in ("ratio", "target_macs", "target_parameters") if getattr(self, n) is not None]
        if len(goals) != 1:
            problem = " and ".join(goals) or "none"
            raise SlimlineError(f"ChannelPruning takes one of ratio, target_macs and target_parameters, not {problem}.")
        problem = "" if self.cut is None else _unfit(self, self.cut)
        if problem:
            raise SlimlineError(f"ChannelPruning with axes {self.cut} {problem}.")
        if self.schedule == "oneshot" and self.rounds != 1:
            raise SlimlineError(f"ChannelPruning in {self.rounds} rounds needs schedule: uniform or iterative.")
        return self


def _unfit(step: ChannelPruning, cut: str) -> str:
    """Which settings do not go with what layers lose by themselves."""
    if len(set(step.axes or ())) > 1:
        return f"takes no other axes: let a step of its own prune {cut}"
    if step.criterion not in CUT:
        return f"takes no criterion {name_of(step.criterion)}: choose one of {', '.join(CUT)}"
    if step.scope == "isomorphic":
        return "takes no scope isomorphic: choose local or global"
    if step.overrides:
        return "takes no overrides: let a step of its own prune these layers"
    if step.round_to == "auto" or (cut == "kernel" and step.round_to != 1):
        return f"takes no round_to: {step.round_to}: " + ("leave it out" if cut == "kernel" else "give a number")
    return ""
