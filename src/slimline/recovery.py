"""The training loop that gives a compressed model its accuracy back, once for every framework.

The student learns from the original's outputs and, where there are any, from the labels. After every
epoch all that the rest depends on is written as one file, atomically; a recovery that was killed and is
called again with the same arguments ends with the same bits as one that was left alone (on one machine
with one number of threads).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from slimline.errors import SlimlineError
from slimline.frameworks.base import Array, Batch
from slimline.methods.distillation import class_axis
from slimline.methods.schedules import warmup_cosine
from slimline.model import Model
from slimline.recipe import Distillation, SparsePruning

if TYPE_CHECKING:
    from slimline.data import Data
    from slimline.masker import Masker

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """How far a long job has come: `done` of `total` parts of `what`; `extra` holds figures worth showing."""

    what: str
    done: int
    total: int
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recovered:
    """What `recover` gives.

    Attributes
    ----------
    model : the student as it was after `best_epoch`, in inference mode.
    records : one per epoch: ``epoch``, mean training ``loss`` (None for epoch 0), ``score`` on the selection
        split, learning ``rate`` of the last step, ``seconds``. Epoch 0 is the student with its batch-norm
        statistics refreshed and nothing trained.
    best_epoch : the latest epoch with the highest score.
    """

    model: Model
    records: list[dict[str, Any]]
    best_epoch: int


def recover(
    student: Model,
    teacher: Model,
    step: Distillation,
    data: Data,
    seed: int,
    checkpoint: Path | None = None,
    progress: Callable[[Progress], None] | None = None,
    pruning: SparsePruning | None = None,
) -> Recovered:
    """Train `student` towards `teacher`, and return the best of its epochs.

    What the student's masks set to zero stays zero. Batch-norm statistics are recomputed first. After each epoch
    the selection split gives a score: the mean of `data`'s own metric, else accuracy, else (without labels) the part
    of samples classed as the teacher does or, for ``loss="mse"``, the negative mean squared distance from the
    teacher's outputs.

    Parameters
    ----------
    student, teacher : models of one framework with outputs of one shape; neither is changed.
    seed : decides the order of the samples, augmentation and dropout.
    checkpoint : folder in which ``recovery.safetensors`` keeps the state to resume from; made when missing.
    progress : told after every optimiser step.
    pruning : prunes gradually while the student trains; only epochs that end with all of it done can be the best.

    Raises
    ------
    SlimlineError : no training data, models that do not fit together, a loss that is not finite, or a
        checkpoint of another recovery.
    """
    train = data.split("train")
    if len(train) == 0:
        raise SlimlineError("Recovery needs training data: give Data(train=...) or drop the Distillation step.")
    score = _scorer(student, teacher, step, data)
    per_epoch = -(-len(train) // step.batch_size)
    total = step.epochs * per_epoch
    trainer = student.adapter.trainer(student.native, teacher.native, step, seed, total)
    masker = None if pruning is None else _masker(pruning, student, step, seed, len(train))
    if student.masks:
        trainer.hold(student.masks)
    facts = [s.model_dump(mode="json") for s in (step, pruning) if s is not None]
    store = None if checkpoint is None else _Store(checkpoint, _fingerprint(student, teacher, facts, seed, len(train)))

    def state_now() -> dict[str, Array]:
        return trainer.state() | ({} if masker is None else masker.state())

    def restore(state: Mapping[str, Array]) -> None:
        trainer.restore(state)
        if masker is not None:
            masker.restore(state)
            trainer.hold({**student.masks, **masker.masks})

    saved = None if store is None else store.read()
    if saved is None:
        start = time.perf_counter()
        trainer.refresh(islice(train.batches(step.batch_size, seed=seed, epoch=0), step.refresh_batches))
        records = [_record(0, None, score(trainer.predict), 0.0, start, masker)]
        best = state_now()
        if store is not None:
            store.write(best, best, records)
    else:
        records, state, best = saved
        restore(state)

    while len(records) <= step.epochs and not _stale(records, step.patience):
        start, epoch = time.perf_counter(), len(records)
        losses: list[float] = []
        rate = 0.0
        for batch in _large(train.batches(step.batch_size, seed=seed, epoch=epoch)):
            done = (epoch - 1) * per_epoch + len(losses)
            rate = step.learning_rate * warmup_cosine(done, total, step.warmup)
            losses.append(_finite(trainer.step(batch, rate), epoch, step))
            if masker is not None and masker.advance(trainer.weights, partial(trainer.gradients, batch)):
                trainer.hold({**student.masks, **masker.masks})
            if progress is not None:
                progress(Progress("recovery", min(done + 1, total), total, {"epoch": epoch, "loss": losses[-1]}))
        records.append(_record(epoch, float(np.mean(losses)), score(trainer.predict), rate, start, masker))
        state = state_now()
        if _best(records) == epoch:
            best = state
        if store is not None:
            store.write(state, best, records)
        log.info("recovery epoch %(epoch)d: loss %(loss).4g, score %(score).4f", records[-1])

    restore(best)
    masks = student.masks if masker is None else {**student.masks, **masker.masks}
    found = student.then(trainer.native(), step.model_dump(mode="json"), masks=masks)
    return Recovered(found, records, _best(records))


def _masker(pruning: SparsePruning, student: Model, step: Distillation, seed: int, samples: int) -> Masker:
    from slimline.masker import Masker
    from slimline.sparse import chosen

    layers, refused = chosen(student, pruning)
    for entry in refused:
        log.warning("%(what)s is not pruned: %(reason)s.", entry)
    shapes = {name: student.graph.values[name].shape for name in layers}
    whole, rest = divmod(samples, step.batch_size)
    steps = whole + (2 * rest >= min(step.batch_size, samples) and rest > 0)
    return Masker(pruning, layers, shapes, step.epochs * steps, seed, student.masks)


def _record(
    epoch: int, loss: float | None, score: float, rate: float, start: float, masker: Masker | None
) -> dict[str, Any]:
    seconds = round(time.perf_counter() - start, 3)
    found = {"epoch": epoch, "loss": loss, "score": score, "rate": rate, "seconds": seconds}
    return found if masker is None else {**found, "sparsity": round(masker.sparsity, 6), "pruned": masker.settled}


def _best(records: list[dict[str, Any]]) -> int:
    """The latest of the best epochs: of equal scores, the one trained longer; while pruning goes on, the latest."""
    return max(range(len(records)), key=lambda e: (_pruned(records[e]), _pruned(records[e]) and records[e]["score"], e))


def _pruned(record: Mapping[str, Any]) -> bool:
    return bool(record.get("pruned", True))


def _stale(records: list[dict[str, Any]], patience: int | None) -> bool:
    scores = [record["score"] for record in records if _pruned(record)]
    if not scores:
        return False
    return patience is not None and len(scores) - 1 - scores.index(max(scores)) >= patience


def _finite(loss: float, epoch: int, step: Distillation) -> float:
    if not math.isfinite(loss):
        raise SlimlineError(
            f"The recovery loss became {loss} in epoch {epoch}: lower learning_rate, which is {step.learning_rate:g}."
        )
    return loss


def _large(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches at least half as large as the first: a small last one would spoil batch-norm statistics."""
    first = 0
    for batch in batches:
        first = first or len(batch[0][0])
        if 2 * len(batch[0][0]) >= first:
            yield batch


