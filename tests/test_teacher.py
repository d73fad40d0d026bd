"""What training learns from is the uncompressed network, or the one that the user names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import slimline as sl
from slimline.basics.progress import Progress
from slimline.graph.edits import PutTensors
from slimline.training.loop import recover
from tests import compress_job

FRAMEWORKS = ("torch", "keras")
PRUNE = sl.ChannelPruning(ratio=0.5)
LEARN = sl.Distillation(alpha=1.0, loss="mse", epochs=1, batch_size=64, learning_rate=1e-3, refresh_batches=0)


@pytest.fixture(scope="module", params=FRAMEWORKS)
def framework(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def contented(outputs: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
    """Every epoch is as good as the others, so that the last is kept."""
    return np.ones(len(outputs))


@pytest.fixture(scope="module")
def data(framework: str) -> sl.Data:
    shape = (1, 8, 8) if framework == "torch" else (8, 8, 1)
    x = np.random.default_rng(0).random((220, *shape), np.float32)
    return sl.Data(train=(x[:160],), test=(x[160:],), metric=contented)


@pytest.fixture(scope="module")
def model(framework: str, data: sl.Data) -> sl.Model:
    return sl.load(compress_job.model(framework), data.example())


def weights(model: sl.Model) -> np.ndarray:
    return np.concatenate([a.ravel() for n, a in sorted(model.parameters().items()) if n in model.graph.trainable])


def other(model: sl.Model, factor: float) -> sl.Model:
    """A teacher whose answers are nobody else's."""
    tensors = {n: a * np.float32(factor) for n, a in model.parameters().items() if n in model.graph.trainable}
    return sl.Model(model.adapter, model.edit(PutTensors(tensors)), model.example)


def test_steps_one_by_one_learn_from_what_steps_at_once_learn_from(model: sl.Model, data: sl.Data) -> None:
    pruned = sl.apply(model, PRUNE)
    apart = weights(sl.apply(pruned, LEARN, data))
    np.testing.assert_array_equal(apart, weights(sl.apply(model, [PRUNE, LEARN], data)))
    np.testing.assert_array_equal(apart, weights(recover(pruned, model, LEARN, data.check(model.inputs), 0).model))
    itself = weights(recover(pruned, pruned, LEARN, data.check(model.inputs), 0).model)
    assert np.abs(apart - itself).max() > 1e-4
    # To learn from itself is to learn nothing: the loss has no gradient then, and has one towards the original.
    batch = next(data.check(model.inputs).split("train").batches(32))
    for teacher, learns in ((pruned, False), (model, True)):
        trainer = model.adapter.trainer(pruned.native, teacher.native, LEARN, 0, 1)
        steepest = max(np.abs(g).max() for g in trainer.gradients(batch).values())
        assert (steepest > 1e-3) if learns else (steepest < 1e-5)


def test_the_origin_stays_through_every_step(model: sl.Model, data: sl.Data) -> None:
    assert model.origin is None
    assert model.uncompressed is model
    pruned = sl.apply(model, PRUNE)
    sparse = sl.apply(pruned, sl.SparsePruning(amount=0.5))
    planned = sl.plan(model, PRUNE)
    quantized = sl.apply(sl.apply(sparse, LEARN, data), sl.StaticQuantization(undo=False, samples=32), data)
    made = [pruned, sparse, planned.mask(model), planned.apply(model), sl.finalize(sparse), quantized]
    made.append(sl.apply(model, sl.SparseTraining(penalty="l2", epochs=1, batch_size=64, loss="mse"), data))
    made.append(planned.apply(sl.finalize(model)))
    made.append(sl.apply(model, [sl.SparsePruning(amount=0.5, schedule="polynomial"), LEARN], data))
    for result in made:
        assert result.origin is model


def test_a_training_loop_of_ones_own_does_not_reach_the_teacher(model: sl.Model) -> None:
    before = weights(model)
    final = sl.finalize(sl.apply(model, sl.SparsePruning(amount=0.5)))
    for result in (final, sl.finalize(model), sl.plan(model, PRUNE).mask(model), sl.apply(model, PRUNE)):
        if model.framework == "torch":
            for tensor in (*result.native.parameters(), *result.native.buffers()):
                tensor.data.zero_()
        else:
            for variable in result.native.variables:
                variable.assign(variable * 0)
    np.testing.assert_array_equal(weights(model), before)


