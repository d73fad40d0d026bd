"""Training a Keras model on the TensorFlow backend: towards a teacher, and gradients for pruning criteria."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from slimline.basics.errors import SlimlineError
from slimline.basics.named import Labels
from slimline.frameworks.base import Array, Batch, See, Term, answers_in_parts, in_parts, teachers_of
from slimline.frameworks.keras.canonical import canonical
from slimline.frameworks.keras.device import computing, placed
from slimline.frameworks.keras.functional import SEED_STATE, calls, final_activations, like, variables
from slimline.frameworks.keras.functional import weights as weights_of
from slimline.frameworks.keras.fusednorm import fused
from slimline.frameworks.keras.own_loop import Ask, Loss, Student, Told
from slimline.methods import distillation
from slimline.methods.outputs import Output, described, targets
from slimline.recipe.training import Training

_BFLOAT16 = "auto_mixed_precision_onednn_bfloat16"
# Keras' own loop does not rewrite Python either, which takes as long as all the rest of a small network's compilation.
_compiled = partial(tf.function, autograph=False)


class KerasTrainer:
    """A copy of `native` under training (see `slimline.frameworks.base.Trainer`).

    The step is one compiled TensorFlow graph. With ``precision="bfloat16"`` TensorFlow's own graph rewriter
    runs convolutions and matrix products in bfloat16, the weights stay float32; on CPUs with AMX that halves
    the time (XLA and bfloat16 layer policies were slower). Biases, norms and other vectors are not decayed. A
    model that ends in a softmax is trained on its log-probabilities. It computes where `wished` says, see
    `slimline.frameworks.keras.device`.
    """

    def __init__(
        self,
        native: keras.Model,
        teacher: keras.Model | tuple[keras.Model, ...] | None,
        step: Training,
        seed: int,
        total_steps: int,
        wished: str | None = None,
        outputs: Sequence[Output] | None = None,
    ) -> None:
        self._wished = wished
        self._outputs = outputs
        with computing(wished):
            self._start(native, teachers_of(teacher), step, seed)

    def _start(self, native: keras.Model, teachers: tuple[keras.Model, ...], step: Training, seed: int) -> None:
        if keras.backend.backend() != "tensorflow":
            raise SlimlineError(
                f"Keras models are trained on the TensorFlow backend, not {keras.backend.backend()}: "
                "set KERAS_BACKEND=tensorflow."
            )
        self._source = native
        self._config = step
        self._student = fused(native)
        for source, own in zip(native.variables, self._student.variables, strict=True):
            own.trainable = source.trainable
        self._sources = teachers
        self._teachers = [fused(teacher) for teacher in teachers]
        seeds = [v for name, v in variables(self._student).items() if name.endswith(SEED_STATE)]
        for index, variable in enumerate(seeds):
            variable.assign(np.array([seed % 2**32, index], variable.dtype))
        self._decayed = [v.ndim > 1 for v in self._student.trainable_variables]
        self._terms: list[tuple[Term, dict[str, keras.Variable]]] = []
        self._factors: dict[str, float] = {}
        self._optimizer = self._make_optimizer()
        self._train: Callable[..., tuple[tf.Tensor, list[tf.Tensor]]] | None = None
        self._asks = True
        self._tutors: Callable[..., list[list[tf.Tensor]]] | None = None
        self._slopes: Callable[..., list[tf.Tensor]] | None = None
        self._last: list[tf.Tensor] = []
        self._masks: dict[str, tf.Variable] = {}
        self._infer = _compiled(_flat(self._student, training=False), input_signature=[_signature(self._student)])

    @placed
    def refresh(self, batches: Iterable[Batch]) -> None:
        """Set every batch norm's statistics to the mean of those of `batches`, dropout being on as in training."""
        norms = [x for x in self._student.layers if isinstance(x, keras.layers.BatchNormalization) and x.trainable]
        if not norms:
            return
        momenta = [layer.momentum for layer in norms]
        run = _flat(self._student, training=True)
        for index, (inputs, _) in enumerate(batches):
            for layer in norms:
                layer.momentum = index / (index + 1)
            run(_tensors(inputs))
        for layer, momentum in zip(norms, momenta, strict=True):
            layer.momentum = momentum

    @placed
    def step(self, batch: Batch, rate: float, answers: Sequence[tuple[Array, ...]] | None = None) -> float:
        """One step of the optimiser at learning rate `rate`; the loss before it."""
        parts = in_parts(batch, self._config.accumulate)
        known = answers_in_parts(answers, self._config.accumulate)
        operands = [self._operands(*each) for each in zip(parts, known, strict=False)]
        if self._train is None or self._asks != (answers is None):
            self._train, self._asks = self._compile(operands[0]), answers is None
        self._optimizer.learning_rate = rate
        with _bfloat16(self._config.precision == "bfloat16"):
            if self._config.accumulate == 1:
                loss, self._last = self._train(*operands[0])
            else:
                shares = [tf.constant(len(part[0][0]) / len(batch[0][0]), tf.float32) for part in parts]
                loss, self._last = self._train(operands, shares)
        return float(loss)

    @placed
    def taught(self, inputs: tuple[Array, ...]) -> list[tuple[Array, ...]]:
        """Of each teacher its outputs as the loss compares them."""
        parts = [self._operands(part)[0] for part in in_parts((inputs, None), self._config.accumulate)]
        if self._tutors is None:
            assert self._outputs is not None
            pairs = zip(self._sources, self._teachers, strict=True)
            tutors = [_forward(*pair, self._outputs, (), training=False) for pair in pairs]
            signature = [_signature(self._student)]
            self._tutors = _compiled(lambda x: [tutor(x)[1] for tutor in tutors], input_signature=signature)
        with _bfloat16(self._config.precision == "bfloat16"):
            answers = [self._tutors(part) for part in parts]
        every = [zip(*each, strict=True) for each in zip(*answers, strict=True)]
        return [tuple(np.concatenate([np.array(x) for x in output]) for output in each) for each in every]

    @placed
    def hold(self, masks: Mapping[str, Array]) -> None:
        """Keep weights at zero, and their moments where the mask is or was False."""
        weights = self._named
        slots = self._optimizer.variables[2:]  # behind its counter and its rate
        each = len(slots) // (len(weights) + len(self._learned))
        places = {name: slots[i * each : (i + 1) * each] for i, name in enumerate(weights)}
        masks = {name: mask for name, mask in masks.items() if name in weights}  # what is frozen at zero stays so
        if set(masks) != set(self._masks):  # they are part of the compiled step
            self._masks, self._train = {n: tf.Variable(np.ones(m.shape, np.float32)) for n, m in masks.items()}, None
        for name, mask in masks.items():
            stays = self._masks[name].numpy() * mask
            self._masks[name].assign(mask.astype(np.float32))
            weights[name].assign(weights[name] * mask)
            for moment in places[name]:
                moment.assign(moment * stays)

    def pace(self, factors: Mapping[str, float]) -> None:
        """Let weights learn at so many times the rate of the others."""
        self._factors, self._train = dict(factors), None

    @placed
    def add(self, term: Term) -> None:
        """Add a term to the training loss."""
        # Named here, as Keras would number them anew in every process.
        names = {name: f"term{len(self._terms)}_{name.replace('/', '_')}" for name in term.learned}
        own = {n: keras.Variable(array, dtype="float32", name=names[n]) for n, array in term.learned.items()}
        self._terms.append((term, own))
        self._optimizer, self._train, self._slopes = self._make_optimizer(), None, None

    def follow(self, others: Sequence[KerasTrainer]) -> None:
        """Learn from the students of other trainers too, as they are at every step."""
        self._sources = (*self._sources, *(other._source for other in others))
        self._teachers += [other._student for other in others]

    @property
    def _learned(self) -> list[keras.Variable]:
        """Weights that only serve a term of the loss."""
        return [variable for _, own in self._terms for variable in own.values()]

    @placed
    def weights(self) -> dict[str, Array]:
        """Copies of the trainable weights."""
        return {name: np.array(variable) for name, variable in self._named.items()}

    @placed
    def set_weights(self, weights: Mapping[str, Array]) -> None:
        """Replace some of the trainable weights."""
        named = self._named
        for name, array in weights.items():
            named[name].assign(array)

    @placed
    def slopes(self) -> dict[str, Array]:
        """The gradients of the last step."""
        return {name: np.array(g) for name, g in zip(self._named, self._last, strict=True)}

    @placed
    def gradients(self, batch: Batch) -> dict[str, Array]:
        """Of the training loss in inference mode; nothing is changed."""
        operands = self._operands(batch)
        if self._slopes is None:
            graph = self._graph(training=False)
            self._slopes = _compiled(lambda *x: graph(*x)[1], input_signature=self._signatures(operands))
        return {n: np.array(g) for n, g in zip(self._named, self._slopes(*operands), strict=False)}

    @cached_property
    def _named(self) -> dict[str, Any]:
        """The trainable variables by the names they have in the source's graph."""
        names = {id(v): name for name, v in variables(self._source).items()}
        pairs = zip(self._source.trainable_variables, self._student.trainable_variables, strict=True)
        return {names[id(source)]: own for source, own in pairs}

    def _operands(self, batch: Batch, answers: Sequence[tuple[Array, ...]] | None = None) -> tuple[Any, ...]:
        """What the compiled functions take: the inputs, the labels of those outputs whose labels matter, and what is
        known of the teachers' answers."""
        inputs, labels = batch
        tensors = _tensors(inputs)
        if self._outputs is None:
            self._outputs = _described(self._infer(tensors), labels)
        if self._teachers and self._config.alpha == 1:
            labels = None
        known = [list(_tensors(each)) for each in answers or ()]
        return tensors, [own for own in targets(self._outputs, labels) if own is not None], known

    @placed
    def outputs(self, inputs: tuple[Array, ...]) -> tuple[Array, ...]:
        """All outputs of the student in inference mode, floats as float32."""
        answers = self._infer(_tensors(inputs))
        return tuple(np.asarray(tf.cast(x, tf.float32) if x.dtype.is_floating else x) for x in answers)

    @placed
    def state(self) -> dict[str, Array]:
        """Weights, statistics and dropout's random state (``model/``) and the optimiser, all copies."""
        return {name: np.array(variable) for name, variable in self._variables().items()}

    @placed
    def restore(self, state: Mapping[str, Array]) -> None:
        """Continue exactly from `state`, as `state()` gave it."""
        for name, variable in self._variables().items():
            variable.assign(state[name])

    def native(self) -> keras.Model:
        """A copy of the model that was given, with the student's weights and statistics."""
        model = like(canonical(self._source), self._source)
        for trained, variable in zip(self._student.variables, model.variables, strict=True):
            variable.assign(trained)
        return model

    def network(self, see: See | None) -> keras.Model:
        """The student, to be trained by `fit`."""
        assert self._outputs is not None
        held = [(self._named[name], mask) for name, mask in self._masks.items()]
        return Student(self._student, self._learned, self.functions, self._outputs, self._config, held, see)

    def _variables(self) -> dict[str, Any]:
        # By position: Keras numbers the paths of random states anew in every copy.
        parts = {
            "model": self._student.variables,
            "optimizer": self._optimizer.variables,
            "learned": self._learned,
        }
        return {f"{part}/{i}/{v.name}": v for part, owned in parts.items() for i, v in enumerate(owned)}

    def _make_optimizer(self) -> keras.optimizers.Optimizer:
        config, weights = self._config, [*self._student.trainable_variables, *self._learned]
        if config.optimizer == "adamw":
            optimizer = keras.optimizers.AdamW(config.learning_rate, weight_decay=config.weight_decay, epsilon=1e-8)
            plain = [v for v in weights if v.ndim <= 1]
            optimizer.exclude_from_weight_decay(var_list=plain)
        else:
            optimizer = keras.optimizers.SGD(config.learning_rate, config.momentum, nesterov=config.momentum > 0)
        optimizer.build(weights)
        return optimizer

    def _signatures(self, operands: tuple[Any, ...]) -> list[Any]:
        """Of compiled functions of inputs, labels and answers, of any batch size."""

        def free(x: Any) -> tf.TensorSpec:
            return tf.TensorSpec((None, *x.shape[1:]), x.dtype)

        _, labels, known = operands
        return [_signature(self._student), [free(x) for x in labels], [[free(x) for x in each] for each in known]]

    def functions(self, training: bool) -> tuple[Ask, Loss]:
        """What the teachers say of inputs (or have said), and the loss of the student towards that, as functions to be
        compiled: the second gives the loss and the student's outputs."""
        config, outputs = self._config, self._outputs
        assert outputs is not None
        names = [name for term, _ in self._terms for name in term.students]
        student = _forward(self._source, self._student, outputs, names, training)
        names = [name for term, _ in self._terms for name in term.teachers]
        tutors = [
            _forward(source, teacher, outputs, () if index else names, training=False)
            for index, (source, teacher) in enumerate(zip(self._sources, self._teachers, strict=True))
        ]

        def ask(inputs: list[tf.Tensor], answers: list[list[tf.Tensor]]) -> Told:
            every = [] if answers else [tutor(inputs) for tutor in tutors]
            known = every[0][2] if every else {}
            answers = answers or [logits for _, logits, _ in every]
            if not answers:
                return None, known
            return distillation.joint_teacher(keras.ops, config.loss, outputs, answers, config.temperature), known

        def loss(inputs: list[tf.Tensor], labels: list[tf.Tensor], told: Told) -> tuple[tf.Tensor, list[tf.Tensor]]:
            teachers, known = told
            raw, students, seen = student(inputs)
            value = distillation.joint(
                keras.ops, config.loss, outputs, students, teachers, _by_output(outputs, labels),
                temperature=config.temperature, alpha=config.alpha, beta=config.beta,
            )  # fmt: skip
            for term, own in self._terms:
                pair = [seen[name] for name in term.students], [known[name] for name in term.teachers]
                value = term.value(keras.ops, *pair, own) + value
            return value, raw

        return ask, loss

    def _graph(self, training: bool) -> Callable[..., tuple[tf.Tensor, list[tf.Tensor]]]:
        """The loss and its gradients, as a function to be compiled."""
        weights = [*self._student.trainable_variables, *self._learned]
        ask, loss = self.functions(training)

        def run(
            inputs: list[tf.Tensor], labels: list[tf.Tensor], answers: list[list[tf.Tensor]]
        ) -> tuple[tf.Tensor, list[tf.Tensor]]:
            told = ask(inputs, answers)
            with tf.GradientTape() as tape:
                value, _ = loss(inputs, labels, told)
            # Of a Keras variable TensorFlow cannot make the zeros where an output does not depend on it.
            gradients = tape.gradient(value, [w.value for w in weights], unconnected_gradients="zero")
            return value, [tf.convert_to_tensor(g) for g in gradients]

        return run

    def _compile(self, operands: tuple[Any, ...]) -> Callable[..., tuple[tf.Tensor, list[tf.Tensor]]]:
        """The training step as a compiled function."""
        named = self._named
        weights = [*named.values(), *self._learned]
        decayed = [*self._decayed, *(v.ndim > 1 for v in self._learned)]
        run = self._graph(training=True)
        coupled = self._config.weight_decay if self._config.optimizer == "sgd" else 0.0

        def update(slopes: list[tf.Tensor]) -> None:
            masks = [*(self._masks.get(name) for name in named), *(None for _ in self._learned)]
            updates = slopes
            if self._config.clip is not None:
                updates = [g if mask is None else g * mask for mask, g in zip(masks, updates, strict=True)]
                updates, _ = tf.clip_by_global_norm(updates, self._config.clip)
            if coupled:
                updates = [g + coupled * w if d else g for g, w, d in zip(updates, weights, decayed, strict=True)]
            updates = [g if mask is None else g * mask for mask, g in zip(masks, updates, strict=True)]
            paced = {name: tf.identity(named[name].value) for name in self._factors if name in named}
            self._optimizer.apply(updates, weights)
            for name, before in paced.items():  # every step of both optimisers is in proportion to the rate
                named[name].assign(before + self._factors[name] * (named[name] - before))
            for name, mask in self._masks.items():
                named[name].assign(named[name] * mask)

        if self._config.accumulate > 1:
            gradient = _compiled(run, input_signature=self._signatures(operands))
            change = _compiled(update)

            def train_by_parts(
                parts: list[tuple[Any, ...]], shares: list[tf.Tensor]
            ) -> tuple[tf.Tensor, list[tf.Tensor]]:
                every = [gradient(*part) for part in parts]
                loss = sum(share * loss for share, (loss, _) in zip(shares, every, strict=True))
                each = zip(*(slopes for _, slopes in every), strict=True)
                slopes = [sum(share * g for share, g in zip(shares, of, strict=True)) for of in each]
                change(slopes)
                return loss, slopes[: len(named)]

            return train_by_parts

        def train(*operands: Any) -> tuple[tf.Tensor, list[tf.Tensor]]:
            loss, slopes = run(*operands)
            update(slopes)
            return loss, slopes[: len(named)]

        signature = self._signatures(operands)
        compiled: Callable[..., tuple[tf.Tensor, list[tf.Tensor]]] = _compiled(train, input_signature=signature)
        return compiled