def _scorer(
    student: Model, teacher: Model, step: Distillation, data: Data
) -> Callable[[Callable[[tuple[Array, ...]], Array]], float]:
    """The function that scores a predictor on the selection split; higher is better."""
    if student.framework != teacher.framework:
        raise SlimlineError(
            f"A {student.framework} student cannot learn from a {teacher.framework} teacher: "
            "load both in one framework."
        )
    split = data.split("selection")
    inputs, labels = split.inputs, split.labels
    if len(split) == 0:
        raise SlimlineError("Recovery needs a selection split to keep its best epoch: give Data(selection=...).")
    given, wanted = (m.predict(*(x[:2] for x in inputs)) for m in (student, teacher))
    if given.shape != wanted.shape:
        raise SlimlineError(
            f"The student's outputs {given.shape} and the teacher's {wanted.shape} differ in shape: "
            "recover a model from the original it was made of."
        )
    used = None if step.alpha == 1 else labels
    if used is not None and used.dtype.kind == "f":
        _check_real(step, used, given)
        used = None
    axis = class_axis(given.shape, None if used is None else used[:2].shape, student.framework == "torch")
    if step.loss != "mse" and given.shape[axis] == 1:
        raise SlimlineError(f"Outputs of one class leave {step.loss!r} nothing to compare: use loss='mse'.")

    def outputs(predict: Callable[[tuple[Array, ...]], Array]) -> Array:
        return np.concatenate([predict(part) for part, _ in split.batches(step.batch_size)])

    original = outputs(lambda part: teacher.predict(*part)) if labels is None and data.metric is None else None

    def score(predict: Callable[[tuple[Array, ...]], Array]) -> float:
        found = outputs(predict)
        if data.metric is not None:
            return float(np.mean(data.metric(found, labels)))
        if original is None:
            return float(np.mean(found.argmax(axis) == labels))
        if step.loss == "mse":
            return -float(np.mean((found - original) ** 2))
        return float(np.mean(found.argmax(axis) == original.argmax(axis)))

    return score


def _check_real(step: Distillation, labels: Array, outputs: Array) -> None:
    if step.loss != "mse":
        raise SlimlineError(
            f"The labels are real numbers, which {step.loss!r} cannot compare: use loss='mse', or alpha=1 to leave "
            "the labels out."
        )
    if labels[: len(outputs)].size != outputs.size:
        raise SlimlineError(
            f"The labels have shape {labels.shape[1:]} per sample and the outputs {outputs.shape[1:]}: they must agree."
        )


def _fingerprint(student: Model, teacher: Model, steps: list[dict[str, Any]], seed: int, samples: int) -> str:
    """What makes two recoveries the same, as far as it is cheap to know."""
    digest = hashlib.sha256(json.dumps([steps, seed, samples]).encode())
    for model in (student, teacher):
        for name, array in sorted(model.parameters().items()):
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class _Store:
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
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        save_file(tensors, partial, metadata)
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(self.path)

    def read(self) -> tuple[list[dict[str, Any]], dict[str, Array], dict[str, Array]] | None:
        """Records, state and best state; None where nothing was written yet."""
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, "numpy") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except SafetensorError as error:
            raise SlimlineError(f"{self.path} is damaged ({error}): delete it to start the recovery anew.") from error
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
