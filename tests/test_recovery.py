import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file

from slimline.basics.errors import SlimlineError
from slimline.basics.progress import Progress
from slimline.data import Data
from slimline.graph.edits import PutTensors
from slimline.model import Model
from slimline.steps.distillation.step import Distillation
from slimline.training import loop as recovery
from slimline.training.loop import recover
from tests import recovery_job as job

ROOT = Path(__file__).parent.parent


# The loop alone, around a trainer whose scores and losses are written down.


@dataclass
class Script:
    """A framework whose student answers rightly on as many of ten samples as `scores` says for each epoch."""

    scores: list[int]
    loss: float = 1.0
    name: str = "torch"
    layout: str = "channels_first"
    made: list["ScriptedTrainer"] = field(default_factory=list)

    def parameters(self, native):
        return {"w": np.array([native], np.float32)}

    def free(self, native):
        return "batch"

    def output_names(self, native):
        return ("logits",)

    def outputs(self, native, inputs):
        return (np.eye(10, dtype=np.float32)[inputs[0][:, 0].astype(int)],)

    def answers(self, native, batches):
        return [self.outputs(native, batch) for batch in batches]

    def trainer(self, native, teacher, step, seed, total_steps, outputs):
        self.made.append(ScriptedTrainer(self))
        return self.made[-1]


class ScriptedTrainer:
    def __init__(self, script):
        self.script, self.steps, self.rates, self.refreshed = script, 0, [], 0

    @property
    def epoch(self):
        return self.steps // 3

    def refresh(self, batches):
        self.refreshed = len(list(batches))

    def step(self, batch, rate):
        self.rates.append(rate)
        self.steps += 1
        return self.script.loss

    def outputs(self, inputs):
        right = inputs[0][:, 0].astype(int)
        wrong = inputs[0][:, 0] >= self.script.scores[self.epoch]
        return (np.eye(10, dtype=np.float32)[(right + wrong) % 10],)

    def state(self):
        return {"steps": np.array(self.steps)}

    def restore(self, state):
        self.steps = int(state["steps"])

    def native(self):
        return self.epoch


def scripted(scores, epochs=5, checkpoint=None, data=None, found=1.0, **fields):
    script = Script(scores, found)
    x = np.arange(10, dtype=np.float32)[:, None]
    data = data or Data(train=(np.tile(x, (3, 1)), np.tile(np.arange(10), 3)), selection=(x, np.arange(10)))
    model = Model(script, -1, (x[:2],))
    step = Distillation(epochs=epochs, batch_size=10, **fields)
    return recover(model, model, step, data, 0, checkpoint), script


def test_the_best_epoch_is_kept_and_of_equal_ones_the_latest():
    found, _ = scripted([2, 5, 9, 9, 7, 3])
    assert found.best_epoch == found.model.native == 3
    assert [r["score"] for r in found.records] == [0.2, 0.5, 0.9, 0.9, 0.7, 0.3]
    assert found.records[0]["loss"] is None
    assert found.model.history[-1]["step"] == "Distillation"


def test_the_last_epoch_is_kept_where_the_best_is_not_to_be(caplog, tmp_path):
    for checkpoint in (None, tmp_path, tmp_path):  # the third time it is read back
        found, _ = scripted([9, 2, 5, 8, 7, 3], checkpoint=checkpoint, restore_best=False)
        assert found.best_epoch == found.model.native == 5
    assert not caplog.text


def test_refreshed_statistics_alone_can_be_the_best_which_is_said(caplog):
    found, script = scripted([9, 5, 5, 5, 5, 5], refresh_batches=2)
    assert found.best_epoch == found.model.native == 0
    assert script.made[0].refreshed == 2
    assert "No epoch of Distillation scored above the network as it came, 0.9 on the selection split" in caplog.text
    caplog.clear()
    scripted([9, 9, 5, 5, 5, 5])
    assert not caplog.text


@pytest.mark.parametrize(("patience", "epochs"), [(None, 5), (1, 2), (2, 3), (3, 4), (4, 5)])
def test_training_stops_when_nothing_gets_better(patience, epochs):
    # Epoch 2 only equals epoch 1, which is no better.
    found, _ = scripted([5, 7, 7, 6, 4, 9], patience=patience)
    assert len(found.records) - 1 == epochs


def test_the_rate_rises_and_falls_over_all_steps():
    _, script = scripted([1] * 6, learning_rate=0.5, warmup=0.2)
    rates = script.made[0].rates
    assert len(rates) == 15
    assert rates[:3] == pytest.approx([0.5 / 3, 1 / 3, 0.5])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert 0 < rates[-1] < 0.02