def test_a_named_teacher_is_learned_from(model: sl.Model, data: sl.Data, tmp_path: Path) -> None:
    pruned, louder = sl.apply(model, PRUNE), other(model, 1.5)
    expected = weights(recover(pruned, louder, LEARN, data.check(model.inputs), 0).model)
    assert np.abs(expected - weights(sl.apply(pruned, LEARN, data))).max() > 1e-4
    path = louder.save(tmp_path / f"louder{model.adapter.suffix}")
    for named in (louder, louder.native, path, str(path)):
        taught = sl.apply(pruned, LEARN, data, teacher=named)
        np.testing.assert_array_equal(weights(taught), expected)
        assert taught.origin is model
    # With a teacher of its own a network that nothing was done to has something to learn.
    assert np.abs(weights(sl.apply(model, LEARN, data, teacher=louder)) - weights(model)).max() > 1e-4


def test_without_one_a_saved_model_is_not_distilled(model: sl.Model, data: sl.Data, tmp_path: Path) -> None:
    pruned = sl.apply(model, PRUNE)
    again = sl.load(pruned.save(tmp_path / f"small{model.adapter.suffix}"))
    assert again.uncompressed is None
    more = sl.ChannelPruning(ratio=0.2)
    for steps in (LEARN, [more, LEARN], sl.SparseTraining(epochs=1, loss="mse")):
        with pytest.raises(sl.SlimlineError, match=r"was made of is not known.*teacher="):
            sl.apply(again, steps, data)
        with pytest.raises(sl.SlimlineError, match=r"was made of is not known.*teacher="):
            sl.compress(again, data, recipe=steps, output=tmp_path / "run")
        assert not (tmp_path / "run").exists()
    assert sl.apply(again, more).origin is None
    np.testing.assert_array_equal(
        weights(sl.apply(again, LEARN, data, teacher=model)), weights(sl.apply(pruned, LEARN, data))
    )


def test_labels_alone_need_no_teacher(model: sl.Model, data: sl.Data, tmp_path: Path) -> None:
    x = data.check(model.inputs).split("train").inputs[0]
    labels = np.arange(len(x)) % 10
    labelled = sl.Data(train=(x, labels), test=(x[:60], labels[:60]), metric=contented)
    again = sl.load(sl.apply(model, PRUNE).save(tmp_path / f"small{model.adapter.suffix}"))
    alone = LEARN.model_copy(update={"alpha": 0.0, "loss": "kl"})
    assert np.abs(weights(sl.apply(again, alone, labelled)) - weights(again)).max() > 1e-4
    with pytest.raises(sl.SlimlineError, match="teacher="):
        sl.apply(again, alone, data)  # it has no labels


def test_a_teacher_that_does_not_fit_is_refused(model: sl.Model, data: sl.Data) -> None:
    pruned = sl.apply(model, PRUNE)
    shape = (3, 8, 8) if model.framework == "torch" else (8, 8, 3)
    if model.framework == "torch":
        from slimline.zoo.torch import ResidualCNN

        wide, fewer = ResidualCNN((8, 16), 1, in_channels=3).eval(), ResidualCNN((8, 16), 1, classes=7).eval()
    else:
        from slimline.zoo.keras import residual_cnn

        wide, fewer = residual_cnn((8, 16), 1, size=8, in_channels=3), residual_cnn((8, 16), 1, size=8, classes=7)
    colour = sl.load(wide, np.zeros((2, *shape), np.float32))
    with pytest.raises(sl.SlimlineError, match="teacher takes inputs float32"):
        sl.apply(pruned, LEARN, data, teacher=colour)
    with pytest.raises(sl.SlimlineError, match=r"teacher's outputs \(7,\) and the student's \(10,\)"):
        sl.apply(pruned, LEARN, data, teacher=fewer)
    with pytest.raises(sl.SlimlineError, match="No step learns from a teacher"):
        sl.apply(model, PRUNE, teacher=model)
    with pytest.raises(sl.SlimlineError, match="NaN or infinity"):
        sl.apply(pruned, LEARN, data, teacher=other(model, 1e30))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_teacher_of_another_tokeniser_is_refused(framework: str) -> None:
    ids = np.random.default_rng(0).integers(0, 9, (12, 5)).astype(np.int32)

    def reader(tokens: int) -> sl.Model:
        if framework == "keras":
            import keras
            from keras import layers as L

            x = keras.Input((5,), dtype="int32", name="x")
            y = L.GlobalAveragePooling1D()(L.Embedding(tokens, 4)(x))
            return sl.load(keras.Model(x, L.Dense(3)(y)), ids[:2])
        import torch

        layers = (torch.nn.Embedding(tokens, 4), torch.nn.Flatten(), torch.nn.Linear(20, 3))
        return sl.load(torch.nn.Sequential(*layers).eval(), ids[:2])

    data = sl.Data(train=(ids, np.arange(12) % 3), selection=(ids, np.arange(12) % 3))
    step = sl.Distillation(epochs=1)
    for tokens in (28_996, 12):
        with pytest.raises(
            sl.SlimlineError, match=f"one of 30522 tokens and the teacher's one of {tokens}: name a tea"
        ):
            sl.apply(reader(30_522), step, data, teacher=reader(tokens))
    sl.apply(reader(30_522), step, data, teacher=reader(30_592))  # padded to a multiple of 64 or 128