def gradients(
    native: keras.Model,
    batches: Iterable[Batch],
    loss: str,
    see: Callable[[Mapping[str, Array]], None] | None = None,
    outputs: Sequence[Output] | None = None,
) -> dict[str, Array]:
    """Mean gradient over `batches` of each weight, frozen ones too, by name, in inference mode, float32.

    Parameters
    ----------
    loss : ``cross_entropy``, of each output the loss that its labels have, or ``norm``: the mean over samples of half
        the squared norm of all outputs, for data without labels.
    see : told the gradient of every batch.
    outputs : what each means; None leaves that to the labels of the first batch.
    """
    held = weights_of(native)
    names, weights = list(held), [v.value for v in held.values()]
    flat = _flat(native, training=False)

    @_compiled(reduce_retracing=True)  # type: ignore[untyped-decorator]
    def gradient(inputs: list[tf.Tensor], labels: list[tf.Tensor]) -> list[tf.Tensor]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(weights)
            raw = flat(inputs)
            if loss == "norm":
                squares = [(x, tf.reduce_sum(tf.square(x))) for x in raw if x.dtype.is_floating]
                value = sum(0.5 * square / tf.cast(tf.shape(x)[0], x.dtype) for x, square in squares)
            else:
                assert outputs is not None
                logits = _as_logits(native, outputs)(raw)
                value = distillation.joint(keras.ops, "kl", outputs, logits, None, _by_output(outputs, labels))
        return [tf.convert_to_tensor(g) for g in tape.gradient(value, weights, unconnected_gradients="zero")]

    sums: list[Array] = [np.zeros(tuple(v.shape), np.float32) for v in weights]
    count = 0
    for inputs, labels in batches:
        own: list[tf.Tensor] = []
        if loss == "cross_entropy":
            if labels is None:
                raise SlimlineError("The cross_entropy gradient needs labels: give labelled data or use the norm.")
            outputs = outputs or _described(flat(_tensors(inputs)), labels)
            own = [tf.constant(x) for x in targets(outputs, labels) if x is not None]
        answer = gradient(_tensors(inputs), own)
        sums = [total + np.asarray(g) for total, g in zip(sums, answer, strict=True)]
        if see is not None:
            see({name: np.asarray(g) for name, g in zip(names, answer, strict=True)})
        count += 1
    if count == 0:
        raise SlimlineError("Gradients need at least one batch of data: give calibration or training data.")
    return {name: total / np.float32(count) for name, total in zip(names, sums, strict=True)}


