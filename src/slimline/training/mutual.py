"""Deep mutual learning: students that teach each other while they learn (Zhang et al. 2018, arXiv:1706.00384)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np

from slimline.basics.errors import SlimlineError
from slimline.frameworks.base import Batch, Trainer
from slimline.training.companions import Companion
from slimline.training.loop import Loop, Recovered, best_epoch, described, record, scorer
from slimline.training.views import check as check_view

if TYPE_CHECKING:
    from slimline.basics.progress import Progress
    from slimline.data import Data
    from slimline.model import Model
    from slimline.recipe.training import Training


class Cohort:
    """Students under training that take every step one after the other, each towards the others as they are then."""

    def __init__(self, trainers: Sequence[Trainer]) -> None:
        self.trainers = trainers
        for trainer in trainers:
            trainer.follow([other for other in trainers if other is not trainer])

    def refresh(self, batches: Iterable[Batch]) -> None:
        """Compute all batch-norm statistics anew."""
        every = list(batches)
        for trainer in self.trainers:
            trainer.refresh(every)

    def step(self, batch: Batch, rate: float) -> float:
        """One optimiser step of each; the mean of their losses."""
        return float(np.mean([trainer.step(batch, rate) for trainer in self.trainers]))


def learn_together(
    students: Sequence[Model],
    step: Training,
    data: Data,
    seed: int,
    progress: Callable[[Progress], None] | None = None,
) -> list[Recovered]:
    """Train all `students` on the same batches, each towards the mean of the others and the labels, and return the best
    epoch of each.

    Raises
    ------
    SlimlineError : fewer than two students, outputs that differ, no training data, or settings of `step` that are for a
        student alone.
    """
    if len(students) < 2:
        raise SlimlineError(f"Mutual learning is among several students, and there are {len(students)}: give two.")
    alone = [name for name, on in (("features", step.features), ("ema", step.ema), ("patience", step.stops_after),
                                   ("schedule: plateau", step.schedule == "plateau"), ("alpha: 0", step.alpha == 0),
                                   ("cache", step.cache is not None)) if on]  # fmt: skip
    if alone:
        raise SlimlineError(f"{', '.join(alone)} of {step.step} is for one student and its teacher: leave it out.")
    train = data.split("train")
    if step.view is not None:
        check_view(step, students[0].example, next(train.batches(1))[1])
    first = students[0]
    outputs = described(first, students[1:], step, data)
    score = scorer(students, outputs, step, data)
    total = step.epochs * -(-len(train) // step.batch_size)
    trainers = [
        student.adapter.trainer(student.native, None, step, seed + number, total, outputs)
        for number, student in enumerate(students)
    ]
    for student, trainer in zip(students, trainers, strict=True):
        if student.masks:
            trainer.hold(student.masks)
    channels_first = first.adapter.layout == "channels_first"
    cohort = cast("Trainer", Cohort(trainers))  # epochs ask it for no more
    loop = Loop(step, train, cohort, Companion(), seed, total, progress, channels_first)

    start = time.perf_counter()
    loop.refresh(0)
    records = [[record(0, None, score(trainer.outputs), 0.0, start, loop.companion)] for trainer in trainers]
    best = [trainer.state() for trainer in trainers]
    for epoch in range(1, step.epochs + 1):
        start = time.perf_counter()
        loss, rate = loop.epoch(epoch)
        for number, trainer in enumerate(trainers):
            records[number].append(record(epoch, loss, score(trainer.outputs), rate, start, loop.companion))
            if best_epoch(records[number], step) == epoch:
                best[number] = trainer.state()
    learned = []
    for student, trainer, state, own in zip(students, trainers, best, records, strict=True):
        trainer.restore(state)
        model = student.then(trainer.native(), step.model_dump(mode="json"))
        learned.append(Recovered(model, own, best_epoch(own, step)))
    return learned
