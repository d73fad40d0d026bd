"""Rounding to formats whose numbers are learned (LSQ: Esser et al. 2020, arXiv:1902.08153).

Scales are learned as factors on those they start with, by their logarithm (Jain et al. 2020, arXiv:1903.08066): they
stay positive, and a step of the optimiser means the same of small and large ones. Zero points are learned as shifts
(LSQ+: Bhalgat et al. 2020, arXiv:2004.09576). Clipping values are plain factors, which a trainer decays like weights
(PACT: Choi et al. 2018, arXiv:1805.06085). Gradients go straight through the rounding; beyond the ends of a grid they
reach its ends instead. On levels they always reach a weight; those below zero can have a factor of their own (TTQ: Zhu
et al. 2017, arXiv:1612.01064). An activation of which signs are left has gradients between plus and minus their size
(Rastegari et al. 2016, arXiv:1603.05279). Weights can also move between the codes below and above them alone, by a
rectified sigmoid (AdaRound: Nagel et al. 2020, arXiv:2004.10568).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from slimline.basics.errors import SlimlineError
from slimline.frameworks.base import Array
from slimline.frameworks.torch.native import shapes_of, sharing
from slimline.graph.edits import LearnRounding
from slimline.graph.quantization import Quantization
from slimline.methods.adaround import GAIN, PARTS, STRETCH, exponent
from slimline.methods.formats import IntegerGrid, Levels, Scaled, spread
from slimline.methods.levels import SKEWS, skewed
from slimline.methods.scales import SMALLEST, learning_speeds, zero_learns

_NAME = "learned_rounding"
_PIECE = 1 << 14


def _pieces(scale: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of tensors of one shape that are worked on one after the other, so that a processor holds in its cache all
    that comes up between them; the whole of them where blocks have numbers of their own, or on another device."""
    first = tensors[0]
    dims = (0, 2, 3, 1) if first.dim() == 4 and first.is_contiguous(memory_format=torch.channels_last) else None
    rows = [x if dims is None else x.permute(dims) for x in tensors]
    if scale.numel() > 1 or first.device.type != "cpu" or not all(x.is_contiguous() for x in rows):
        yield tensors
    else:
        yield from zip(*(torch.split(x.view(-1), _PIECE) for x in rows), strict=True)


class _Grid(torch.autograd.Function):
    """``(clip(round(x / scale), low - zero, high - zero)) * scale`` of the type of `x`; `zero` holds whole numbers.

    With `clips` the scale learns from what is beyond the ends alone, as if nothing were rounded between them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int, clips: bool = False) -> Tensor:
        ctx.save_for_backward(x, scale, zero)
        ctx.ends, ctx.clips = (low, high), clips
        rounded = torch.empty_like(x)
        for x_, rounded_ in _pieces(scale, x, rounded):
            rounded_.copy_(_clipped(x_, scale, zero, low, high)[1].round_().mul_(scale))
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero = ctx.saved_tensors
        (gradient,) = gradients
        if gradient.stride() != x.stride():
            gradient = torch.empty_like(x).copy_(gradient)
        by_x, by_scale = torch.empty_like(x), torch.zeros_like(scale)
        by_zero = torch.zeros_like(zero) if ctx.needs_input_grad[2] else None
        for x_, gradient_, by_x_ in _pieces(scale, x, gradient, by_x):
            units, clipped = _clipped(x_, scale, zero, *ctx.ends)
            beyond = (units - clipped).sign_().square_()  # in floats: comparing takes far longer
            codes = clipped.round()
            slope = codes * beyond if ctx.clips else (codes - clipped).addcmul_(codes, beyond)
            by_scale += slope.mul_(gradient_).sum_to_size(scale.shape)
            lost = beyond.mul_(gradient_)
            torch.sub(gradient_, lost, out=by_x_)
            if by_zero is not None:
                by_zero -= lost.mul_(scale).sum_to_size(zero.shape)
        return by_x, by_scale, by_zero, None, None, None


def _clipped(x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """``x / scale``, and the same within the ends of the grid."""
    units = x.to(scale.dtype) / scale
    if zero.numel() == 1 and zero.device.type == "cpu":
        whole = int(zero)  # by plain numbers it is done much faster
        return units, units.clamp(low - whole, high - whole)
    return units, units.clamp(low - zero, high - zero)


class _Nearest(torch.autograd.Function):
    """``codebook[nearest(x / scale)] * scale``; with `ends` no gradient reaches `x` beyond the outer levels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, bounds: Tensor, codebook: Tensor, ends: bool = False) -> Tensor:
        units = (x / scale).contiguous()
        codes = torch.bucketize(units, bounds)
        levels = codebook[codes]
        ctx.inside = (units >= codebook[0]) & (units <= codebook[-1]) if ends else None
        ctx.save_for_backward(levels, scale, codes, codebook)
        return levels * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        levels, scale, codes, codebook = ctx.saved_tensors
        by_level = None
        if ctx.needs_input_grad[3]:
            by_level = torch.zeros_like(codebook).index_add_(0, codes.flatten(), (gradient * scale).flatten())
        by_x = gradient if ctx.inside is None else gradient * ctx.inside
        return by_x, (gradient * levels).sum_to_size(scale.shape), None, by_level, None


