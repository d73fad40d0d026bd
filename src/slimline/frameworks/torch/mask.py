"""The masked model of a plan: shapes stay, what would go is zero and left out of every statistic."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, fx

from slimline.basics.errors import SlimlineError
from slimline.frameworks.torch.native import Native, free_views, tensors
from slimline.frameworks.torch.operators import add_constant, argument, aten, packet

if TYPE_CHECKING:
    from slimline.graph.ir import Node
    from slimline.graph.removal import Removal

_DIVISORS = {
    **{f"aten.{name}": 1 for name in ("div", "divide", "true_divide", "floor_divide", "remainder", "fmod")},
    **{f"aten.{name}": 0 for name in ("reciprocal", "rsqrt", "pow", "log", "log2", "log10", "logit")},
}
"""Operators that make no number of a zero, and the argument of which they do not."""

Statistics = list[tuple[int, int, np.ndarray]]
"""Input index, dimension and keep mask, as `Removal.statistics` gives them."""


def mask(native: Native, plan: Removal) -> Native:
    """A copy of the same shapes that computes what `apply` would.

    Positions that go are zero in every parameter. Operators that average, normalise, contract or take a
    maximum over positions that go are made to see only those that stay.
    """
    result = copy.deepcopy(native)
    with torch.no_grad():
        for name, tensor in tensors(result).items():
            for dim, retained in enumerate(plan.retained(name)):
                if retained is not None and tensor.is_floating_point():
                    gone = np.setdiff1d(np.arange(tensor.shape[dim]), retained)
                    tensor.index_fill_(dim, torch.from_numpy(gone), 0.0)
    neutral = {node.name: node for node in plan.graph.nodes}
    for node in list(result.graph.nodes):
        if node.op != "call_function":
            continue
        if packet(node) == "aten._weight_norm":
            node.target = _weight_norm  # a direction of zeros has no norm to divide by
        elif node.name in neutral and (statistics := plan.statistics(node.name)):
            _Masker(result, plan, neutral[node.name], node, statistics).run()
        elif node.name in neutral and (position := _DIVISORS.get(packet(node).rstrip("_"))) is not None:
            _Masker(result, plan, neutral[node.name], node, []).fill_divisor(position)
    written = {node.name: node for node in result.graph.nodes}
    for name, step in neutral.items():
        if "/" in name and (statistics := plan.statistics(name)):  # a step of an operator that is read as several
            node = written[name.partition("/")[0]]
            if packet(node) == "aten.baddbmm":
                _Masker(result, plan, step, node, statistics, skip=1).run()
                continue
            raise SlimlineError(f"slimline cannot mask {step.label}: apply the plan, or keep that layer.")
    result.graph.lint()
    free_views(result)
    return result


class _Masker:
    """Makes one operator see only what stays; `skip` of its tensors come before those of the neutral one."""

    def __init__(
        self, native: Native, plan: Removal, neutral: Node, node: fx.Node, statistics: Statistics, skip: int = 0
    ) -> None:
        self.native, self.plan, self.neutral, self.node, self.statistics = native, plan, neutral, node, statistics
        self.skip = skip

    def run(self) -> None:
        handlers: dict[str, Callable[[], None]] = {
            "layer_norm": self._norm,
            "group_norm": self._norm,
            "batch_norm": self._batch_norm,
            "attention": self._attention,
            "reduce": self._reduce,
            "softmax": lambda: self._fill(-math.inf),
            "matmul": lambda: self._fill(0.0),
            "einsum": lambda: self._fill(0.0),
        }
        if self.neutral.kind not in handlers:
            raise SlimlineError(f"slimline cannot mask {self.neutral.label}: apply the plan, or keep that layer.")
        handlers[self.neutral.kind]()

    def _operand(self, index: int) -> fx.Node:
        """The fx node of an input of the neutral operator."""
        if packet(self.node) == "aten.einsum":
            return self.node.args[1][index]  # type: ignore[index, return-value]
        return [a for a in self.node.args if isinstance(a, fx.Node)][index + self.skip]

    def _set_operand(self, index: int, value: fx.Node) -> None:
        if packet(self.node) == "aten.einsum":
            operands = list(self.node.args[1])  # type: ignore[arg-type]
            operands[index] = value
            self.node.update_arg(1, operands)
        else:
            places = [k for k, a in enumerate(self.node.args) if isinstance(a, fx.Node)]
            self.node.update_arg(places[index + self.skip], value)

    def _constant(self, value: Tensor) -> fx.Node:
        name = add_constant(self.native, f"{self.node.name}_mask", value)
        with self.native.graph.inserting_before(self.node):
            return self.native.graph.get_attr(name)

    def _gone(self, index: int, dim: int, keep: np.ndarray) -> fx.Node:
        """Where the positions that go are, shaped to broadcast against the input."""
        shape = [1] * len(self._shape(index))
        shape[dim] = -1
        return self._constant(torch.from_numpy(~keep).reshape(shape))

    def _fill(self, value: float, only: Sequence[int] | None = None) -> None:
        """Overwrite what goes in the operands, so that the operator is not moved by it."""
        for index, dim, keep in self.statistics:
            if only is not None and dim not in only:
                continue
            gone = self._gone(index, dim, keep)
            with self.native.graph.inserting_before(self.node):
                filled = self.native.graph.call_function(aten.masked_fill.Scalar, (self._operand(index), gone, value))
            self._set_operand(index, filled)

    def fill_divisor(self, position: int) -> None:
        """Put ones for what goes into an argument that must not be zero."""
        argument = self.node.args[position]
        if not isinstance(argument, fx.Node):
            return
        index = [a for a in self.node.args if isinstance(a, fx.Node)].index(argument)
        for dim, retained in enumerate(self.plan.retained(self.neutral.inputs[index] or "")):
            if retained is not None:
                keep = np.isin(np.arange(self._shape(index)[dim]), retained)
                gone = self._gone(index, dim, keep)
                with self.native.graph.inserting_before(self.node):
                    argument = self.native.graph.call_function(aten.masked_fill.Scalar, (argument, gone, 1.0))
        self.node.update_arg(position, argument)

    def _shape(self, index: int) -> tuple[int, ...]:
        return self.plan.graph.values[self.neutral.inputs[index] or ""].shape

    def _reduce(self) -> None:
        function = self.neutral.attributes["function"]
        if function in ("var", "std", "var_mean", "std_mean"):
            self._moments(function)
            return
        self._fill({"max": -math.inf, "logsumexp": -math.inf, "min": math.inf, "prod": 1.0}.get(function, 0.0))
        if function == "mean":
            factor = math.prod(len(keep) / int(keep.sum()) for _, _, keep in self.statistics)
            with self.native.graph.inserting_after(self.node):
                scaled = self.native.graph.call_function(aten.mul.Scalar, (self.node, factor))
            self.node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)

    def _moments(self, function: str) -> None:
        """The same variance, or deviation, over what stays."""
        names = [a.name for a in self.node.target._schema.arguments]  # type: ignore[union-attr]
        free = int(bool(argument(self.node, "unbiased"))) if "unbiased" in names else argument(self.node, "correction")
        axes = list(self.neutral.attributes["axes"])
        keep = "keepdim" in names and argument(self.node, "keepdim")
        constant = self._constant(self._retained_mask())
        self.node.target = _masked_moments
        self.node.args = (self.node.args[0], constant, axes, 1 if free is None else free, keep, function)
        self.node.kwargs = {}

    def _retained_mask(self) -> Tensor:
        """1 where all of the first operand's dimensions keep a position, of its rank, to broadcast against it."""
        rank = len(self.plan.graph.values[self.neutral.inputs[0] or ""].shape)
        keep = torch.ones([1] * rank)
        for index, dim, stays in self.statistics:
            if index == 0:
                sides = [1] * rank
                sides[dim] = -1
                keep = keep * torch.from_numpy(stays).to(keep.dtype).reshape(sides)
        return keep

    def _batch_norm(self) -> None:
        """By the statistics of what stays of the input."""
        node = self.node
        constant = self._constant(self._retained_mask())
        node.args = (node.args[0], constant, argument(node, "weight"), argument(node, "bias"), argument(node, "eps"))
        node.target, node.kwargs = _masked_batch_norm, {}

    def _attention(self) -> None:
        rank = len(self.plan.graph.values[self.neutral.inputs[0] or ""].shape)
        lost = next((keep for i, d, keep in self.statistics if i == 1 and d == rank - 2), None)
        self._fill(0.0, only=(rank - 1,))
        if lost is None:
            return
        if argument(self.node, "is_causal"):
            raise SlimlineError(f"slimline cannot mask keys of a causal {self.neutral.label}: apply the plan.")
        bias = self._constant(torch.where(torch.from_numpy(lost), 0.0, -math.inf))
        attn_mask = argument(self.node, "attn_mask")
        with self.native.graph.inserting_before(self.node):
            bias = self.native.graph.call_function(_add_bias, (self._operand(0), self._operand(1), attn_mask, bias))
        self.node.args = (*self.node.args[:3], bias, *self.node.args[4:])
        self.node.kwargs = {k: v for k, v in self.node.kwargs.items() if k != "attn_mask"}

    def _norm(self) -> None:
        """The same norm with its mean and variance over what stays."""
        node = self.node
        shape = self.plan.graph.values[self.neutral.inputs[0] or ""].shape
        keep = torch.ones(shape[1:], dtype=torch.bool)
        for _, dim, stays in self.statistics:
            sides = [1] * len(keep.shape)
            sides[dim - 1] = -1
            keep = keep & torch.from_numpy(stays).reshape(sides)
        groups, centred = 0, packet(node) != "aten.rms_norm"
        if self.neutral.kind == "group_norm":
            groups = argument(node, "num_groups")
        else:
            keep = keep[(0,) * (keep.dim() - len(argument(node, "normalized_shape")))]
        scale = argument(node, "weight")
        shift = argument(node, "bias") if centred else None
        eps = argument(node, "eps")
        constant = self._constant(keep.to(torch.float32))
        source = node.args[0]
        node.target = _masked_norm
        node.args = (
            source,
            constant,
            scale,
            shift,
            torch.finfo(torch.float32).eps if eps is None else eps,
            groups,
            centred,
        )
        node.kwargs = {}


