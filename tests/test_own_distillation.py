"""Distillation in training loops of one's own: what the network of `sl.prepare` makes small is the loss of the step."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slimline as sl
from slimline.basics.named import Named
from slimline.frameworks.base import adapter
from slimline.training.features import terms
from slimline.training.loop import described, recover
from tests import recovery_job as job
from tests.test_features import FRAMEWORKS, LABELS, convolutional, images
from tests.test_teacher_cache import weights

RATE = 0.5
PLAIN: dict[str, Any] = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "warmup": 0.0}


def data(framework: str) -> sl.Data:
    x = images(framework)
    return sl.Data(train=(x, LABELS), selection=(x[:8], LABELS[:8]), test=(x, LABELS), overlap="allow")


def one_step(net: Any, framework: str, x: np.ndarray, y: np.ndarray) -> float:
    """Of plain gradient descent; the loss before it."""
    if framework == "torch":
        import torch

        optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
        loss = net.train().loss(torch.tensor(x), torch.tensor(y))
        loss.backward()
        optimizer.step()
        return float(loss.detach())
    import keras

    net.compile(keras.optimizers.SGD(RATE))
    return float(net.fit(x, y, batch_size=len(x), epochs=1, verbose=0, shuffle=False).history["loss"][0])


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_step_of_ones_own_is_a_step_of_the_trainer(framework: str) -> None:
    student, teacher, x = convolutional(framework, 3), convolutional(framework, 5, 1), images(framework)
    before = weights(student)
    features = [{"loss": "hint", "weight": 0.1}, "similarity"]
    step = sl.Distillation(alpha=0.5, features=features, **PLAIN)
    prepared = sl.prepare(student, step, data(framework), teacher=teacher, seed=3)
    trainer = student.adapter.trainer(student.native, teacher.native, step, 3, 1)
    for term in terms(step, student, (teacher,), 3):
        trainer.add(term)
    expected = trainer.step(((x,), LABELS), RATE)
    assert one_step(prepared.native, framework, x, LABELS) == pytest.approx(expected, rel=1e-5)
    trained = sl.convert(prepared)
    for name, array in trainer.weights().items():
        np.testing.assert_allclose(trained.parameters()[name], array, rtol=1e-4, atol=1e-6, err_msg=name)
    assert weights(student) == before != weights(trained)
    assert trained.history[-1]["step"] == "Distillation" and trained.origin is student
    if framework == "torch":
        net = prepared.native.eval()
        answers = net(__import__("torch").tensor(x, device=next(net.parameters()).device)).detach().cpu()
    else:
        answers = prepared.native(x)
    np.testing.assert_allclose(np.asarray(answers), trained.predict(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_both_see_the_same_view(framework: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from slimline.training import loop

    student, teacher, x = convolutional(framework, 3), convolutional(framework, 5, 1), images(framework)
    step = sl.Distillation(alpha=1.0, view={"flip": True, "mixup": 1.0}, **PLAIN)
    views: list[np.ndarray] = []
    seen = loop.seen

    def watched(view: Any, batch: Any, *rest: Any) -> Any:
        result = seen(view, batch, *rest)
        views.append(np.array(result[0][0]))
        return result

    monkeypatch.setattr(loop, "seen", watched)
    prepared = sl.prepare(student, step, data(framework), teacher=teacher)
    loss = one_step(prepared.native, framework, x, LABELS)
    (view,) = views
    assert np.abs(view - x).max() > 0.1
    trainer = student.adapter.trainer(student.native, teacher.native, step, 0, 1)
    assert trainer.step(((view,), None), 0.0) == pytest.approx(loss, rel=1e-5)
    one_step(prepared.native, framework, x, LABELS)
    assert np.abs(views[1] - view).max() > 0.1  # the next batch is seen in another way
    with pytest.raises(sl.SlimlineError, match="Mixed samples have no labels"):
        sl.prepare(student, step.model_copy(update={"alpha": 0.5}), data(framework), teacher=teacher)


def test_fit_trains_digits_with_metrics_validation_and_zeros() -> None:
    adapter("keras")
    import keras

    source, labelled = job.model("keras", 0), job.digits("keras", samples=900)
    teacher = recover(source, None, sl.Distillation(epochs=3, alpha=0.0, learning_rate=3e-3), labelled, 0).model
    sparse = sl.apply(job.model("keras", 1), sl.SparsePruning(amount=0.5))
    prepared = sl.prepare(sparse, sl.Distillation(alpha=0.9, features=["attention"]), labelled, teacher=teacher)
    net, train = prepared.native, labelled.split("train")
    x, y = train.inputs[0], train.labels
    net.compile(keras.optimizers.Adam(3e-3), metrics=["accuracy"])
    past = net.fit(x, y, epochs=3, batch_size=32, validation_data=(x[:200], y[:200]), verbose=0).history
    assert past["loss"][-1] < past["loss"][0] and past["val_accuracy"][-1] > 0.8
    assert set(past) == {"loss", "accuracy", "val_loss", "val_accuracy"}
    trained = sl.convert(prepared)
    np.testing.assert_allclose(trained.predict(x[:64]), net.predict(x[:64], verbose=0), atol=1e-5)
    for name, mask in sparse.masks.items():
        assert not np.asarray(trained.parameters()[name])[~mask].any()
        assert np.asarray(trained.parameters()[name])[mask].all()
    assert net.evaluate(x[:200], y[:200], verbose=0)[0] == pytest.approx(past["val_loss"][-1], rel=1e-4)
    with pytest.raises(sl.SlimlineError, match="compile without loss"):
        net.compile("adam", "sparse_categorical_crossentropy")
    with pytest.raises(sl.SlimlineError, match="leave sample_weight"):
        net.fit(x, y, sample_weight=np.ones(len(x)), verbose=0)
    with pytest.raises(sl.SlimlineError, match="is of classes: give fit their numbers"):
        net.fit(x, np.eye(10, dtype=np.float32)[y], verbose=0)


def test_several_inputs_and_outputs_are_given_by_name() -> None:
    adapter("keras")
    import keras

    def net(seed: int) -> sl.Model:
        keras.utils.set_random_seed(seed)
        left, right = keras.Input((3,), name="z"), keras.Input((2,), name="a")
        joined = keras.layers.Concatenate()([keras.layers.Dense(4)(left), right])
        heads = [keras.layers.Dense(n, name=name)(joined) for n, name in ((5, "kind"), (3, "age"))]
        return sl.load(keras.Model([left, right], heads))

    rng = np.random.default_rng(0)
    x = {"a": rng.normal(size=(32, 2)).astype(np.float32), "z": rng.normal(size=(32, 3)).astype(np.float32)}
    y = {"age": rng.integers(0, 3, 32), "kind": rng.integers(0, 5, 32)}
    data = sl.Data(train=(x, y), test=(x, y), overlap="allow")
    step, (student, teacher) = sl.Distillation(alpha=0.5, **PLAIN), [net(seed) for seed in (0, 1)]
    prepared = sl.prepare(student, step, data, teacher=teacher)
    prepared.native.compile(keras.optimizers.SGD(0.0))
    loss = prepared.native.fit(x, y, batch_size=32, verbose=0).history["loss"][0]
    outputs = described(student, (teacher,), step, data.check(student.inputs))
    trainer = student.adapter.trainer(student.native, teacher.native, step, 0, 1, outputs)
    batch = (x["z"], x["a"]), Named([y["kind"], y["age"]])
    assert loss == pytest.approx(trainer.step(batch, 0.0), rel=1e-5)
    with pytest.raises(sl.SlimlineError, match="is given no input 'z'"):
        prepared.native.fit({"a": x["a"]}, y, verbose=0)


def test_what_cannot_be_prepared_is_refused() -> None:
    student, teacher = convolutional("torch", 3), convolutional("torch", 5, 1)
    with pytest.raises(sl.SlimlineError, match="needs data"):
        sl.prepare(student, sl.Distillation(), teacher=teacher)
    with pytest.raises(sl.SlimlineError, match="slimline's own loop"):
        sl.prepare(student, sl.Distillation(cache="answers"), data("torch"), teacher=teacher)
    with pytest.raises(sl.SlimlineError, match="give a QuantizationAwareTraining or a Distillation"):
        sl.prepare(student, sl.LowRank(rank=1), data("torch"))
    onnx = [job.model("onnx", seed) for seed in (0, 1)]
    with pytest.raises(sl.SlimlineError, match="no loop of one's own"):
        sl.prepare(onnx[0], sl.Distillation(), job.digits("onnx", samples=64), teacher=onnx[1])


PROCESS = """
import sys
import torch
from torch import distributed
import slimline as sl
from tests.test_own_distillation import PLAIN, RATE, data, torch_pair
from tests.test_features import LABELS, images