def test_no_epochs_only_refreshes():
    found, _ = scripted([4], epochs=0)
    assert len(found.records) == 1
    assert found.best_epoch == 0


def test_a_finished_recovery_is_read_back(tmp_path):
    first, _ = scripted([2, 5, 9, 8, 7, 3], checkpoint=tmp_path)
    again, script = scripted([2, 5, 9, 8, 7, 3], checkpoint=tmp_path)
    assert again.records == first.records
    assert again.model.native == first.model.native == 2
    assert script.made[0].refreshed == 0


def test_a_diverging_loss_says_to_lower_the_rate():
    with pytest.raises(SlimlineError, match=r"became nan in epoch 1: lower learning_rate, which is 0\.001"):
        scripted([1] * 6, found=float("nan"))


def test_a_checkpoint_of_another_recovery_is_refused(tmp_path):
    scripted([1] * 6, checkpoint=tmp_path)
    with pytest.raises(SlimlineError, match="belongs to another recovery"):
        scripted([1] * 6, checkpoint=tmp_path, temperature=2.0)


def test_a_kill_while_the_checkpoint_is_written_leaves_the_one_before(tmp_path, monkeypatch):
    scores = [2, 5, 9, 8, 7, 3]
    whole, _ = scripted(scores)
    writes = []

    def torn(tensors, path, metadata):
        save_file(tensors, path, metadata)
        writes.append(path)
        if len(writes) == 3:
            path.write_bytes(path.read_bytes()[:100])
            raise KeyboardInterrupt

    monkeypatch.setattr(recovery, "save_file", torn)
    with pytest.raises(KeyboardInterrupt):
        scripted(scores, checkpoint=tmp_path)
    resumed, script = scripted(scores, checkpoint=tmp_path)
    assert len(script.made[0].rates) == 3 * 4
    assert [r["score"] for r in resumed.records] == [r["score"] for r in whole.records]
    assert resumed.model.native == whole.model.native
    assert [p.name for p in tmp_path.iterdir()] == ["recovery.safetensors"]


def test_a_damaged_checkpoint_is_noticed_and_the_training_starts_anew(tmp_path, caplog):
    whole, first = scripted([2, 5, 9, 8, 7, 3], checkpoint=tmp_path)
    path = tmp_path / "recovery.safetensors"
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    flips = [bytearray(good) for _ in range(12)]
    for flipped in flips:
        flipped[int(rng.integers(len(good)))] ^= 1 << int(rng.integers(8))
    for bad in (good[:-1], b"", b"\xff" * 40, *map(bytes, flips)):
        path.write_bytes(bad)
        caplog.clear()
        again, script = scripted([2, 5, 9, 8, 7, 3], checkpoint=tmp_path)
        assert "is damaged" in caplog.text
        assert script.made[0].rates == first.made[0].rates
        assert [r["score"] for r in again.records] == [r["score"] for r in whole.records]