def _masked_norm(
    x: Tensor, keep: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float, groups: int, centred: bool
) -> Tensor:
    """Layer, RMS (not `centred`) or group norm (`groups` > 0) over the positions where `keep` is 1."""
    whole = x.shape
    if groups:
        x, keep = (t.reshape(*t.shape[: -len(whole) + 1], groups, -1) for t in (x, keep))
        axes = [-1]
    else:
        axes = list(range(-keep.dim(), 0))
    count = keep.sum(axes, keepdim=True).clamp_min(1.0)
    mean = (x * keep).sum(axes, keepdim=True) / count if centred else x.new_zeros(())
    centre = (x - mean) * keep
    y: Tensor = centre * torch.rsqrt(centre.square().sum(axes, keepdim=True) / count + eps)
    if groups:
        y = y.reshape(whole)
        sides = [-1] + [1] * (len(whole) - 2)
        scale, shift = (None if t is None else t.reshape(sides) for t in (scale, shift))
    if scale is not None:
        y = y * scale
    return y if shift is None else y + shift


def _masked_moments(
    x: Tensor, keep: Tensor, axes: list[int], correction: float, keepdim: bool, function: str
) -> Tensor | tuple[Tensor, Tensor]:
    """``var``, ``std``, ``var_mean`` or ``std_mean`` over the positions of `axes` where `keep` is 1."""
    keep = keep.expand(x.shape)
    count = keep.sum(axes, keepdim=True).clamp_min(1.0)
    mean = (x * keep).sum(axes, keepdim=True) / count
    spread: Tensor = ((x - mean) * keep).square().sum(axes, keepdim=True) / (count - correction).clamp_min(0.0)
    if function.startswith("std"):
        spread = spread.sqrt()
    if not keepdim:
        mean, spread = (t.squeeze(axes) for t in (mean, spread))
    return (spread, mean) if function.endswith("_mean") else spread