rank, place, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
distributed.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
student, teacher = torch_pair()
step = sl.Distillation(alpha=0.5, features=[{"loss": "hint", "weight": 0.1}], **PLAIN)
prepared = sl.prepare(student, step, data("torch"), teacher=teacher, seed=3)
net = torch.nn.parallel.DistributedDataParallel(prepared.native.train())
half = len(LABELS) // 2
mine = slice(rank * half, (rank + 1) * half)
optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
net(torch.tensor(images("torch")[mine]), loss=True, labels=torch.tensor(LABELS[mine])).backward()
optimizer.step()
sl.convert(prepared).save(f"{out}/{rank}.pt2")
"""
"""One of two that train the same student, each on its half of a batch."""


def torch_pair() -> tuple[sl.Model, sl.Model]:
    return convolutional("torch", 3), convolutional("torch", 5, 1)


def test_two_processes_take_the_step_of_one(tmp_path: Path) -> None:
    assert len(LABELS) % 2 == 0
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), tmp_path / "place", tmp_path], stderr=subprocess.PIPE
        )
        for rank in range(2)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors.decode()[-2000:]
    student, teacher = torch_pair()
    step = sl.Distillation(alpha=0.5, features=[{"loss": "hint", "weight": 0.1}], **PLAIN)
    prepared = sl.prepare(student, step, data("torch"), teacher=teacher, seed=3)
    one_step(prepared.native, "torch", images("torch"), LABELS)
    whole = sl.convert(prepared).parameters()
    for rank in range(2):
        for name, array in sl.load(tmp_path / f"{rank}.pt2").parameters().items():
            np.testing.assert_allclose(array, whole[name], rtol=1e-4, atol=1e-6, err_msg=name)
    assert any((array != student.parameters()[name]).any() for name, array in whole.items())


MIRRORED = """
import sys
import tensorflow as tf

