"""Keras' own training loop: callbacks for `keras.Model.fit`."""

from __future__ import annotations

import logging
from typing import Any

import keras
import numpy as np

from slimline.basics.errors import SlimlineError
from slimline.frameworks.base import Array, Delaying, Masking
from slimline.frameworks.keras.functional import weights
from slimline.frameworks.keras.learned import begin
from slimline.methods.sparsity import Axes
from slimline.recipe.registry import handler
from slimline.recipe.step import Step, are_steps

log = logging.getLogger(__name__)
L = keras.layers


class PruningCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Prunes the model that `fit` trains, in place: ``model.fit(…, callbacks=[sl.PruningCallback(step)])``.

    Parameters
    ----------
    step : a `SparsePruning` with a schedule that trains; globs are on the names of layers.
    batch : ``(x, y)`` on which gradients are taken, for criteria and `regrow` that need them: Keras does not tell a
        callback its own.
    seed : of ``random``.

    Attributes
    ----------
    masks : by weight name, boolean; True stays.
    """

    def __init__(self, step: Step, batch: tuple[Any, Any] | None = None, seed: int = 0) -> None:
        super().__init__()
        are_steps("step", step)
        self.step, self.batch, self.seed = step, batch, seed
        self._masker: Masking | None = None

    @property
    def masks(self) -> dict[str, Array]:
        """By weight name, boolean; True stays."""
        return {} if self._masker is None else dict(self._masker.masks)

    @property
    def sparsity(self) -> float:
        """The part of the weights that is masked."""
        return 0.0 if self._masker is None else self._masker.sparsity

    def on_train_begin(self, logs: Any = None) -> None:
        """Find the weights to prune."""
        layouts = {}
        for layer in self.model._flatten_layers(include_self=False):
            read = axes(layer)
            if read is not None and layer.trainable and read[0].trainable:
                layouts[read[0].path] = (layer.name, read[1])
                self._weights = getattr(self, "_weights", {}) | {read[0].path: read[0]}
        shapes = {name: tuple(v.shape) for name, v in self._weights.items()}
        steps = self.params.get("steps")
        total = None if steps is None else steps * self.params["epochs"]
        masking: Masking = handler(self.step.step).masking(self.step, layouts, shapes, total, self.seed)
        self._masker = masking
        self._weights = {name: self._weights[name] for name in masking.masks}
        if self._masker.gradient and self.batch is None:
            raise SlimlineError("PruningCallback needs batch=(x, y) for gradients: give a batch of training data.")

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Update what is due, and hold the zeros."""
        assert self._masker is not None
        self._masker.advance(
            lambda: {n: keras.ops.convert_to_numpy(v) for n, v in self._weights.items()}, self._gradients
        )
        for name, mask in self._masker.masks.items():
            variable = self._weights[name]
            variable.assign(variable * mask.astype("float32"))

    def on_train_end(self, logs: Any = None) -> None:
        """Say so if the training was too short."""
        assert self._masker is not None
        if not self._masker.complete:
            log.warning("The training ended before the pruning: %.1f %% of the weights went.", 100 * self.sparsity)

    def _gradients(self) -> dict[str, Array]:
        import tensorflow as tf

        assert self.batch is not None
        x, y = self.batch
        weights = [v.value for v in self._weights.values()]
        with tf.GradientTape() as tape:
            loss = self.model.compute_loss(x, y, self.model(x, training=False), training=False)
        gradients = tape.gradient(loss, weights, unconnected_gradients="zero")
        return {name: np.array(g) for name, g in zip(self._weights, gradients, strict=True)}


class QuantizationCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Does in `fit` what a `QuantizationAwareTraining` says of epochs, `delay` and `fold_norms`, and holds zeros.

    ::

        prepared = sl.prepare(model, sl.QuantizationAwareTraining(delay=1, fold_norms=3), data)
        prepared.native.compile("adam", "sparse_categorical_crossentropy")
        prepared.native.fit(x, y, epochs=4, callbacks=[sl.QuantizationCallback(prepared)])
        small = sl.convert(prepared)

    After `delay` epochs activations are observed, on the weights that were trained so far, and rounded from then on;
    after `fold_norms` epochs batch norms stay as they are. What was pruned before stays zero. `fit` may train a model
    that `prepared.native` is part of.

    Parameters
    ----------
    prepared : what `slimline.prepare` gave.

    Raises
    ------
    SlimlineError : anything else.
    """

    def __init__(self, prepared: Delaying) -> None:
        super().__init__()
        if not isinstance(getattr(prepared, "native", None), keras.Model) or not hasattr(prepared, "observe"):
            raise SlimlineError(
                f"A {type(prepared).__name__} is not what slimline.prepare makes of a Keras model: give that."
            )
        self.prepared = prepared
        self._waits, self._learns = prepared.delay > 0, bool(prepared.fold_norms)
        named = weights(prepared.native)
        self._held = [(named[name], mask.astype("float32")) for name, mask in prepared.masks.items() if name in named]

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Do what is due."""
        prepared, due = self.prepared, False
        if self._waits and epoch >= prepared.delay:
            self._waits, due = False, True
            begin(prepared.native, prepared.observe().activations)
        if self._learns and epoch >= (prepared.fold_norms or 0):
            self._learns, due = False, True
            for layer in prepared.native.layers:
                if isinstance(layer, L.BatchNormalization):
                    layer.trainable = False
        if due:  # what was compiled does not know of it
            self.model.test_function = self.model.predict_function = None
            self.model.make_train_function(force=True)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Hold the zeros."""
        for variable, mask in self._held:
            variable.assign(variable * mask)


def axes(layer: Any) -> tuple[Any, Axes] | None:
    """A layer's weight and how it is read as ``(groups, outputs, inputs)``; None for other layers."""
    if isinstance(layer, L.Dense):
        return layer.kernel, Axes((1, *layer.kernel.shape), (0, 2, 1), 1)
    if isinstance(layer, L.EinsumDense):
        _, kernel, output = layer.equation.replace("->", ",").split(",")
        order = sorted(range(len(kernel)), key=lambda d: kernel[d] not in output)
        output_count = sum(letter in output for letter in kernel)
        return layer.kernel, Axes((1, *layer.kernel.shape), (0, *(d + 1 for d in order)), output_count)
    if isinstance(layer, L.DepthwiseConv1D | L.DepthwiseConv2D):
        *kernel, inputs, multiplier = layer.kernel.shape
        rank = len(kernel)
        return layer.kernel, Axes((*kernel, inputs, multiplier), (rank, rank + 1, *range(rank)), 1)
    if isinstance(layer, L.Conv1D | L.Conv2D | L.Conv3D):
        *kernel, inputs, outputs = layer.kernel.shape
        rank = len(kernel)
        split = (*kernel, inputs, layer.groups, outputs // layer.groups)
        return layer.kernel, Axes(split, (rank + 1, rank + 2, rank, *range(rank)), 1)
    if isinstance(layer, L.Conv1DTranspose | L.Conv2DTranspose | L.Conv3DTranspose):
        *kernel, outputs, inputs = layer.kernel.shape
        rank = len(kernel)
        return layer.kernel, Axes((1, *kernel, outputs, inputs), (0, rank + 1, *range(1, rank + 1), rank + 2), rank + 1)
    return None