def test_tables_of_positions_are_no_vocabulary() -> None:
    import torch

    class Reader(torch.nn.Module):
        """Counts positions by what is no padding."""

        def __init__(self, positions: int) -> None:
            super().__init__()
            self.places, self.words = torch.nn.Embedding(positions, 4), torch.nn.Embedding(9, 4)
            self.head = torch.nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mask = (x != 0).long()
            return self.head((self.places(mask.cumsum(1) * mask) + self.words(x)).mean(1))

    ids = np.random.default_rng(0).integers(0, 9, (12, 5))
    data = sl.Data(train=(ids, np.arange(12) % 3), selection=(ids, np.arange(12) % 3))
    student, teacher = (sl.load(Reader(n).eval(), ids[:2]) for n in (13, 514))
    sl.apply(student, sl.Distillation(epochs=1), data, teacher=teacher)


def test_frameworks_do_not_teach_each_other() -> None:
    models = {f: sl.load(compress_job.model(f), compress_job.data(f).example()) for f in FRAMEWORKS}
    for student, teacher in (FRAMEWORKS, FRAMEWORKS[::-1]):
        for named in (models[teacher], compress_job.model(teacher)):
            with pytest.raises(sl.SlimlineError, match=f"{student} student cannot learn from a {teacher} teacher"):
                sl.apply(models[student], [PRUNE, LEARN], teacher=named)


@pytest.mark.usefixtures("no_clock")
@pytest.mark.parametrize("named", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_run_keeps_its_teacher(model: sl.Model, data: sl.Data, tmp_path: Path, named: bool) -> None:
    """A run of a pruned model learns from what it was pruned from, before a kill and after; times say nothing of it."""
    pruned = sl.apply(model, PRUNE)
    teacher = other(model, 1.5) if named else None
    budget = sl.Budget(max_drop=None)
    settings = {"recipe": LEARN, "budget": budget, "batch_sizes": (1,)}
    run = sl.compress(pruned, data, output=tmp_path / "run", teacher=teacher, **settings)
    expected = weights(sl.apply(pruned, LEARN, data, teacher=teacher))
    np.testing.assert_array_equal(weights(run.model), expected)

    for now in ("Saving the original", "Exporting the original", "Distillation"):
        again = tmp_path / now
        with pytest.raises(Killed):
            sl.compress(pruned, data, output=again, teacher=teacher, progress=killer(now), **settings)
        if now == "Saving the original":
            forgotten = pruned if named else sl.load(pruned.save(tmp_path / f"forgotten{model.adapter.suffix}"))
            with pytest.raises(sl.SlimlineError, match=r"another teacher|teacher=teacher"):
                sl.resume(again, forgotten, data)
            ended = sl.resume(again, pruned, data, teacher=teacher)
        else:
            ended = sl.resume(again, None, data)
        np.testing.assert_array_equal(weights(ended.model), expected)


@pytest.mark.usefixtures("no_clock")
def test_a_compressed_network_may_teach_what_is_made_of_it(model: sl.Model, data: sl.Data, tmp_path: Path) -> None:
    again = sl.load(sl.apply(model, PRUNE).save(tmp_path / f"small{model.adapter.suffix}"))
    steps = [sl.SparsePruning(amount=0.5), LEARN]
    settings = {"recipe": steps, "budget": sl.Budget(max_drop=None), "batch_sizes": (1,)}
    run = sl.compress(again, data, output=tmp_path / "run", teacher=again, **settings)
    np.testing.assert_array_equal(weights(run.model), weights(sl.apply(again, steps, data, teacher=again)))


class Killed(BaseException):
    """As a signal would, at a known place."""


def killer(now: str) -> Callable[[Progress], None]:
    """Ends the work once it says that it begins with `now`."""

    def tell(progress: Progress) -> None:
        if str(progress.extra.get("now", "")).startswith(now):
            raise Killed

    return tell