(processor,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(processor, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
import keras
import slimline as sl
from tests.test_own_distillation import PLAIN, RATE, data
from tests.test_features import LABELS, convolutional, images

with strategy.scope():
    step = sl.Distillation(alpha=0.5, features=[{"loss": "hint", "weight": 0.1}], **PLAIN)
    student, teacher = convolutional("keras", 3), convolutional("keras", 5, 1)
    prepared = sl.prepare(student, step, data("keras"), teacher=teacher, seed=3)
    prepared.native.compile(keras.optimizers.SGD(RATE))
prepared.native.fit(images("keras"), LABELS, batch_size=len(LABELS), epochs=1, verbose=0, shuffle=False)
sl.convert(prepared).save(f"{sys.argv[1]}/mirrored.keras")
"""
"""Two replicas of Keras on one processor."""


def test_replicas_of_keras_take_the_step_of_one(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", MIRRORED, tmp_path], capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    student, teacher = convolutional("keras", 3), convolutional("keras", 5, 1)
    step = sl.Distillation(alpha=0.5, features=[{"loss": "hint", "weight": 0.1}], **PLAIN)
    prepared = sl.prepare(student, step, data("keras"), teacher=teacher, seed=3)
    one_step(prepared.native, "keras", images("keras"), LABELS)
    whole = sl.convert(prepared).parameters()
    for name, array in sl.load(tmp_path / "mirrored.keras").parameters().items():
        np.testing.assert_allclose(array, whole[name], rtol=1e-4, atol=1e-6, err_msg=name)
    assert any((array != student.parameters()[name]).any() for name, array in whole.items())