class _Soft(torch.autograd.Function):
    """A rectified sigmoid `h`, with the gradient of ``strength * (1 - |2h - 1| ** exponent)`` added to that of the
    loss."""

    @staticmethod
    def forward(ctx: Any, logit: Tensor, strength: float, exponent: float | None) -> Tensor:
        top, bottom = STRETCH
        sigmoid = logit.sigmoid()
        soft = (sigmoid * (top - bottom) + bottom).clamp(0, 1)
        ctx.save_for_backward(sigmoid, soft)
        ctx.strength, ctx.exponent = strength, exponent
        return soft

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = gradients
        sigmoid, soft = ctx.saved_tensors
        if ctx.exponent is not None:
            away = 2 * soft - 1
            slope = slope - ctx.strength * 2 * ctx.exponent * away.sign() * away.abs() ** (ctx.exponent - 1)
        inside = (soft > 0) & (soft < 1)
        return slope * inside * sigmoid * (1 - sigmoid) * (STRETCH[0] - STRETCH[1]), None, None


class LearnedRounding(nn.Module):
    """Rounds to a format that is learned.

    Parameters
    ----------
    each : the format to start from.
    count : numbers that are rounded; of an activation those of a sample.
    fixed : whether it stays.
    drop : part of the numbers, drawn anew each time, that are not rounded in training.
    clips : whether the end of the grid learns (PACT), instead of its steps.
    skews : whether levels below zero learn a factor of their own (TTQ).
    ends : of levels, whether gradients stop beyond the outer ones.
    soft : of a weight that moves between two codes its shape, the strength of the penalty and the passes of training.
    """

    scale: Tensor
    speed: Tensor
    zero: Tensor
    bounds: Tensor
    codebook: Tensor
    turn: Tensor

    def __init__(
        self,
        each: Scaled,
        count: int,
        fixed: bool = False,
        drop: float = 0.0,
        clips: bool = False,
        skews: bool = False,
        ends: bool = False,
        soft: tuple[Sequence[int], float, int] | None = None,
    ) -> None:
        super().__init__()
        self.ends = ends
        self.each, self.fixed, self.drop, self.clips = each, fixed, drop, clips and not fixed
        self.register_buffer("scale", torch.tensor(each.scale).reshape(-1))
        self.register_buffer("speed", torch.tensor(learning_speeds(each, count)))
        if self.clips:
            # Of two dimensions, as the optimiser decays what is no vector.
            self.clip = nn.Parameter(torch.ones_like(self.scale)[:, None])
        elif not fixed:
            self.log_step = nn.Parameter(torch.zeros_like(self.scale))
        if isinstance(each, Levels):
            self.register_buffer("bounds", torch.tensor(each.bounds))
            self.register_buffer("codebook", torch.tensor(each.codebook))
            if skews and not fixed:
                self.log_skew = nn.Parameter(torch.zeros(1))
            return
        assert isinstance(each, IntegerGrid)
        self.register_buffer("zero", torch.tensor(each.zero.astype(np.float32)))
        if soft is not None:
            shape, self.strength, self.turns = soft
            self.moves = nn.Parameter(torch.zeros(*shape))
            self.register_buffer("turn", torch.zeros((), dtype=torch.int64))
        if zero_learns(each) and not fixed and not clips:
            self.shift = nn.Parameter(torch.zeros_like(self.zero.reshape(-1)))

    def forward(self, x: Tensor) -> Tensor:
        """`x`, rounded."""
        rounded = self._rounded(x)
        return torch.where(torch.rand_like(x) < self.drop, x, rounded) if self.drop and self.training else rounded

    def _rounded(self, x: Tensor) -> Tensor:
        scale = self._spread(self._scale(), x)
        if isinstance(self.each, Levels):
            return _Nearest.apply(x.float(), scale, *self._levels(), self.ends).to(x.dtype)  # type: ignore[no-untyped-call,no-any-return]
        if hasattr(self, "moves"):
            return self.between(x, hard=not self.training).to(x.dtype)
        zero = self._spread(self._zero(), x)
        return _Grid.apply(x, scale, zero, self.each.low, self.each.high, self.clips)  # type: ignore[no-untyped-call,attr-defined,no-any-return]

    def between(self, x: Tensor, hard: bool) -> Tensor:
        """`x`, each of its numbers somewhere between the codes below and above it, or where `hard` at one of them; what
        is zero stays so."""
        each = self.each
        assert isinstance(each, IntegerGrid)
        scale, zero = self._spread(self._scale(), x), self._spread(self._zero(), x)
        units = x.detach().float() / scale
        down = units.floor().clamp(each.low - zero, each.high - zero)
        top, bottom = STRETCH
        part = (units - down).clamp(*PARTS)
        logit = GAIN * self.moves - ((top - bottom) / (part - bottom) - 1).log()
        if hard:
            up = (logit > 0).float()
        else:
            up = _Soft.apply(logit, self.strength, exponent(int(self.turn) / max(self.turns, 1)))  # type: ignore[no-untyped-call]
            self.turn += 1
        free = (down < each.high - zero) & (units != 0)
        return torch.where(free, down + up, down) * scale

    def format(self) -> Scaled:
        """As it is now."""
        with torch.no_grad():
            scale, zero = self._scale().cpu().numpy(), self._zero().cpu().numpy()
        learned = replace(self.each, scale=scale.reshape(self.each.scale.shape).astype(np.float32))
        if isinstance(learned, IntegerGrid) and learned.zero_point is not None:
            learned = replace(learned, zero_point=zero.reshape(learned.scale.shape).astype(np.int32))
        if isinstance(learned, Levels) and hasattr(self, "log_skew"):
            learned = skewed(learned, float(self._skew().detach()))
        return learned

    def _skew(self) -> Tensor:
        """Of levels below zero, the factor; it learns as fast as a scale of all the tensor would."""
        slowed = self.log_skew * self.speed.mean() / math.sqrt(self.speed.numel())
        return (slowed + (self.log_skew - slowed).detach()).exp().clamp(*SKEWS)

    def _levels(self) -> tuple[Tensor, Tensor]:
        """The middles between levels, and the levels."""
        if not hasattr(self, "log_skew"):
            return self.bounds, self.codebook
        levels = torch.where(self.codebook < 0, self.codebook * self._skew(), self.codebook)
        wide = levels.detach().double()
        return ((wide[:-1] + wide[1:]) / 2).float(), levels

    def _scale(self) -> Tensor:
        if self.fixed:
            return self.scale
        if self.clips:
            return (self.scale * self.clip[:, 0]).clamp(min=SMALLEST)
        slowed = self.log_step * self.speed
        step = slowed + (self.log_step - slowed).detach()
        return (self.scale * step.exp()).clamp(min=SMALLEST)

    def _zero(self) -> Tensor:
        """Whole numbers, within the codes."""
        if not isinstance(self.each, IntegerGrid):
            return torch.zeros(())
        if not hasattr(self, "shift"):
            return self.zero.reshape(-1)
        # A shift of one is all of the range, so that a step of the optimiser means the same of few and many codes.
        moved = self.zero.reshape(-1) + self.shift * (self.each.high - self.each.low)
        near = moved.clamp(self.each.low, self.each.high)
        return near + (near.round() - near).detach()

    def _spread(self, numbers: Tensor, x: Tensor) -> Tensor:
        """One number per block, so that they broadcast against `x`."""
        each = self.each
        if all(block in (None, 1) for block in each.blocks):
            return numbers.reshape(each.scale.shape)
        own = np.arange(each.scale.size).reshape(each.scale.shape)
        return numbers[torch.from_numpy(spread(own, each.blocks, x.shape)).to(numbers.device)]