def _described(raw: Sequence[tf.Tensor], labels: Labels) -> tuple[Output, ...]:
    """What the outputs mean, as far as they and the labels of a batch tell."""
    bare = [Output(name=str(i), shape=tuple(x.shape), dtype=_dtype(x)) for i, x in enumerate(raw)]
    return described(bare, labels, channels_first=False)


def _dtype(tensor: tf.Tensor) -> str:
    """Numpy's name of it; half floats count as float32, as which they leave."""
    return "float32" if tensor.dtype.is_floating else str(tensor.dtype.name)


def _by_output(outputs: Sequence[Output], labels: Sequence[tf.Tensor]) -> list[tf.Tensor | None]:
    """The labels of each output, from those of the labelled ones; all None where there are none."""
    rest = iter(labels)
    return [next(rest) if output.labelled and len(labels) else None for output in outputs]


def _signature(model: keras.Model) -> list[tf.TensorSpec]:
    return [tf.TensorSpec(tuple(t.shape), t.dtype) for t in model.inputs]


def _tensors(inputs: tuple[Array, ...]) -> list[tf.Tensor]:
    return [tf.convert_to_tensor(x) for x in inputs]


def _flat(model: keras.Model, training: bool) -> Callable[[list[tf.Tensor]], list[tf.Tensor]]:
    """The function from the flat inputs to the flat outputs."""

    def run(inputs: list[tf.Tensor]) -> list[tf.Tensor]:
        leaves: list[tf.Tensor] = keras.tree.flatten(model(inputs if len(inputs) > 1 else inputs[0], training=training))
        return leaves

    return run