def _masked_batch_norm(x: Tensor, keep: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float) -> Tensor:
    """Batch norm by the input's own statistics, over the positions where `keep` is 1."""
    axes = [d for d in range(x.dim()) if d != 1]
    variance, mean = _masked_moments(x, keep, axes, 0.0, True, "var_mean")
    y: Tensor = (x - mean) * torch.rsqrt(variance + eps)
    sides = [-1] + [1] * (x.dim() - 2)
    if scale is not None:
        y = y * scale.reshape(sides)
    return y if shift is None else y + shift.reshape(sides)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``g v / |v|`` with the norm over all dimensions but `dim`, 0 where v is."""
    axes = [d for d in range(v.dim()) if d != dim % v.dim()]
    norm: Tensor = torch.linalg.vector_norm(v, dim=axes, keepdim=True)
    return v * (g / norm.clamp_min(torch.finfo(v.dtype).tiny))


def _add_bias(query: Tensor, key: Tensor, attn_mask: Tensor | None, bias: Tensor) -> Tensor:
    """An attention mask that also leaves out the keys whose bias is minus infinity."""
    if attn_mask is None:
        return bias.expand(query.shape[-2], key.shape[-2])
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=bias.dtype).masked_fill(~attn_mask, -math.inf)
    return attn_mask + bias
