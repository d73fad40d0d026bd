"""`device=` of the public calls and ``--device``: what it reaches, what is refused, and what a run notes of it."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import slimline as sl
from slimline.basics.errors import SlimlineError
from slimline.cli import app
from slimline.data import Data
from slimline.frameworks.base import adapter
from slimline.frameworks.device import VARIABLE, wish
from slimline.run.compress import _going_on
from slimline.run.directory import Run
from tests import compress_job

torch = pytest.importorskip("torch")

RNG = np.random.default_rng(0)
X = RNG.normal(size=(120, 1, 6, 6)).astype(np.float32)
Y = RNG.integers(0, 3, 120)
NO_CUDA = "There is no CUDA device here: leave device out, or choose cpu."


@pytest.fixture
def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(128, 3)
    ).eval()


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.fixture
def asked(monkeypatch):
    """The wishes that the adapter was asked with while it worked."""
    found = []
    kind = type(adapter("torch"))
    for name in ("trainer", "observe", "gradients"):
        method = getattr(kind, name)

        def spied(self, *args, method=method, name=name):
            found.append((name, wish()))
            return method(self, *args)

        monkeypatch.setattr(kind, name, spied)
    return found


def data() -> Data:
    return Data(train=(X, Y), test=(X[:40] + 1, Y[:40]), seed=0)


def test_every_step_of_apply_and_plan_computes_where_it_is_told(monkeypatch, net, asked):
    monkeypatch.delenv(VARIABLE)
    model = sl.load(net, X[:2])
    taylor = sl.ChannelPruning(ratio=0.5, criterion="taylor")
    sl.plan(model, taylor, data(), device="cpu")
    steps = [taylor, sl.Distillation(epochs=1), sl.StaticQuantization(undo=False, samples=32)]
    sl.apply(model, steps, data(), device="cpu")
    assert {name for name, _ in asked} == {"trainer", "observe", "gradients"}
    assert {wished for _, wished in asked} == {"cpu"}
    assert wish() is None


@pytest.mark.parametrize("given", ["gpu", "cuda:x", 3])
def test_what_is_no_device_is_refused_before_anything_is_looked_at(net, tmp_path, given):
    said = f"device is '{given}': give cpu, mps, cuda or, by its number, cuda:1."
    model = sl.load(net, X[:2])
    step = sl.ChannelPruning(ratio=0.5, criterion="l2")
    calls = [
        lambda: sl.apply(model, step, device=given),
        lambda: sl.plan(model, step, device=given),
        lambda: sl.compress("no-file.pt2", data(), device=given),
        lambda: sl.resume(tmp_path, device=given),
    ]
    for call in calls:
        with pytest.raises(SlimlineError) as error:
            call()
        assert str(error.value) == said


def test_a_device_that_is_not_there_is_refused_and_nothing_is_left_behind(no_gpu, net, tmp_path):
    model = sl.load(net, X[:2])
    step = sl.ChannelPruning(ratio=0.5, criterion="l2")
    for call in (
        lambda: sl.apply(model, step, device="cuda"),
        lambda: sl.plan(model, step, device="cuda:1"),
        lambda: sl.compress(model, data(), recipe=step, output=tmp_path / "run", device="cuda"),
    ):
        with pytest.raises(SlimlineError) as error:
            call()
        assert str(error.value) == NO_CUDA
    assert not (tmp_path / "run").exists()


def command(*words: str) -> tuple[int, str]:
    """Exit code and what is said, as `slimline.cli.main` words it."""
    done = CliRunner().invoke(app, list(words))
    return (2, str(done.exception)) if isinstance(done.exception, SlimlineError) else (done.exit_code, done.output)


def test_the_command_line_refuses_in_one_sentence(no_gpu, tmp_path):
    compress = ["compress", "slimline.demo:torch_model", "--data", "digits", "-o", str(tmp_path / "run")]
    unknown = "--device is 'gpu': give cpu, mps, cuda or, by its number, cuda:1."
    assert command(*compress, "--device", "gpu") == (2, unknown)
    assert command("resume", str(tmp_path), "--device", "gpu") == (2, unknown)
    assert command("demo", "-o", str(tmp_path / "run"), "--device", "gpu") == (2, unknown)
    assert command("demo", "-o", str(tmp_path / "run"), "--device", "cuda") == (2, NO_CUDA)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_clock")
@pytest.mark.parametrize("framework", ["torch", "keras"])
def test_the_cpu_by_name_leaves_the_bytes_that_the_cpu_by_default_does(framework, tmp_path, monkeypatch, no_gpu):
    monkeypatch.delenv(VARIABLE)
    runs = {}
    for name in ("cpu", None):
        output = tmp_path / str(name)
        model, samples = compress_job.model(framework), compress_job.data(framework)
        settings = {"recipe": compress_job.STEPS, "output": output, **compress_job.SETTINGS}
        runs[name] = sl.compress(model, samples, progress=False, device=name, **settings)
    named, default = runs["cpu"], runs[None]
    assert named.artifact.read_bytes() == default.artifact.read_bytes()
    suffix = adapter(framework).suffix
    assert (named.path / f"model{suffix}").read_bytes() == (default.path / f"model{suffix}").read_bytes()
    for run in runs.values():
        assert run.report.environment["devices"] == ["cpu"]
        assert json.loads((run.path / "environment.json").read_text())["devices"] == ["cpu"]


# What a run notes, and where it goes on.


class Elsewhere:
    """An adapter of a machine that has these devices, the best first."""

    def __init__(self, *devices):
        self.devices = devices

    def device(self, wished):
        if wished is not None and wished not in self.devices:
            raise SlimlineError("not there")
        return wished or self.devices[0]


@pytest.fixture
def run(tmp_path):
    recipe = sl.Recipe(steps=(sl.ChannelPruning(ratio=0.5),), target="onnxruntime")
    return Run.create(tmp_path / "run", recipe)


def devices(path: Path) -> list[str]:
    with Run.open(path) as opened:
        return opened.devices


def test_a_run_notes_its_device_once(run):
    run.compute_on("cpu")
    run.compute_on("cpu")
    run.close()
    lines = [json.loads(line) for line in (run.path / "journal.jsonl").read_text().splitlines()]
    assert [line["device"] for line in lines if line["event"] == "device"] == ["cpu"]
    assert devices(run.path) == ["cpu"]


@pytest.mark.parametrize(
    ("there", "wished", "stated", "found"),
    [
        (("cuda:0", "cpu"), None, None, "cpu"),  # where it was begun, though there is a better one
        (("cuda:0", "cpu"), "cuda:0", None, "cuda:0"),
        (("cuda:0", "cpu"), None, "cuda:0", "cuda:0"),
        (("cuda:0",), None, None, "cuda:0"),  # the one it was begun on is not there
    ],
)
def test_a_run_goes_on_where_it_was_begun_and_elsewhere_with_one_warning(
    run, caplog, monkeypatch, there, wished, stated, found
):
    monkeypatch.setenv(VARIABLE, stated or "")
    run.compute_on("cpu")
    other = Elsewhere(*there)
    with _going_on(run, other, wished):
        assert other.device(wish()) == found
    run.close()
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    said = f"{run.path} was computed on cpu: stages that are done stay, and the rest is computed on cuda:0."
    assert warned == ([] if found == "cpu" else [said])
    assert devices(run.path) == ["cpu"] + [found] * (found != "cpu")


def test_a_run_does_not_go_on_where_nothing_is(run, monkeypatch):
    monkeypatch.delenv(VARIABLE)
    run.compute_on("cpu")
    with pytest.raises(SlimlineError, match="not there"), _going_on(run, Elsewhere("cpu"), "cuda:0"):
        raise AssertionError
    run.close()
    assert devices(run.path) == ["cpu"]


# Keras leaves the choice to TensorFlow, unless it is told.


def test_keras_computes_where_tensorflow_is_told(monkeypatch):
    tf = pytest.importorskip("tensorflow")
    keras = adapter("keras")
    from slimline.frameworks.keras import device as placing

    assert isinstance(placing.computing(None), nullcontext)
    with placing.computing("cpu"):
        assert tf.constant(1.0).device.endswith("CPU:0")
    gpus = ["one", "two"]
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: gpus if kind == "GPU" else [])
    opened = []
    monkeypatch.setattr(tf, "device", lambda name: opened.append(name) or nullcontext())
    monkeypatch.setattr(placing.sys, "platform", "linux")
    assert [keras.device(name) for name in (None, "cuda:1", "cpu")] == ["cuda:0", "cuda:1", "cpu"]
    for name in ("cuda:1", "cpu"):
        with placing.computing(name):
            pass
    assert opened == ["/GPU:1", "/CPU:0"]
    monkeypatch.setattr(placing.sys, "platform", "darwin")
    assert keras.device(None) == "mps"
    with pytest.raises(SlimlineError, match="There is no CUDA device here"):
        keras.device("cuda")
    gpus.clear()
    assert keras.device(None) == "cpu"


def test_a_keras_trainer_computes_every_step_where_it_was_told(device, monkeypatch):
    pytest.importorskip("tensorflow")
    keras = adapter("keras")
    from slimline.frameworks.keras import device as placing
    from slimline.frameworks.keras import train as training

    opened = []
    computing = placing.computing

    def spied(wished):
        opened.append(wished)
        return computing(wished)

    monkeypatch.setattr(placing, "computing", spied)
    monkeypatch.setattr(training, "computing", spied)
    model = sl.load(compress_job.model("keras"), np.zeros((2, 8, 8, 1), np.float32))
    batch = ((RNG.normal(size=(8, 8, 8, 1)).astype(np.float32),), np.arange(8))
    trainer = keras.trainer(model.native, None, sl.Distillation(alpha=0.0), 0, 2)
    trainer.step(batch, 1e-3)
    trainer.restore(trainer.state())
    trainer.gradients(batch)
    trainer.outputs(batch[0])[0]
    assert opened == [device] * 6