def _forward(
    source: keras.Model, copy: keras.Model, outputs: Sequence[Output], values: Sequence[str], training: bool
) -> Callable[[list[tf.Tensor]], tuple[list[tf.Tensor], list[tf.Tensor], dict[str, tf.Tensor]]]:
    """The function from the flat inputs to the outputs, to them as losses compare them, and to inner values as float32
    by the names that they have in the source of a copy."""
    logits, number, names = _as_logits(copy, outputs), len(outputs), list(dict.fromkeys(values))
    if not names:
        run = _flat(copy, training)

        def plain(inputs: list[tf.Tensor]) -> tuple[list[tf.Tensor], list[tf.Tensor], dict[str, tf.Tensor]]:
            tensors = run(inputs)
            return tensors, logits(tensors), {}

        return plain
    pairs = zip(calls(source), calls(copy), strict=True)
    copies = {name: t for old, new in pairs for name, t in zip(old.names, new.outputs, strict=True)}
    probe = _flat(keras.Model(copy.inputs, [*copy.outputs, *(copies[name] for name in names)]), training)

    def forward(inputs: list[tf.Tensor]) -> tuple[list[tf.Tensor], list[tf.Tensor], dict[str, tf.Tensor]]:
        tensors = probe(inputs)
        seen = [tf.cast(a, tf.float32) for a in tensors[number:]]
        return tensors[:number], logits(tensors[:number]), dict(zip(names, seen, strict=True))

    return forward


