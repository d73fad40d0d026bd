"""The training loop that gives a compressed model its accuracy back, once for every framework.

The student learns from its teacher's outputs and, where there are any, from the labels. After every
epoch all that the rest depends on is written as one file, atomically; a recovery that was killed and is
called again with the same arguments ends with the same bits as one that was left alone (on one machine
with one number of threads).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from slimline.basics.errors import SlimlineError
from slimline.basics.progress import Progress
from slimline.data.splits import Split, Stream
from slimline.files.atomic import sync, writing
from slimline.frameworks.base import Array, Batch, Trainer
from slimline.measure.accuracy import as_outputs
from slimline.measure.accuracy import score as scores
from slimline.methods import schedules
from slimline.methods.outputs import Output, aligned
from slimline.model import Model
from slimline.model.outputs import bare_outputs, described_outputs
from slimline.recipe.layers import first_match, refuse_unmatched
from slimline.recipe.training import Training
from slimline.training.cache import TeacherCache
from slimline.training.companions import Companion, Company
from slimline.training.features import terms
from slimline.training.teacher import UNKNOWN, Teacher, every_teacher, fingerprint
from slimline.training.views import check as check_view
from slimline.training.views import seen

if TYPE_CHECKING:
    from slimline.data import Data

_MEAN = "mean/"

log = logging.getLogger(__name__)

# What a predictor, inputs to outputs, is worth on the selection split.
Score = Callable[[Callable[[tuple[Array, ...]], tuple[Array, ...]]], float]
_TITLES = {"recovery": "recovery", "training": "sparse training", "quantization": "training in few bits"}


@dataclass(frozen=True)
class Recovered:
    """What `recover` gives.

    Attributes
    ----------
    model : the student as it was after `best_epoch`, in inference mode.
    records : one per epoch: ``epoch``, mean training ``loss`` (None for epoch 0), ``score`` on the selection
        split, learning ``rate`` of the last step, ``seconds``. Epoch 0 is the student with its batch-norm
        statistics refreshed and nothing trained.
    best_epoch : the latest epoch with the highest score; the last of `SparseTraining` and without ``restore_best``.
    """

    model: Model
    records: list[dict[str, Any]]
    best_epoch: int


def recover(
    student: Model,
    teacher: Teacher,
    step: Training,
    data: Data,
    seed: int,
    checkpoint: Path | None = None,
    progress: Callable[[Progress], None] | None = None,
    company: Company | None = None,
) -> Recovered:
    """Train `student` towards `teacher`, and return the best of its epochs, or the last, as `step` says.

    What the student's masks set to zero stays zero. Batch-norm statistics are recomputed first. After each epoch
    the selection split gives a score: the mean of `data`'s own metric, else accuracy (the mean over labelled outputs),
    else (without labels) the part of samples classed as the teacher does or, for ``loss="mse"`` and where no output
    names classes, the negative mean squared distance from the teacher's outputs.

    Parameters
    ----------
    student, teacher : models of one framework with outputs of one shape; none is changed. Several teachers are a
        tuple and teach by the mean of their probabilities. No teacher is needed where only labels are learned from
        (``alpha=0``).
    seed : decides the order of the samples, augmentation and dropout.
    checkpoint : folder in which ``recovery.safetensors`` keeps the state to resume from; made when missing.
    progress : told after every optimiser step.
    company : what goes along with the training, such as a gradual pruning; only epochs that end with all of it done can
        be the best.

    Raises
    ------
    SlimlineError : no training data, models that do not fit together, a loss that is not finite, or a
        checkpoint of another recovery.
    """
    train = data.split("train")
    if len(train) == 0:
        raise SlimlineError(f"Training needs training data: give Data(train=...) or drop the {step.step} step.")
    teachers = every_teacher(teacher)
    unheeded = step.alpha == 0 and not step.features and next(train.batches(1))[1] is not None
    if not teachers and not unheeded:
        raise SlimlineError(f"{step.step} learns from the uncompressed network, but this model {UNKNOWN}.")
    outputs = described(student, teachers, step, data)
    if not step.features and all(output.weight == 0 for output in outputs if output.floating):
        raise SlimlineError("output_weights leaves every output out, and there are no features: give one a weight.")
    score = scorer(teachers or (student,), outputs, step, data)
    if step.view is not None:
        check_view(step, student.example, next(train.batches(1))[1])
    if step.ema and company is not None:
        names = ", ".join(each.step for each in company.steps)
        raise SlimlineError(f"A mean of the weights (ema) would undo what {names} does to them: set ema to 0.")
    trainer = _trainer(student, teachers, not unheeded, step, seed, train, outputs)
    companion = Companion() if company is None else company.begin(step.epochs * _updates(train, step.batch_size))
    companion.start(trainer)
    channels_first = student.adapter.layout == "channels_first"
    asks = step.cache is not None and bool(teachers) and not unheeded
    cache = TeacherCache(Path(str(step.cache)), teachers, step, outputs) if asks else None
    loop = Loop(step, train, trainer, companion, seed, _steps(step, train), progress, channels_first, cache)
    facts = [s.model_dump(mode="json", exclude={"cache"}) for s in (step, *(() if company is None else company.steps))]
    key = _fingerprint((student, *teachers), facts, seed, len(train))
    records = _best(loop, score, None if checkpoint is None else Store(checkpoint, key))
    first, last = records[0]["score"], records[-1]["score"]
    if step.kind == "training" and last < first - 0.1 * abs(first):
        log.warning("%s changed the selection score from %.4g to %.4g: lower its strength.", step.step, first, last)
    best = best_epoch(records, step)
    if len(records) > 1 and best == 0:
        log.warning(
            "No epoch of %s scored above the network as it came, %.4g on the selection split, so that stays: train "
            "longer, at another learning_rate, select on samples that the original was not trained on, or set "
            "restore_best to false.",
            step.step,
            first,
        )
    recovered = student.then(trainer.native(), step.model_dump(mode="json"), masks={**student.masks, **companion.masks})
    return Recovered(recovered, records, best)


def taught(student: Model, teacher: Teacher, step: Training, data: Data, seed: int) -> tuple[Trainer, Any]:
    """What trains `student`, and its network for a loop of the user's own, in which all that `step` says of losses and
    views holds.

    Raises
    ------
    SlimlineError : no training data, or models that do not fit together.
    """
    train = data.split("train")
    if len(train) == 0:
        raise SlimlineError(f"{step.step} needs training data to know what outputs mean: give Data(train=...).")
    teachers = every_teacher(teacher)
    outputs = described(student, teachers, step, data)
    view, channels_first = step.view, student.adapter.layout == "channels_first"
    check_view(step, student.example, next(train.batches(1))[1])
    trainer = _trainer(student, teachers, bool(teachers), step, seed, train, outputs)
    if view is None:
        return trainer, trainer.network(None)

    def see(inputs: tuple[Array, ...], number: int) -> tuple[Array, ...]:
        return seen(view, (inputs, None), channels_first, np.random.default_rng((seed, number)))[0]

    return trainer, trainer.network(see)


def _trainer(
    student: Model,
    teachers: Sequence[Model],
    heeded: bool,
    step: Training,
    seed: int,
    train: Split | Stream,
    outputs: Sequence[Output],
) -> Trainer:
    """What trains the student, with every part of its loss; `heeded` says whether the outputs of `teachers` are one."""
    tutors = tuple(each.native for each in teachers) if heeded else ()
    tutor = tutors if len(tutors) > 1 else next(iter(tutors), None)
    parts = terms(step, student, teachers, seed)
    trainer = student.adapter.trainer(student.native, tutor, step, seed, _steps(step, train), tuple(outputs))
    if step.rates:
        trainer.pace(paces(student, step))
    for part in parts:
        trainer.add(part)
    if student.masks:
        trainer.hold(student.masks)
    return trainer


def paces(student: Model, step: Training) -> dict[str, float]:
    """By name of a weight the factor of the learning rate that `step` gives its layer.

    Raises
    ------
    SlimlineError : a pattern that fits no layer with weights.
    """
    graph, factors = student.graph, dict[str, float]()
    layers = {n.layer or n.name: n for n in graph.nodes if graph.learning.intersection(filter(None, n.inputs))}
    refuse_unmatched("layer with weights for rates", step.rates, layers, graph.types)
    for node in graph.nodes:
        pattern = first_match((node.layer or node.name,), step.rates, graph.types)
        if pattern is not None:
            factors = {name: step.rates[pattern] for name in node.inputs if name in graph.learning} | factors
    return factors


def _steps(step: Training, train: Split | Stream) -> int:
    """Of the optimiser, in all epochs, small last batches included."""
    return step.epochs * -(-len(train) // step.batch_size)


def _best(loop: Loop, score: Score, store: Store | None) -> list[dict[str, Any]]:
    """Train from where `store` says to the end, and put the trainer into the state of the best epoch; the records."""
    step, trainer, companion = loop.step, loop.trainer, loop.companion
    saved = None if store is None else store.read()
    if saved is None:
        start = time.perf_counter()
        loop.refresh(0)
        records = [record(0, None, score(trainer.outputs), 0.0, start, companion)]
        best = loop.state()
        if store is not None:
            store.write(best, best, records)
    else:
        records, state, best = saved
        loop.restore(state)
    while len(records) <= step.epochs and not _stale(records, step):
        start, epoch = time.perf_counter(), len(records)
        scores = [record["score"] for record in records[1:]]
        loss, rate = loop.epoch(epoch, schedules.plateau(scores, step.plateau) if step.schedule == "plateau" else 1.0)
        state = loop.state()
        with loop.averaged(epoch) as scored:
            records.append(record(epoch, loss, score(trainer.outputs), rate, start, companion))
            if best_epoch(records, step) == epoch:
                best = loop.state() if scored else state
        if store is not None:
            store.write(state, best, records)
        log.info("recovery epoch %(epoch)d: loss %(loss).4g, score %(score).4f", records[-1])
    loop.restore(best)
    return records


@dataclass(frozen=True)
class Loop:
    """Epochs of optimiser steps, `total` of them in all.

    Attributes
    ----------
    cache : of what the teachers answer, where there is one.
    means : the exponential means of the weights, by name, where there are such.
    """

    step: Training
    train: Split | Stream
    trainer: Trainer
    companion: Companion
    seed: int
    total: int
    tell: Callable[[Progress], None] | None
    channels_first: bool = True
    cache: TeacherCache | None = None
    means: dict[str, Array] = field(default_factory=dict)

    def refresh(self, epoch: int) -> None:
        """Compute the batch-norm statistics anew."""
        batches = self.train.batches(self.step.batch_size, seed=self.seed, epoch=epoch)
        self.trainer.refresh(islice(batches, self.step.refresh_batches))

    def epoch(self, number: int, scale: float = 1.0) -> tuple[float, float]:
        """Train for an epoch, counted from 1, at `scale` times the rate; the mean loss, and the last learning rate."""
        step, companion = self.step, self.companion
        what = _TITLES.get(step.kind, "training")
        losses: list[float] = []
        rate = 0.0
        for batch in _large(self.train.batches(step.batch_size, seed=self.seed, epoch=number)):
            steps_taken = (number - 1) * (self.total // step.epochs) + len(losses)
            rate = step.learning_rate * scale * schedules.rate(step.schedule, steps_taken, self.total, step.warmup)
            if step.view is not None:
                rng = np.random.default_rng((self.seed, number, len(losses)))
                batch = seen(step.view, batch, self.channels_first, rng)
            companion.before(self.trainer)
            losses.append(_finite(self._step(batch, rate), number, step))
            companion.after(self.trainer, rate, batch)
            if step.ema:
                self._average(steps_taken)
            if self.tell is not None:
                told = {"epoch": number, "loss": losses[-1]}
                self.tell(Progress(what, min(steps_taken + 1, self.total), self.total, told))
        if self.cache is not None:
            self.cache.flush()
        if companion.refreshes:
            self.refresh(number)
        return float(np.mean(losses)), rate

    def _step(self, batch: Batch, rate: float) -> float:
        if self.cache is None:
            return self.trainer.step(batch, rate)
        return self.trainer.step(batch, rate, self.cache.answers(batch[0], self.trainer.taught))

    def state(self) -> dict[str, Array]:
        """All that the next epoch depends on."""
        means = {f"{_MEAN}{name}": array for name, array in self.means.items()}
        return self.trainer.state() | self.companion.state() | means

    def restore(self, state: Mapping[str, Array]) -> None:
        """Continue from `state`."""
        self.trainer.restore(state)
        self.companion.restore(state, self.trainer)
        self.means.clear()
        self.means.update({n.removeprefix(_MEAN): np.array(a) for n, a in state.items() if n.startswith(_MEAN)})

    @contextlib.contextmanager
    def averaged(self, epoch: int) -> Iterator[bool]:
        """The student with the mean weights and statistics to them for a while, if there are means; whether so."""
        if not self.means:
            yield False
            return
        state = self.state()
        self.trainer.set_weights(self.means)
        self.refresh(epoch)
        yield True
        self.restore(state)

    def _average(self, steps_taken: int) -> None:
        """Mix the weights of a step into the means, the first ones with more weight."""
        decay = np.float32(min(self.step.ema, (1 + steps_taken) / (10 + steps_taken)))
        for name, weight in self.trainer.weights().items():
            mean = self.means.get(name, weight)
            self.means[name] = decay * mean + (1 - decay) * weight


def _updates(train: Split | Stream, size: int) -> int:
    """Optimiser steps of an epoch: batches of equal size, or as a stream gives them without those `_large` drops."""
    whole, remainder = divmod(len(train), size)
    if isinstance(train, Split):
        return whole + (remainder > 0)
    return whole + (2 * remainder >= min(size, len(train)) and remainder > 0)


def record(
    epoch: int, loss: float | None, score: float, rate: float, start: float, companion: Companion
) -> dict[str, Any]:
    seconds = round(time.perf_counter() - start, 3)
    return {"epoch": epoch, "loss": loss, "score": score, "rate": rate, "seconds": seconds, **companion.record()}


def best_epoch(records: list[dict[str, Any]], step: Training) -> int:
    """Which epoch stays: the latest of the best ones (of equal scores, the one trained longer; while pruning goes on,
    the latest), or the last."""
    if not step.restore_best:
        return len(records) - 1
    return max(range(len(records)), key=lambda e: (_pruned(records[e]), _pruned(records[e]) and records[e]["score"], e))


def _pruned(record: Mapping[str, Any]) -> bool:
    return bool(record.get("pruned", True))


def _stale(records: list[dict[str, Any]], step: Training) -> bool:
    scores = [record["score"] for record in records if _pruned(record)]
    if not scores:
        return False
    return step.stops_after is not None and len(scores) - 1 - scores.index(max(scores)) >= step.stops_after


def _finite(loss: float, epoch: int, step: Training) -> float:
    if not math.isfinite(loss):
        raise SlimlineError(
            f"The training loss became {loss} in epoch {epoch}: lower learning_rate, which is {step.learning_rate:g}."
        )
    return loss


def _large(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches at least half as large as the first: a small last one would spoil batch-norm statistics."""
    first = 0
    for batch in batches:
        first = first or len(batch[0][0])
        if 2 * len(batch[0][0]) >= first:
            yield batch