def test_a_full_disk_while_the_checkpoint_is_written_is_one_sentence(tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(recovery, "save_file", full)
        with pytest.raises(SlimlineError, match=r"cannot be written .*No space left"):
            scripted([1] * 6, checkpoint=tmp_path)
    assert not list(tmp_path.iterdir())
    scripted([1] * 6, checkpoint=tmp_path)


def test_a_checkpoint_is_not_written_through_a_link(tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / "recovery.partial").symlink_to(mine)
    scripted([1] * 6, checkpoint=folder)
    assert mine.read_text() == "mine"
    assert [p.name for p in folder.iterdir()] == ["recovery.safetensors"]


def test_without_training_data_there_is_no_recovery():
    x = np.arange(20, dtype=np.float32)[:, None] % 10
    with pytest.raises(SlimlineError, match="train"):
        scripted([1] * 6, data=Data(test=(x, np.arange(20) % 10)))


def test_the_users_metric_scores():
    x = np.arange(10, dtype=np.float32)[:, None]
    data = Data(
        train=(np.tile(x, (3, 1)), np.tile(np.arange(10), 3)),
        selection=(x, np.arange(10)),
        metric=lambda outputs, labels: 100.0 * (outputs.argmax(-1) == labels),
    )
    found, _ = scripted([2, 5, 9, 8, 7, 3], data=data)
    assert [r["score"] for r in found.records] == [20, 50, 90, 80, 70, 30]


def test_real_valued_labels_are_learned_by_their_squared_error():
    x = np.tile(np.arange(10, dtype=np.float32), 3)[:, None]
    y = np.tile(np.eye(10, dtype=np.float32) + 0.5, (3, 1))
    data = Data(train=(x, y), selection=(x, y), metric=lambda outputs, labels: -((outputs - labels) ** 2).mean(-1))
    with pytest.raises(SlimlineError, match="must agree"):
        wide = Data(train=(x, y[:, :3]), selection=(x, y[:, :3]), metric=data.metric)
        scripted([1] * 6, data=wide)
    for loss in ("kl", "mse"):
        found, _ = scripted([2, 5, 9, 8, 7, 3], data=data, loss=loss)
        assert found.best_epoch == 2


# Real networks on the handwritten digits.


@pytest.fixture(params=["torch", "keras", "onnx"])
def framework(request):
    pytest.importorskip({"torch": "torch", "keras": "tensorflow", "onnx": "torch"}[request.param])
    return request.param


@pytest.fixture
def teacher(framework, cache={}):  # noqa: B006 (trained once per framework)
    if framework not in cache:
        blank = job.model(framework, 1)
        step = Distillation(epochs=6, alpha=0.0, learning_rate=5e-3, batch_size=64)
        cache[framework] = recover(blank, blank, step, job.digits(framework), 0).model
    return cache[framework]


def accuracy(model, data):
    split = data.split("selection")
    return float((model.predict(*split.inputs).argmax(-1) == split.labels).mean())


def damaged(model):
    """A third of the filters of every layer gone, and the statistics wrong."""
    rng = np.random.default_rng(0)
    tensors = model.parameters()
    for name, tensor in tensors.items():
        if tensor.ndim == 4:
            axis = -1 if model.framework == "keras" else 0
            gone = rng.random(tensor.shape[axis]) < 0.34
            tensors[name] = tensor * np.expand_dims(~gone, [a for a in range(4) if a != axis % 4]).astype(np.float32)
        elif tensor.ndim == 1 and tensor.dtype == np.float32:
            tensors[name] = tensor + rng.normal(0, 0.3, tensor.shape).astype(np.float32)
    return model.edited((PutTensors(tensors),), {"step": "damage"})


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize(
    "fields",
    [{}, {"loss": "logit-standard", "precision": "bfloat16", "optimizer": "sgd", "learning_rate": 0.03}],
    ids=["adamw", "sgd-bfloat16"],
)
def test_a_damaged_network_recovers(framework, teacher, labels, fields):
    truth = job.digits(framework)
    student = damaged(teacher)
    before = student.parameters(), teacher.parameters()
    step = Distillation(**({"epochs": 4, "learning_rate": 3e-3, "batch_size": 64} | fields))
    found = recover(student, teacher, step, job.digits(framework, labels=labels), 0)
    assert accuracy(teacher, truth) > 0.95
    assert accuracy(student, truth) < accuracy(teacher, truth) - 0.1
    assert accuracy(found.model, truth) > accuracy(teacher, truth) - 0.02
    assert found.records[found.best_epoch]["score"] == max(r["score"] for r in found.records)
    if labels:
        assert accuracy(found.model, truth) == pytest.approx(found.records[found.best_epoch]["score"])
    for kept, model in zip(before, (student, teacher), strict=True):
        assert all((kept[n] == t).all() for n, t in model.parameters().items())


def run(framework, checkpoint=None, stop=None):
    def progress(now: Progress):
        if now.done == stop:
            raise KeyboardInterrupt

    models = job.model(framework, 0), job.model(framework, 1)
    found = recover(*models, job.STEP, job.data(framework), 7, checkpoint, progress)
    return list(found.model.parameters().values()), [r["score"] for r in found.records]


def kill(framework, checkpoint, stop):
    """Run the same in another process and kill -9 it after `stop` steps."""
    command = [sys.executable, "-m", "tests.recovery_job", framework, str(checkpoint)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if int(line) == stop:
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("framework", ["torch", "keras"], indirect=True)
def test_a_killed_recovery_ends_as_an_undisturbed_one_to_the_bit(framework, tmp_path):
    # Three epochs of nine steps: stopped before anything is written, in an epoch, and where its end is written.
    with pytest.raises(KeyboardInterrupt):
        run(framework, tmp_path, stop=4)
    kill(framework, tmp_path, stop=12)
    with pytest.raises(KeyboardInterrupt):
        run(framework, tmp_path, stop=18)
    resumed, resumed_scores = run(framework, tmp_path)
    weights, scores = run(framework)
    assert resumed_scores == scores
    assert all((a == b).all() for a, b in zip(weights, resumed, strict=True))
