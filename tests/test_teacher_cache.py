"""What teachers answer, kept on disk: the student is the same, and the teacher is asked once a sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import slimline as sl
from slimline.files.array_files import npy
from slimline.training.cache import TeacherCache
from slimline.training.loop import recover
from tests import recovery_job as job
from tests.test_features import FRAMEWORKS, LABELS, convolutional, images

STEP = sl.Distillation(epochs=2, batch_size=32, learning_rate=3e-3, refresh_batches=2, alpha=0.5)


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights(model: sl.Model) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in model.parameters().items() if name in model.graph.trainable}


def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that a cache hands to teachers."""
    sizes: list[int] = []
    answers = TeacherCache.answers

    def counting(self: TeacherCache, inputs: Any, ask: Any) -> Any:
        def counted(batch: Any) -> Any:
            sizes.append(len(batch[0]))
            return ask(batch)

        return answers(self, inputs, counted)

    monkeypatch.setattr(TeacherCache, "answers", counting)
    return sizes


@pytest.mark.parametrize("framework", [*FRAMEWORKS, "onnx"])
def test_students_are_the_same_with_and_without(
    framework: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = job.model(framework, 0), job.model(framework, 1)
    data = job.digits(framework, samples=300)
    cached = STEP.model_copy(update={"cache": str(tmp_path)})
    plain = recover(student, teacher, STEP, data, 0)
    sizes = asked(monkeypatch)
    first = recover(student, teacher, cached, data, 0)
    samples = len(data.split("train"))
    assert sum(sizes) == samples  # of two epochs
    before = files(tmp_path)
    assert sum(len(npy(path)) for path in before) == samples
    second = recover(student, teacher, cached, data, 0)
    assert sum(sizes) == samples
    assert files(tmp_path) == before
    for other in (first, second):
        assert weights(other.model) == weights(plain.model)
        assert [r["loss"] for r in other.records] == [r["loss"] for r in plain.records]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_what_is_augmented_is_read_again_by_the_same_seed(
    framework: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = job.model(framework, 0), job.model(framework, 1)
    data = job.digits(framework, samples=128, augment=job.noise)
    view = {"shift": 1, "mixup": 1.0}
    step = sl.Distillation(epochs=1, batch_size=32, refresh_batches=2, alpha=1.0, view=view, accumulate=2)
    cached = step.model_copy(update={"cache": str(tmp_path)})
    plain = recover(student, teacher, step, data, 0)
    sizes, samples = asked(monkeypatch), len(data.split("train"))
    for seed, computed in ((0, 1), (0, 1), (1, 2)):
        trained = recover(student, teacher, cached, data, seed)
        assert sum(sizes) == computed * samples
        if seed == 0:
            assert weights(trained.model) == weights(plain.model)


def test_each_of_several_teachers_has_its_own_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student, x = convolutional("torch", 3), images("torch")
    one, two = convolutional("torch", 4, 1), convolutional("torch", 4, 2)
    data = sl.Data(train=(x, LABELS), selection=(x[:8], LABELS[:8]), test=(x, LABELS), overlap="allow")
    step = sl.Distillation(epochs=1, batch_size=12)
    cached = step.model_copy(update={"cache": str(tmp_path)})
    sizes = asked(monkeypatch)
    recover(student, one, cached, data, 0)
    assert sum(sizes) == 24
    both = recover(student, (one, two), cached, data, 0)
    assert sum(sizes) == 48
    assert weights(both.model) == weights(recover(student, (one, two), step, data, 0).model)
    recover(student, two, cached.model_copy(update={"loss": "dkd"}), data, 0)
    assert sum(sizes) == 48
    assert len(list(tmp_path.iterdir())) == 2


def test_what_is_damaged_is_computed_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    student, teacher, x = convolutional("torch", 3), convolutional("torch", 4, 1), images("torch")
    data = sl.Data(train=(x, LABELS), selection=(x[:8], LABELS[:8]), test=(x, LABELS), overlap="allow")
    step = sl.Distillation(epochs=1, batch_size=12, cache=str(tmp_path))
    expected = weights(recover(student, teacher, step, data, 0).model)
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    sizes = asked(monkeypatch)
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:100], b""):
        path.write_bytes(damaged)
        assert weights(recover(student, teacher, step, data, 0).model) == expected
        assert "removed" in caplog.text
        assert path.read_bytes() == whole
        assert sum(sizes) == 24
        sizes.clear()
        caplog.clear()
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(sl.SlimlineError, match="no regular file"):
        recover(student, teacher, step, data, 0)
    path.unlink()
    (path.parent / "README").touch()  # is nothing of ours
    path.parent.rename(tmp_path / "moved")
    path.parent.symlink_to(tmp_path / "moved")
    with pytest.raises(sl.SlimlineError, match="is a symbolic link"):
        recover(student, teacher, step, data, 0)
    assert [each.name for each in (tmp_path / "moved").iterdir()] == ["README"]


def test_what_cannot_be_cached_is_refused(tmp_path: Path) -> None:
    for fields, why in (({"features": ["hint"]}, "inside"), ({"alpha": 0.0}, "none are read")):
        with pytest.raises(sl.SlimlineError, match=why):
            sl.Distillation(cache="answers", **fields)
    (tmp_path / "file").touch()
    model, x = convolutional("torch", 3), images("torch")
    data = sl.Data(train=(x, LABELS), test=(x, LABELS), overlap="allow")
    with pytest.raises(sl.SlimlineError, match="cannot be written"):
        sl.apply(model, sl.Distillation(cache=str(tmp_path / "file")), data, teacher=convolutional("torch", 4))
    with pytest.raises(sl.SlimlineError, match="cache of Distillation is for one student"):
        sl.mutual([model, model], sl.Distillation(cache="answers"), data)
