"""Rounding to formats whose numbers are learned, as `slimline.frameworks.torch.learned` has it in its framework.

Scales are factors on those they start with, by their logarithm; zero points are shifts (LSQ: Esser et al. 2020,
arXiv:1902.08153; LSQ+: Bhalgat et al. 2020, arXiv:2004.09576); clipping values are plain factors (PACT: Choi et al.
2018, arXiv:1805.06085). Gradients go straight through the rounding; beyond the
ends of a grid they reach its ends instead. On levels they always reach a weight; those below zero can have a factor of
their own (TTQ: Zhu et al. 2017, arXiv:1612.01064). An activation of which signs are left has gradients between plus and
minus their size (Rastegari et al. 2016, arXiv:1603.05279). Weights can also move between the codes below and above them
alone, by a rectified sigmoid (AdaRound: Nagel et al. 2020, arXiv:2004.10568).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers as L
from keras import ops

from slimline.basics.errors import SlimlineError
from slimline.frameworks.base import Array
from slimline.frameworks.keras.fakequant import Quantizer, grid_name, rounded_class
from slimline.frameworks.keras.functional import calls, final_activations, variables
from slimline.frameworks.keras.gridded import GRIDDED
from slimline.frameworks.keras.observe import named_tensors
from slimline.frameworks.keras.parts import transfer
from slimline.frameworks.keras.rounding import Formatted
from slimline.graph.edits import LearnRounding
from slimline.graph.quantization import Quantization
from slimline.methods.adaround import GAIN, PARTS, STRETCH, exponent
from slimline.methods.formats import Format, IntegerGrid, Levels, Scaled, spread
from slimline.methods.levels import SKEWS, skewed
from slimline.methods.scales import SMALLEST, learning_speeds, zero_learns

_register = keras.saving.register_keras_serializable(package="slimline")


def on_grid(x: Any, scale: Any, zero: Any, low: int, high: int, clips: bool = False) -> Any:
    """``clip(round(x / scale), low - zero, high - zero) * scale``; `zero` holds whole numbers, and both broadcast.

    With `clips` the scale learns from what is beyond the ends alone, as if nothing were rounded between them.
    """

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def run(x: Any, scale: Any, zero: Any) -> Any:
        units = x / scale
        bottom, top = low - zero, high - zero
        codes = tf.clip_by_value(tf.round(units), bottom, top)
        inside = (units >= bottom) & (units <= top)

        def backward(gradient: Any) -> tuple[Any, Any, Any]:
            passed = tf.where(inside, gradient, tf.zeros_like(gradient))
            slope = tf.where(inside, tf.zeros_like(units) if clips else codes - units, codes)
            return passed, _summed(gradient * slope, scale), _summed((passed - gradient) * scale, zero)

        return codes * scale, backward

    return run(x, scale, zero)


def on_levels(x: Any, scale: Any, each: Levels, skew: Any = None, ends: bool = False) -> Any:
    """``codebook[nearest(x / scale)] * scale``; the scale broadcasts, and levels below zero are times `skew`.

    With `ends` no gradient reaches `x` beyond the outer levels.
    """
    bounds, codebook = tf.constant(each.bounds), tf.constant(each.codebook)
    if skew is not None:
        codebook = tf.where(codebook < 0, codebook * skew, codebook)
        wide = tf.cast(tf.stop_gradient(codebook), tf.float64)
        bounds = tf.cast((wide[:-1] + wide[1:]) / 2, tf.float32)

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def run(x: Any, scale: Any, codebook: Any) -> Any:
        units = x / scale
        codes = tf.searchsorted(bounds, tf.reshape(units, [-1]), side="left")
        levels = tf.reshape(tf.gather(codebook, codes), tf.shape(x))

        def backward(gradient: Any) -> tuple[Any, Any, Any]:
            by_number = tf.reshape(gradient * scale, [-1])
            by_level = tf.math.unsorted_segment_sum(by_number, codes, each.codebook.size)
            inside = (units >= codebook[0]) & (units <= codebook[-1])
            by_x = tf.where(inside, gradient, tf.zeros_like(gradient)) if ends else gradient
            return by_x, _summed(gradient * levels, scale), by_level

        return levels * scale, backward

    return run(x, scale, codebook)


def rectified(logit: Any, strength: float, power: Any) -> Any:
    """A rectified sigmoid `h`, with the gradient of ``strength * (1 - |2h - 1| ** power)`` added to that of the loss; a
    power of 0 adds none."""
    top, bottom = STRETCH

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def run(logit: Any) -> Any:
        sigmoid = tf.sigmoid(logit)
        soft = tf.clip_by_value(sigmoid * (top - bottom) + bottom, 0.0, 1.0)

        def backward(gradient: Any) -> Any:
            away = 2 * soft - 1
            steep = strength * 2 * power * tf.sign(away) * tf.abs(away) ** tf.maximum(power - 1, 0.0)
            slope = (gradient - steep) * sigmoid * (1 - sigmoid) * (top - bottom)
            return tf.where((soft > 0) & (soft < 1), slope, tf.zeros_like(slope))

        return soft, backward

    return run(logit)


def _summed(gradient: Any, like: Any) -> Any:
    """The sum over all along which `like` was repeated, of its shape."""
    axes = [d for d, size in enumerate(like.shape) if size == 1] if like.shape.rank else None
    return tf.reshape(tf.reduce_sum(gradient, axes), tf.shape(like))


class Learning(Formatted):
    """A layer whose format is learned; `format` is the one that it starts from.

    Parameters
    ----------
    count : numbers that are rounded; of an activation those of a sample.
    fixed : whether the format stays.
    steps : scales of the format.
    moves : whether its zero points may learn.
    clips : whether the end of the grid learns (PACT), instead of its steps.
    skews : whether levels below zero learn a factor of their own (TTQ).
    """

    ends = False
    """Of levels, whether gradients stop beyond the outer ones."""

    def __init__(
        self,
        *args: Any,
        format: Format | Mapping[str, Any],
        count: int,
        fixed: bool = False,
        steps: int = 1,
        moves: bool = False,
        clips: bool = False,
        skews: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, format=format, **kwargs)
        numbers = all(type(n) is int and n > 0 for n in (count, steps))
        if not numbers or not all(isinstance(flag, bool) for flag in (fixed, moves, clips, skews)):
            raise ValueError(f"{type(self).__name__} takes whole positive numbers and booleans.")
        self.count, self.fixed, self.steps, self.moves, self.clips = count, fixed, steps, moves, clips
        self.skews = skews

    def build(self, input_shape: Any) -> None:
        """Make the layer's weights, and behind them what the format learns by."""
        super().build(input_shape)  # type: ignore[misc]
        self.log_step = None if self.fixed or self.clips else self._weight("log_step", self.steps)
        # Of two dimensions, as the optimiser decays what is no vector.
        self.clip = self._weight("clip", self.steps, 1, initializer="ones") if self.clips and not self.fixed else None
        self.shift = self._weight("shift", self.steps) if self.moves and not self.fixed else None
        self.log_skew = self._weight("log_skew", 1) if self.skews and not self.fixed else None

    def _weight(self, name: str, *shape: int, initializer: str = "zeros") -> Any:
        layer: Any = self
        return L.Layer.add_weight(
            layer, shape=shape, initializer=initializer, dtype="float32", autocast=False, name=name
        )

    def on_grid(self, x: Any) -> Any:
        """`x`, rounded."""
        each = self.format
        assert isinstance(each, Scaled)
        wide, scale = ops.cast(x, "float32"), self._spread(self._scale(), x)
        if isinstance(each, Levels):
            return ops.cast(on_levels(wide, scale, each, self._skew(), self.ends), x.dtype)
        assert isinstance(each, IntegerGrid)
        zero = self._spread(self._zero(each), x)
        return ops.cast(on_grid(wide, scale, zero, each.low, each.high, self.clips), x.dtype)

    def on_image_grid(self) -> Any:
        """The rounded kernel of one dimension as that of images one place high."""
        layer: Any = self
        return ops.expand_dims(self.on_grid(layer.kernel), 0)

    def learned(self) -> Scaled:
        """The format as it is now."""
        each = self.format
        assert isinstance(each, Scaled)
        scale = ops.convert_to_numpy(self._scale()).reshape(each.scale.shape)
        now = replace(each, scale=scale.astype(np.float32))
        if isinstance(now, IntegerGrid) and now.zero_point is not None:
            zero = ops.convert_to_numpy(self._zero(now)).reshape(now.scale.shape)
            now = replace(now, zero_point=zero.astype(np.int32))
        if isinstance(now, Levels) and self.log_skew is not None:
            now = skewed(now, float(ops.convert_to_numpy(self._skew())[0]))
        return now

    def _skew(self) -> Any:
        """Of levels below zero, the factor, which learns as fast as a scale of all the tensor; None where it stays."""
        if self.log_skew is None:
            return None
        speeds = learning_speeds(self.format, self.count)  # type: ignore[arg-type]
        slowed = self.log_skew * (speeds.mean() / math.sqrt(speeds.size))
        return ops.clip(ops.exp(slowed + ops.stop_gradient(self.log_skew - slowed)), *SKEWS)

    def _scale(self) -> Any:
        each = self.format
        assert isinstance(each, Scaled)
        start = each.scale.ravel()
        if self.clip is not None:
            return ops.maximum(start * self.clip[:, 0], SMALLEST)
        if self.log_step is None:
            return ops.convert_to_tensor(start)
        slowed = self.log_step * learning_speeds(each, self.count)
        step = slowed + ops.stop_gradient(self.log_step - slowed)
        return ops.maximum(start * ops.exp(step), SMALLEST)

    def _zero(self, each: IntegerGrid) -> Any:
        """Whole numbers, within the codes."""
        zero = each.zero.astype(np.float32).ravel()
        if self.shift is None:
            return ops.convert_to_tensor(zero)
        # A shift of one is all of the range, so that a step of the optimiser means the same of few and many codes.
        span = float(each.high - each.low) if zero_learns(each) else 0.0
        near = ops.clip(zero + self.shift * span, each.low, each.high)
        return near + ops.stop_gradient(ops.round(near) - near)

    def _spread(self, numbers: Any, x: Any) -> Any:
        """One number per block, so that they broadcast against `x`."""
        each = self.format
        assert isinstance(each, Scaled)
        if all(block in (None, 1) for block in each.blocks):
            return ops.reshape(numbers, each.scale.shape)
        own = np.arange(each.scale.size).reshape(each.scale.shape)
        return ops.take(numbers, spread(own, each.blocks, tuple(x.shape)))

    def save_own_variables(self, store: Any) -> None:
        """Write weights, what the format learns by, and the format's arrays; layers of Keras' write their own alone."""
        super().save_own_variables(store)
        for index, variable in enumerate(self._every()):
            if str(index) not in store.keys():  # noqa: SIM118  it is no mapping
                store[str(index)] = variable

    def load_own_variables(self, store: Any) -> None:
        """Read what `save_own_variables` wrote."""
        super().load_own_variables(store)
        for index, variable in enumerate(self._every()):
            variable.assign(store[str(index)])

    def _every(self) -> list[Any]:
        layer: Any = self
        return [*layer._trainable_variables, *layer._non_trainable_variables]

    def get_config(self) -> dict[str, Any]:
        """What rebuilds the layer, but for its numbers."""
        own = {"count": self.count, "fixed": self.fixed, "steps": self.steps, "moves": self.moves, "clips": self.clips}
        return {**super().get_config(), **own, "skews": self.skews}