def described(student: Model, teachers: Sequence[Model], step: Training, data: Data) -> tuple[Output, ...]:
    """What the outputs mean for the loss, once student and teachers are known to fit together."""
    own = bare_outputs(student, data)
    for teacher in teachers:
        if student.framework != teacher.framework:
            raise SlimlineError(
                f"A {student.framework} student cannot learn from a {teacher.framework} teacher: "
                "load both in one framework."
            )
        expected = bare_outputs(teacher, data)
        if [o.shape for o in own] != [o.shape for o in expected]:
            shapes = [", ".join(str(o.shape) for o in each) for each in (own, expected)]
            raise SlimlineError(
                f"The student's outputs {shapes[0]} and the teacher's {shapes[1]} differ in shape: "
                "recover a model from the original it was made of."
            )
    judge = teachers[0] if teachers else student
    lenient = step.alpha == 1 and data.metric is not None
    return described_outputs(student, data, "train", judge=judge, weights=step.output_weights, lenient=lenient)


def scorer(judges: Sequence[Model], outputs: Sequence[Output], step: Training, data: Data) -> Score:
    """The function that scores a predictor on the selection split; higher is better."""
    split = data.split("selection")
    if len(split) == 0:
        raise SlimlineError("Recovery needs a selection split to keep its best epoch: give Data(selection=...).")
    compared = split.labels is None and data.metric is None
    labelled = [own is not None for own in aligned(split.labels, outputs)]
    names = [output.name for output in outputs]

    def whole(predict: Callable[[tuple[Array, ...]], tuple[Array, ...]]) -> tuple[Array | None, ...]:
        """The outputs for all samples, of those that are scored."""
        held: list[list[Array]] = [[] for _ in outputs]
        for part, _ in split.batches(step.batch_size):
            for output, has_labels, answers, arrays in zip(outputs, labelled, predict(part), held, strict=True):
                if data.metric is not None or (output.floating if compared else has_labels):
                    arrays.append(answers)
        return tuple(np.concatenate(arrays) if arrays else None for arrays in held)

    several = data.metric is None and any(output.labelled and output.kind == "multilabel" for output in outputs)
    original: tuple[Array | None, ...] = ()
    if compared or several:
        every = [whole(lambda part, j=judge: j.adapter.answers(j.native, [part])[0]) for judge in judges]  # type: ignore[misc]
        original = tuple(_mean([a for a in answers if a is not None]) for answers in zip(*every, strict=True))
    reference = as_outputs(original, names) if several else None
    classes = [output for output in outputs if output.kind == "classes"]

    def score(predict: Callable[[tuple[Array, ...]], tuple[Array, ...]]) -> float:
        answers = whole(predict)
        if not compared:
            answer = as_outputs(answers, names)
            values = scores(answer, split.labels, reference=reference, metric=data.metric, declared=data.declared)[1]
            return float(values.mean())
        pairs = [
            (a, b, o) for a, b, o in zip(answers, original, outputs, strict=True) if a is not None and b is not None
        ]
        if step.loss == "mse" or not classes:
            return -float(np.mean([np.mean((a - b) ** 2) / o.scale for a, b, o in pairs]))
        same = [np.mean(a.argmax(o.axis) == b.argmax(o.axis)) for a, b, o in pairs if o.kind == "classes"]
        return float(np.mean(same))

    return score