def learn(native: fx.GraphModule, edit: LearnRounding, example: tuple[Any, ...]) -> fx.GraphModule:
    """A copy that rounds the named activations and weights to formats that are learned."""
    formats = edit.quantization
    weights = {n.name for n in native.graph.nodes if n.op == "get_attr" and n.target in formats.weights}
    shapes = shapes_of(native, weights.union(formats.activations), example)
    learning = sharing(native)
    graph = learning.graph
    nodes = {node.name: node for node in graph.nodes}
    first = next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr"))
    modules: dict[str, str] = {}

    def put(node: fx.Node, each: Any, key: str, **settings: Any) -> None:
        if not isinstance(each, IntegerGrid | Levels):
            raise SlimlineError(f"PyTorch does not learn {each.describe()}: choose integers or levels.")
        if key not in modules:
            modules[key] = f"{_NAME}_{len(modules)}"
            sizes = shapes[node.name][int(node.op != "get_attr") :]
            module = LearnedRounding(each, math.prod(sizes), **settings).train(learning.training)
            learning.add_submodule(modules[key], module)
        readers = [user for user in node.users if user.op != "call_module"]
        rounded = graph.call_module(modules[key], (node,))
        rounded.meta = dict(node.meta)
        for user in readers:
            user.replace_input_with(node, rounded)

    for name, each in formats.activations.items():
        if name not in nodes:
            raise SlimlineError(f"The model computes no value called {name!r}: quantize the model that was calibrated.")
        node = nodes[name]
        with graph.inserting_before(first if node.op == "placeholder" else node.next):
            key = f"value {edit.shared.get(name, name)}"
            own: dict[str, Any] = {
                "fixed": name in edit.fixed,
                "drop": edit.drop,
                "clips": name in edit.clipped,
                "ends": True,
            }
            put(node, each, key, **own)
    for node in nodes.values():
        if node.name in weights:
            name = str(node.target)
            with graph.inserting_before(first):
                own = {"fixed": name in edit.fixed, "skews": name in edit.skewed}
                if name in edit.softened:
                    own |= {"fixed": True, "soft": (shapes[node.name], edit.softened[name], edit.turns)}
                put(node, formats.weights[name], f"weight {name}", **own)
    learning.recompile()
    return learning


def learned(native: fx.GraphModule, quantization: Quantization) -> Quantization:
    """`quantization`, with the formats that a model of `learn` has now."""
    by_name: dict[str, Any] = {}
    for node in native.graph.nodes:
        module = native.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, LearnedRounding):
            source = node.args[0]
            by_name[str(source.target if source.op == "get_attr" else source.name)] = module.format()
    return replace(
        quantization,
        activations={name: by_name[name] for name in quantization.activations},
        weights={name: by_name[name] for name in quantization.weights},
    )


def softened(native: fx.GraphModule) -> dict[str, Array]:
    """The weights that move between two codes in a model of `learn`, at the code that each number is nearer to."""
    held: dict[str, Array] = {}
    for node in native.graph.nodes:
        module = native.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, LearnedRounding) and hasattr(module, "moves"):
            owner, _, leaf = str(node.args[0].target).rpartition(".")
            with torch.no_grad():
                weight = getattr(native.get_submodule(owner), leaf)
                held[str(node.args[0].target)] = module.between(weight, hard=True).cpu().numpy()
    return held