@_register
class LearnedRounding(Learning, L.Layer):  # type: ignore[misc]
    """Rounds its input to one format that is learned; any shape.

    Parameters
    ----------
    waits : whether the input stays as it is until `begin`.
    drop : part of the numbers, drawn anew each time, that are not rounded in training.
    """

    ends = True

    def __init__(self, *args: Any, waits: bool = False, drop: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(waits, bool) or not (isinstance(drop, float) and 0 <= drop < 1):
            raise ValueError("LearnedRounding waits or does not, and drops a part below 1.")
        self.waits, self.drop = waits, drop
        self.seed_generator = keras.random.SeedGenerator(0) if drop else None

    def call(self, inputs: Any, training: bool = False) -> Any:
        """`inputs` rounded, of the same shape and dtype."""
        if not self.waits:
            rounded = self.on_grid(inputs)
            if not (self.drop and training):
                return rounded
            drawn = keras.random.uniform(ops.shape(inputs), seed=self.seed_generator)
            return ops.where(drawn < self.drop, inputs, rounded)
        # A loop of Keras' warns of weights that nothing depends on.
        nothing = [0 * ops.sum(v) for v in (self.log_step, self.clip, self.shift) if v is not None]
        return inputs + ops.cast(sum(nothing), inputs.dtype)

    def begin(self, each: Format) -> None:
        """Round to a format from now on; functions that were compiled before do not know."""
        self._format, self.waits = each, False

    def get_config(self) -> dict[str, Any]:
        """What rebuilds the layer, but for its numbers."""
        return {**super().get_config(), "waits": self.waits, "drop": self.drop}

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The input's."""
        return input_shape


class LearningKernel(Learning):
    """A layer whose kernel's format is learned, or whose kernel moves between two codes of one that stays.

    Parameters
    ----------
    strength : of the penalty that drives each number of a kernel to one of two codes; None where they do not move so.
    turns : passes of training over which the penalty becomes steep.
    """

    def __init__(self, *args: Any, strength: float | None = None, turns: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        real = strength is None or (isinstance(strength, float) and strength >= 0)
        if not real or type(turns) is not int or turns < 0:
            raise ValueError(f"{type(self).__name__} takes a strength of at least 0 and whole turns.")
        self.strength, self.turns, self.trains = strength, turns, False

    def build(self, input_shape: Any) -> None:
        """Make the layer's weights, and behind them what its kernel moves by: logits over `GAIN`, and passes so far."""
        super().build(input_shape)
        layer: Any = self
        self.logits: Any = None
        self.turn: Any = None
        if self.strength is not None:
            self.logits = self._weight("logits", *layer.kernel.shape)
            self.turn = L.Layer.add_weight(
                layer, shape=(), initializer="zeros", dtype="int64", trainable=False, name="turn"
            )

    def call(self, inputs: Any, training: bool = False) -> Any:
        """The layer's output."""
        self.trains = bool(training)
        return super().call(inputs)  # type: ignore[misc]

    def on_grid(self, x: Any) -> Any:
        """`x`, rounded."""
        return super().on_grid(x) if self.strength is None else self.between(x, hard=not self.trains)

    def between(self, x: Any, hard: bool) -> Any:
        """`x`, each of its numbers somewhere between the codes below and above it, or where `hard` at one of them; what
        is zero stays so."""
        each = self.format
        assert isinstance(each, IntegerGrid) and self.strength is not None
        scale, zero = self._spread(self._scale(), x), self._spread(self._zero(each), x)
        units = tf.stop_gradient(ops.cast(x, "float32")) / scale
        lowest, highest = each.low - zero, each.high - zero
        down = tf.clip_by_value(tf.floor(units), lowest, highest)
        top, bottom = STRETCH
        part = tf.clip_by_value(units - down, *PARTS)
        logit = GAIN * self.logits - tf.math.log((top - bottom) / (part - bottom) - 1)
        up = tf.cast(logit > 0, "float32") if hard else rectified(logit, self.strength, self._power())
        free = (down < highest) & (units != 0)
        return ops.cast(tf.where(free, down + up, down) * scale, x.dtype)

    def _power(self) -> Any:
        """Of the penalty in this pass of training, which is counted."""
        powers = [exponent(turn / max(self.turns, 1)) or 0.0 for turn in range(self.turns + 1)]
        now = tf.minimum(tf.convert_to_tensor(self.turn), self.turns)
        self.turn.assign_add(1)
        return tf.gather(tf.constant(powers, tf.float32), now)

    def get_config(self) -> dict[str, Any]:
        """What rebuilds the layer, but for its numbers."""
        return {**super().get_config(), "strength": self.strength, "turns": self.turns}


LEARNED: Mapping[type, type] = {
    plain: _register(type(f"Learned{plain.__name__}", (LearningKernel, gridded), {"__module__": __name__}))
    for plain, gridded in GRIDDED.items()
}
"""The class that takes a class's place while the format of its kernel learns."""

PLAIN: Mapping[type, type] = {**{learning: plain for plain, learning in LEARNED.items()}, LearnedRounding: L.Identity}
"""The class by whose rule the graph of a learning model is read."""


def learn(native: keras.Model, edit: LearnRounding) -> keras.Model:
    """A copy of a canonical model that rounds the named activations and kernels to formats that are learned.

    Probabilities that are an output, which no other layer reads, stay as they are computed: rounded to zero they teach
    nothing. Their grid is the runtime's, which no training moves.

    Raises
    ------
    SlimlineError : a value that the model does not compute, or a format or a layer that cannot learn.
    """
    values = {name for call in calls(native) for name in call.names}
    missing = [name for name in edit.quantization.activations if name not in values]
    if missing:
        raise SlimlineError(
            f"The model computes no value called {missing[0]!r}: quantize the model that was calibrated."
        )
    for each in (*edit.quantization.activations.values(), *edit.quantization.weights.values()):
        if not isinstance(each, IntegerGrid | Levels):
            raise SlimlineError(f"Keras does not learn {each.describe()}: choose integers or levels.")
    return _Learner(native, edit).model()


class _Learner(Quantizer):
    """The work of `learn`."""

    def __init__(self, native: keras.Model, edit: LearnRounding) -> None:
        super().__init__(native, edit.quantization, frozenset())
        self.edit = edit
        read = {id(t) for call in calls(native) for t in call.inputs}
        probabilities = {
            id(t)
            for t, function in zip(native.outputs, final_activations(native), strict=True)
            if function in ("softmax", "sigmoid") and id(t) not in read
        }
        names = {name for name, t in named_tensors(native).items() if id(t) in probabilities}
        self.formats = {name: each for name, each in self.formats.items() if name not in names}

    def grid(self, name: str, value: Any) -> Any:
        """The layer that rounds a value, the same for all that share a format."""

        def make() -> LearnedRounding:
            count = math.prod(n for n in value.shape[1:] if n is not None)
            own = _settings(self.formats[name], count, name in self.edit.fixed)
            if name in self.edit.delayed:  # whether the zero will lie inside of its grid is not known yet
                own |= {"waits": True, "moves": not own["fixed"] and isinstance(own["format"], IntegerGrid)}
            if name in self.edit.clipped:
                own |= {"clips": True, "moves": False}
            return LearnedRounding(**own, drop=float(self.edit.drop), name=grid_name(name))

        return self.copies.of(("grid", self.edit.shared.get(name, name)), make)

    def rounded(self, layer: Any, each: Format) -> Any:
        """The layer with its kernel in a format that learns."""
        kind: Any = rounded_class(layer, LEARNED)
        name = self.paths[id(layer.kernel)]
        softened = name in self.edit.softened
        own = _settings(each, math.prod(layer.kernel.shape), softened or name in self.edit.fixed)
        if softened:
            own |= {"strength": float(self.edit.softened[name]), "turns": self.edit.turns}
        return kind.from_config({**layer.get_config(), **own, "skews": name in self.edit.skewed})

    def fill(self, operation: Any, copy: Any) -> None:
        """Give a copy the numbers of the operation; those by which a format learns stay as they are."""
        own, learns = operation.variables, isinstance(copy, Learning)
        transfer([*own, *copy.variables[len(own) :]] if learns else own, copy)


def _settings(each: Format, count: int, fixed: bool) -> dict[str, Any]:
    assert isinstance(each, Scaled)
    return {"format": each, "count": count, "fixed": fixed, "steps": each.scale.size, "moves": zero_learns(each)}


def learned(native: keras.Model, quantization: Quantization) -> Quantization:
    """`quantization`, with the formats that a model of `learn` has now; those that it left out stay."""
    values = {id(t): name for name, t in named_tensors(native).items()}
    paths = {id(variable): path for path, variable in variables(native).items()}
    own: dict[str, Format] = {}
    for call in calls(native):
        layer: Any = call.operation
        if isinstance(layer, LearnedRounding):
            own[values[id(call.inputs[0])]] = layer.learned()
        elif isinstance(layer, Learning):
            own[paths[id(layer.kernel)]] = layer.learned()  # type: ignore[attr-defined]
    return replace(
        quantization,
        activations={name: own.get(name, each) for name, each in quantization.activations.items()},
        weights={name: own[name] for name in quantization.weights},
    )


def softened(native: keras.Model) -> dict[str, Array]:
    """The kernels that move between two codes in a model of `learn`, at the code that each number is nearer to."""
    paths = {id(variable): path for path, variable in variables(native).items()}
    layers = {id(call.operation): call.operation for call in calls(native)}.values()
    return {
        paths[id(layer.kernel)]: ops.convert_to_numpy(layer.between(layer.kernel, hard=True))  # type: ignore[attr-defined]
        for layer in layers
        if isinstance(layer, LearningKernel) and layer.strength is not None
    }


def begin(native: keras.Model, activations: Mapping[str, Format]) -> None:
    """Let a model of `learn`, in place, round the activations that wait, to these formats."""
    values = {id(t): name for name, t in named_tensors(native).items()}
    for call in calls(native):
        layer = call.operation
        if isinstance(layer, LearnedRounding) and layer.waits:
            layer.begin(activations[values[id(call.inputs[0])]])