def _mean(answers: Sequence[Array]) -> Array | None:
    """Of the same output of several models."""
    return answers[0] if len(answers) == 1 else np.mean(answers, axis=0) if answers else None


def _fingerprint(models: Sequence[Model], steps: list[dict[str, Any]], seed: int, samples: int) -> str:
    """What makes two recoveries the same, as far as it is cheap to know."""
    weights = [fingerprint(model) for model in models]
    return hashlib.sha256(json.dumps([steps, seed, samples, weights]).encode()).hexdigest()


def _sha256(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> str:
    """Of all that a checkpoint holds."""
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name, array in sorted(tensors.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Store:
    """One file with the trainer's state, the best state and the records: it is replaced whole or not at all."""

    folder: Path
    fingerprint: str

    @property
    def path(self) -> Path:
        return self.folder / "recovery.safetensors"

    def write(self, state: Mapping[str, Array], best: Mapping[str, Array], records: list[dict[str, Any]]) -> None:
        tensors = {f"state/{name}": array for name, array in state.items()}
        if best is not state:
            tensors |= {f"best/{name}": array for name, array in best.items()}
        metadata = {"fingerprint": self.fingerprint, "records": json.dumps(records)}
        metadata["sha256"] = _sha256(tensors, metadata)
        partial = self.path.with_suffix(".partial")
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            partial.unlink(missing_ok=True)  # whatever it is: nothing is written through a link
            try:
                save_file(tensors, partial, metadata)
                sync(partial)
                partial.replace(self.path)
                sync(self.folder)
            except BaseException as error:
                with contextlib.suppress(OSError):
                    partial.unlink(missing_ok=True)
                if isinstance(error, SafetensorError):
                    raise SlimlineError(
                        f"{self.path} cannot be written ({error}): free some space, and go on."
                    ) from error
                raise

    def read(self) -> tuple[list[dict[str, Any]], dict[str, Array], dict[str, Array]] | None:
        """Records, state and best state; None where nothing was written yet, or where what was is damaged."""
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, "numpy") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            if metadata.pop("sha256") != _sha256(tensors, metadata):
                raise ValueError("its checksum is another")
        except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, OSError, MemoryError) as error:
            log.warning("%s is damaged (%s): the training starts anew.", self.path, error)
            return None
        if metadata["fingerprint"] != self.fingerprint:
            raise SlimlineError(
                f"{self.path} belongs to another recovery (other model, step, seed or data): "
                "delete it or choose another checkpoint folder."
            )
        state, best = (
            {name.removeprefix(kind): array for name, array in tensors.items() if name.startswith(kind)}
            for kind in ("state/", "best/")
        )
        return json.loads(metadata["records"]), state, best or state