def _as_logits(model: keras.Model, outputs: Sequence[Output]) -> Callable[[Sequence[tf.Tensor]], list[tf.Tensor]]:
    """What makes of all outputs float32, and logits of those that are probabilities."""
    finals = final_activations(model)

    def logits(raw: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        return [_as_logit(*each) for each in zip(raw, outputs, finals, strict=True)]

    return logits


def _as_logit(raw: tf.Tensor, output: Output, final: str) -> tf.Tensor:
    real = tf.cast(raw, tf.float32) if raw.dtype.is_floating else raw
    tiny, least = np.finfo(np.float32).tiny, np.finfo(np.float32).eps
    if output.kind == "classes" and final == "softmax":
        return tf.math.log(tf.maximum(real, tiny))
    if output.kind == "multilabel" and final == "sigmoid":
        return tf.math.log(tf.maximum(real, tiny)) - tf.math.log(tf.maximum(1 - real, least))
    return real


@contextmanager
def _bfloat16(enabled: bool) -> Iterator[None]:
    """Run compiled functions in mixed bfloat16 where oneDNN has the operators."""
    before = tf.config.optimizer.get_experimental_options().get(_BFLOAT16, False)
    if enabled == before:
        yield
        return
    tf.config.optimizer.set_experimental_options({_BFLOAT16: enabled})
    try:
        yield
    finally:
        tf.config.optimizer.set_experimental_options({_BFLOAT16: before})
