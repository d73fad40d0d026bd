"""A student in Keras' own loop: a model whose `fit` trains it towards what a `KerasTrainer` knows of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from slimline.basics.errors import SlimlineError
from slimline.frameworks.base import See
from slimline.frameworks.keras.functional import input_name
from slimline.methods.outputs import Output
from slimline.recipe.training import Training

Told = tuple[list[tf.Tensor] | None, dict[str, tf.Tensor]]
"""What teachers say as one, if there are any, and the inner values of the first."""
Ask = Callable[[list[tf.Tensor], list[list[tf.Tensor]]], Told]
Loss = Callable[[list[tf.Tensor], list[tf.Tensor], Told], tuple[tf.Tensor, list[tf.Tensor]]]


class Student(keras.Model):  # type: ignore[misc]
    """Called it answers as `student` does; `fit` makes the loss of the step small, and needs no other.

    ::

        net.compile("adam", metrics=["accuracy"])
        net.fit(x, y, epochs=5, validation_data=(x_test, y_test))

    Parameters
    ----------
    student : which is trained in place.
    learned : what terms of the loss learn beside it.
    functions : of whether it trains, see `slimline.frameworks.keras.train.KerasTrainer.functions`.
    held : weights, and the masks that hold them at zero.
    see : the view of a batch, by its number.
    """

    def __init__(
        self,
        student: keras.Model,
        learned: Sequence[keras.Variable],
        functions: Callable[[bool], tuple[Ask, Loss]],
        outputs: Sequence[Output],
        step: Training,
        held: Sequence[tuple[Any, tf.Variable]],
        see: See | None,
    ) -> None:
        super().__init__(name=f"{student.name}_taught")
        self.student = student
        self.learned = list(learned)
        self.supports_jit = False  # neither are views, which are numpy's, nor is XLA any faster here
        # In closures, where Keras tracks nothing: teachers are no part of the model.
        self._functions = {training: functions(training) for training in (True, False)}
        self._outputs, self._config, self._see = tuple(outputs), step, see
        self._zeros = tuple(held)
        self._batches = tf.Variable(0, trainable=False, dtype=tf.int64)
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """What the student answers."""
        return self.student(inputs, training=training)

    def compile(self, optimizer: Any = "adam", loss: Any = None, **settings: Any) -> None:
        """As of `keras.Model`, without `loss`, which the step says.

        Raises
        ------
        SlimlineError : there is a loss, or weights of losses.
        """
        if loss is not None or settings.get("loss_weights") is not None:
            raise SlimlineError("The step says the loss, labels and teacher together: compile without loss.")
        super().compile(optimizer, **settings)

    def train_step(self, data: Any) -> dict[str, Any]:
        """A step of the optimiser, on the next view."""
        x, y = _unpacked(data)
        inputs, labels = self._inputs(x), self._labels(y)
        if self._see is not None:
            self._batches.assign_add(1)
            inputs = self._seen(inputs, self._see)
        ask, loss = self._functions[True]
        taught = ask(inputs, [])
        with tf.GradientTape() as tape:
            value, raw = loss(inputs, labels, taught)
            # Gradients of replicas, each of its part of the batch, are added up.
            scaled = self.optimizer.scale_loss(value / self.distribute_strategy.num_replicas_in_sync)
        weights = self.trainable_variables
        slopes = tape.gradient(scaled, [w.value for w in weights], unconnected_gradients="zero")
        slopes = [tf.convert_to_tensor(g) for g in slopes]
        self.optimizer.apply(slopes, weights)
        for weight, mask in self._zeros:
            weight.assign(weight * mask)
        return self._told(x, y, value, raw)

    def test_step(self, data: Any) -> dict[str, Any]:
        """The loss and the metrics in inference mode, of the samples as they are."""
        x, y = _unpacked(data)
        inputs = self._inputs(x)
        ask, loss = self._functions[False]
        value, raw = loss(inputs, self._labels(y), ask(inputs, []))
        return self._told(x, y, value, raw)

    def _told(self, x: Any, y: Any, value: tf.Tensor, raw: list[tf.Tensor]) -> dict[str, Any]:
        self._loss_tracker.update_state(value, sample_weight=tf.shape(keras.tree.flatten(x)[0])[0])
        answers = keras.tree.pack_sequence_as(self.student.output, raw)
        told: dict[str, Any] = self.compute_metrics(x, y, answers, None)
        return told

    def _inputs(self, x: Any) -> list[tf.Tensor]:
        """In the order of the student's."""
        names = [input_name(each) for each in self.student.inputs]
        return _ordered(x, names, "input")

    def _labels(self, y: Any) -> list[tf.Tensor]:
        """Of those outputs whose labels matter, as losses take them."""
        outputs = [output for output in self._outputs if output.labelled]
        if y is None or not outputs or self._config.alpha == 1:
            return []
        pairs = zip(self.student.output_names, self._outputs, strict=True)
        names = [name for name, output in pairs if output.labelled] if len(self._outputs) > 1 else []
        labels = _ordered(y, names, "output")
        if len(labels) == len(self._outputs):
            labels = [own for own, output in zip(labels, self._outputs, strict=True) if output.labelled]
        if len(labels) != len(outputs):
            raise SlimlineError(
                f"fit has labels of {len(labels)} outputs, and the data of prepare of {len(outputs)}: make them alike."
            )
        return [_fitting(own, output) for own, output in zip(labels, outputs, strict=True)]

    def _seen(self, inputs: list[tf.Tensor], see: See) -> list[tf.Tensor]:
        """The inputs as teacher and student both see them."""

        def run(batch: np.ndarray, *arrays: np.ndarray) -> list[np.ndarray]:
            return list(see(arrays, int(batch)))

        views = tf.numpy_function(run, [self._batches, *inputs], [x.dtype for x in inputs])
        for view, x in zip(views, inputs, strict=True):
            view.set_shape(x.shape)
        return list(views)


def _ordered(arrays: Any, names: Sequence[str], what: str) -> list[tf.Tensor]:
    """Flat; those of a dict as `names` has them, where there are such."""
    if not isinstance(arrays, dict) or not names:
        flat: list[tf.Tensor] = keras.tree.flatten(arrays)
        return flat
    if missing := [name for name in names if name not in arrays]:
        raise SlimlineError(
            f"fit is given no {what} {missing[0]!r}, but {', '.join(arrays)}: name them as the model does."
        )
    return [arrays[name] for name in names]


def _unpacked(data: Any) -> tuple[Any, Any]:
    x, y, weights = keras.utils.unpack_x_y_sample_weight(data)
    if weights is not None:
        raise SlimlineError("The step weighs all samples alike: leave sample_weight and class_weight out.")
    return x, y


def _fitting(labels: tf.Tensor, output: Output) -> tf.Tensor:
    """Labels as the losses of `slimline.methods.distillation` take them."""
    if output.kind == "classes":
        shape = output.positions[1:]
        if labels.dtype.is_floating or (labels.shape.rank is not None and labels.shape.rank > len(output.shape)):
            raise SlimlineError(f"{output.called} is of classes: give fit their numbers, as the data of prepare has.")
        return tf.cast(tf.reshape(labels, (-1, *shape)), tf.int64)
    return tf.cast(tf.reshape(labels, (-1, *output.shape[1:])), tf.float32)
