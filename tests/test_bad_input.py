"""Bad input is one sentence that says how to mend it, exit code 2, and nothing half-written."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slimline as sl
from slimline import cli
from slimline.basics.errors import SlimlineError
from slimline.data import Data, datasets
from slimline.methods.outputs import bare
from slimline.recipe import Budget, Recipe, load_recipe, parse
from slimline.run.sources import ModelSource, load_model, load_weights
from slimline.steps.channels.step import ChannelPruning
from slimline.steps.quantization.step import StaticQuantization
from tests.specs import specs

X, Y = np.ones((20, 3, 8, 8), np.float32), np.arange(20) % 4
NAN = np.where(np.arange(20)[:, None] == 7, np.nan, 1.0)
IMAGES = specs((np.zeros((2, 3, 8, 8), np.float32),))


def classes(number: int) -> tuple[sl.Output, ...]:
    return bare((), [np.zeros((2, number), np.float32)])


WISHES: list[tuple[Callable[[], Any], str]] = [
    # data
    (lambda: Data(), "There is no data: give Data at least train="),
    (lambda: Data(test=(NAN, Y)), "The test data holds NaN or infinite numbers: remove"),
    (lambda: Data(train=(X, np.full(20, np.inf))), "NaN or infinite"),
    (lambda: Data(test=(X[:0], Y[:0])), "The test data is empty: give at least one sample."),
    (lambda: Data(train=[]), "The train data is empty"),
    (lambda: Data(train=(X, Y[:-1])), "arrays of 20 and 19 samples: inputs and labels must be equally many"),
    (lambda: Data(test=(X, np.zeros(20, int))), "All test labels are 0: accuracy needs at least two classes."),
    (lambda: Data(test=(X, Y), classes=3), "The test labels go from 0 to 3, but the model has 3 outputs"),
    (lambda: Data(test=(X, Y)).check_labels(classes(2)), "but the model has 2 outputs: labels must be in 0 to 1."),
    (lambda: Data(test=(X, Y - 1)).check_labels(classes(4)), "labels go from -1 to"),
    (lambda: Data(test=(X, Y)).check_labels(classes(1)), "single class, so accuracy means nothing: give a metric"),
    (lambda: Data(test=(X, Y / 3)), "labels are float32, not classes: cast class labels to integers, or give"),
    (lambda: Data(test=(X, X, Y)), "The test data is a tuple of 3: give (x, y) or (x,)"),
    (lambda: Data(train=iter([(X, Y)])), "can be read only once: give a list of batches, not a generator."),
    (lambda: Data(train=[X, Y]), "batches of the train data differ in shape"),
    (lambda: Data(train="digits"), "The train data is a str: give (x, y), a DataLoader"),
    (lambda: Data(test=(np.array(["a", "b"]), Y[:2])), "Data must be numbers, not <U1"),
    (lambda: Data(test=np.float32(3)), "holds a single number"),
    (lambda: Data(test=(X[:2], Y[:2])), "too few to be cut for calibration and selection: give train"),
    (lambda: Data(train=(X[:1], Y[:1])), "a single sample: give more, or give selection"),
    (lambda: Data(train=(X, Y), test=((X, X), Y)), "different numbers of inputs (train 1, test 2)"),
    (lambda: Data(train=(X, Y)).split("certification"), "needs certification samples: give Data test=(x, y)."),
    (lambda: Data(train=(X, Y)).split("tain"), "There is no split 'tain'; did you mean 'train'?"),
    # shapes and dtypes against the model
    (
        lambda: Data(test=np.moveaxis(X, 1, -1)).check(IMAGES),
        "samples of shape (8, 8, 3) but the model takes (3, 8, 8)",
    ),
    (lambda: Data(test=np.moveaxis(X, 1, -1)).check(IMAGES), "channels first with np.moveaxis(x, -1, 1)."),
    (lambda: Data(test=X).check(specs((np.zeros((2, 8, 8, 3)),))), "channels last with np.moveaxis(x, 1, -1)."),
    (lambda: Data(test=X[:, 0]).check(specs((X[:2, :1],))), "add the channel with x[:, None]."),
    (lambda: Data(test=X[:, 0]).check(specs((X[:2, 0, :, :, None],))), "add the channel with x[..., None]."),
    (lambda: Data(test=X).check(specs((np.zeros((2, 192)),))), "reshape it with x.reshape(-1, 192)."),
    (lambda: Data(test=X).check(specs((np.zeros((2, 3, 9, 9)),))), "takes (3, 9, 9): resize the data"),
    (
        lambda: Data(test=X).check(specs((np.zeros((2, 3, 8, 8), np.int64),))),
        "float32 but the model takes int64: give integers",
    ),
    (lambda: Data(test=X).check(IMAGES * 2), "The model takes 2 inputs (x0, x0) and the"),
    (lambda: Data(test=(X, Y)).check(IMAGES, batch=64), "Calibration has 4 samples, fewer than a batch of 64"),
    # recipes and budgets
    (lambda: ChannelPruning(ration=0.5), "no field in ChannelPruning called 'ration'; did you mean 'ratio'?"),
    (lambda: ChannelPruning(ratio=1.0), "ratio of ChannelPruning is 1.0 but must be less than 1."),
    (lambda: ChannelPruning(), "takes one of ratio, target_macs and target_parameters, not none."),
    (lambda: ChannelPruning(ratio=0.5, target_macs=0.5), "not ratio and target_macs."),
    (lambda: ChannelPruning(ratio=0.5, rounds=3), "in 3 rounds needs schedule: uniform or iterative."),
    (lambda: StaticQuantization(observer="ms"), "no StaticQuantization with observer 'ms'; did you mean 'mse'?"),
    (lambda: Budget(max_latency=0), "max_latency of Budget is 0 but must be greater than 0."),
    (lambda: Budget(max_latency="5 parsecs"), "of the original's such as 0.2, or a time such as '5 ms'."),
    (lambda: Budget(max_size=2), "max_size is 2: give a part of the original's such as 0.2, or a size such as '2 MB'."),
    (lambda: Budget(max_drop=1.5), "max_drop of Budget is 1.5 but must be less than or equal to 1."),
    (lambda: Budget(confidence=0.4), "confidence of Budget is 0.4 but"),
    (lambda: load_recipe("balansed"), "There is no recipe 'balansed'; did you mean 'balanced'?"),
    (lambda: load_recipe("none.yaml"), "The recipe none.yaml cannot be read: No such file"),
    (lambda: load_recipe([1]), "must hold steps, such as slimline.ChannelPruning"),  # type: ignore[list-item]
    (lambda: parse("steps: [{step: ChannelPrunning, ratio: 0.5}]"), "no step 'ChannelPrunning'; did you mean 'Chan"),
    (lambda: parse("steps: [{ratio: 0.5}]"), "steps.0 of Recipe does not say which step it is"),
    (lambda: parse("stps: []"), "Recipe needs steps: give it."),
    (lambda: parse("a: [\n"), "is not YAML at line 2"),
    (lambda: parse("schema: 2\nsteps: [{step: StaticQuantization}]"), "schema of Recipe is 2 but must be 1."),
    # models, by name
    (lambda: load_model(ModelSource("m.pth")), "m.pth is a pickle, which can run any code"),
    (lambda: load_model(ModelSource("m.pt")), "pass --allow-pickle if you trust it"),
    (lambda: load_model(ModelSource("m.onnx")), "There is no model file m.onnx"),
    (lambda: load_model(ModelSource("m.pt2")), "There is no model file m.pt2: check the path."),
    (lambda: load_model(ModelSource("m.h5")), "There is no model format '.h5'"),
    (lambda: load_model(ModelSource("nowhere.mod:f")), "There is no module nowhere.mod for the model nowhere.mod:f"),
    (lambda: load_model(ModelSource("slimline.demo:torch_modle")), "did you mean 'torch_model'?"),
    (lambda: datasets.builtin("digit"), "There is no built-in data set 'digit'; did you mean 'digits'?"),
]


@pytest.mark.parametrize(("wish", "said"), WISHES, ids=[said[:50] for _, said in WISHES])
def test_a_mistake_is_one_sentence(wish: Callable[[], Any], said: str) -> None:
    with pytest.raises(SlimlineError) as error:
        wish()
    message = str(error.value)
    assert said in message
    assert "\n" not in message
    assert message[-1] in ".?"


def test_streamed_batches_are_checked_while_they_are_read() -> None:
    batches = [(X.copy(), Y.copy()), (X.copy(), Y.copy())]
    train = Data(train=batches, test=(X, Y)).split("train")
    batches[1][0][3] = np.nan
    with pytest.raises(SlimlineError, match="The train data holds NaN"):
        list(train.batches(8, seed=0))


def test_a_missing_data_set_names_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets, "FASHION", tmp_path)
    with pytest.raises(SlimlineError, match="apt-get install dataset-fashion-mnist"):
        datasets.builtin("fashion-mnist")


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    model = torch.nn.Linear(3, 4)
    before = model.weight.detach().clone()
    path = tmp_path / "w.safetensors"
    for weights, said in (
        ({"weight": torch.ones(4, 3)}, "the file lacks bias"),
        ({"weight": torch.ones(4, 3), "bias": torch.ones(4), "head": torch.ones(1)}, "the file has head besides"),
        ({"weight": torch.ones(4, 2), "bias": torch.ones(4)}, "weight is (4, 2) in the file and (4, 3) in the model"),
    ):
        save_file(weights, path)
        with pytest.raises(SlimlineError) as error:
            load_weights(model, path)
        assert said in str(error.value)
    path.write_bytes(b"no")
    with pytest.raises(SlimlineError, match="is no safetensors file"):
        load_weights(model, path)
    with pytest.raises(SlimlineError, match="cannot be read"):
        load_weights(model, tmp_path / "none.safetensors")
    assert torch.equal(model.weight, before), "nothing may be loaded by halves"


RECIPE = Recipe(steps=(StaticQuantization(),))


def test_an_output_that_is_taken(tmp_path: Path) -> None:
    from slimline.run.directory import Run

    Run.create(tmp_path / "run", RECIPE).close()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    for name, said in (
        ("run", "holds another run"),
        ("full", "is not empty"),
        ("file", "is a file"),
        ("file/x", "a part of the path is a file"),
    ):
        with pytest.raises(SlimlineError, match=said):
            Run.create(tmp_path / name, RECIPE)
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(SlimlineError, match="holds no run"):
        Run.open(tmp_path / "full")


def test_an_output_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from slimline.run.directory import Run

    def refuse(folder: Path, *rest: object, **more: object) -> None:
        raise PermissionError(13, os.strerror(13), str(folder))

    with monkeypatch.context() as patched, pytest.raises(SlimlineError, match="permission is denied: name another"):
        patched.setattr(Path, "mkdir", refuse)
        Run.create(tmp_path / "run", RECIPE)

    def full(handle: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SlimlineError, match="the disk is full"):
        Run.create(tmp_path / "run", RECIPE)
    assert not list(tmp_path.iterdir())


COMMANDS = [
    ("compress nothing.pt2 -d digits -o OUT", "There is no model file nothing.pt2"),
    ("compress m.pth -d digits -o OUT", "is a pickle"),
    ("compress m:f -d digits -o OUT --recipe nope", "There is no recipe 'nope'"),
    (
        "compress m:f -d digits -o OUT --target onnxruntim",
        "There is no target 'onnxruntim'; did you mean 'onnxruntime'?",
    ),
    ("compress m:f -d digits -o OUT --max-drop 7", "max_drop of Budget is 7.0"),
    ("compress m:f -d digits -o OUT --input-shape 3,a", "is no shape: write numbers with commas"),
    ("compress nomodule:f -d digits -o OUT", "There is no module nomodule"),
    ("compress slimline.zoo.torch:ResidualCNN -d digit -o OUT", "There is no data 'digit'; did you mean 'digits'?"),
    ("compress slimline.zoo.torch:ResidualCNN -d none.npz -o OUT", "There is no data file none.npz"),
    ("compress slimline.zoo.torch:ResidualCNN -d bad.npz -o OUT", "bad.npz cannot be read as numpy arrays"),
    ("compress slimline.zoo.torch:ResidualCNN -d other.npz -o OUT", "has neither x_train nor x_test"),
    ("compress slimline.zoo.torch:ResidualCNN -d pickled.npz -o OUT", "cannot be read as numpy arrays"),
    ("compress slimline.demo:torch_model -d digits -o OUT --max-latency 5parsecs", "max_latency is '5parsecs': give a"),
    ("compress slimline.demo:torch_model -d digits -o OUT --max-size 2mb", "such as 0.2, or a size such as '2 MB'."),
    ("compress slimline.demo:torch_model -d digits -o OUT --max-memory 1.5", "max_memory is '1.5': give a part"),
    ("inspect bad.pt2", "bad.pt2"),
    ("measure bad.onnx --data digits", "bad.onnx"),
    ("measure m.bin --data digits", "There is no runtime for files ending in '.bin'"),
    ("measure bad.onnx --data digits --target nope", "There is no target 'nope'"),
    ("measure bad.onnx --data digits --target openvino", "give an artifact that ends in .xml"),
    ("measure bad.onnx --data digits --target litert", "give an artifact that ends in .tflite"),
    ("measure none.onnx --data digits --json", "There is no artifact at none.onnx"),
    ("measure bad.onnx --data digits --against none.onnx --json", "There is no artifact at none.onnx"),
    ("inspect m:f --target nope", "There is no target 'nope'"),
    ("inspect none.pt2 --json", "There is no model file none.pt2"),
    ("plan m:f --target nope", "There is no target 'nope'"),
    ("plan m:f --recipe nope", "There is no recipe 'nope'"),
    ("plan none.pt2", "There is no model file none.pt2"),
    ("plan code.pt2 --recipe code.yaml", "would import and call mine:score, which can do anything: pass --allow-code"),
    (
        "plan slimline.zoo.torch:ResidualCNN --input-shape 1,28,28 --recipe data.yaml --json",
        "What ChannelPruning would do depends on calibration samples, which it reads: give --data",
    ),
    ("export m:f --target nope -o OUT", "There is no target 'nope'"),
    ("export none.pt2 --target onnxruntime -o OUT", "There is no model file none.pt2"),
    (
        "export slimline.zoo.keras:residual_cnn --input-shape 28,28,1 --target executorch -o OUT",
        "executorch does not take such models yet: choose the target litert",
    ),
    ("resume OUT", "holds no run"),
    ("report OUT", "holds no run"),
    ("report OUT --json", "holds no run"),
    ("verify OUT --json", "holds no run"),
    ("recipes show nope", "There is no recipe 'nope'"),
    ("demo --framework jax", "There is no framework 'jax'"),
]


@pytest.mark.parametrize(("words", "said"), COMMANDS, ids=[words for words, _ in COMMANDS])
def test_a_command_ends_with_one_line_and_code_2(
    words: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    for name in ("bad.npz", "bad.pt2", "bad.onnx"):
        (tmp_path / name).write_bytes(b"not that")
    for name, criterion in (("code", "mine:score"), ("data", "taylor")):
        step = f"{{step: ChannelPruning, ratio: 0.5, criterion: '{criterion}'}}"
        (tmp_path / f"{name}.yaml").write_text(f"steps: [{step}]")
    np.savez(tmp_path / "other.npz", images=np.ones(3))
    np.savez(tmp_path / "pickled.npz", x_train=np.array([{}], dtype=object))
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["slimline", *words.replace("OUT", str(tmp_path / "out")).split()])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capsys.readouterr()
    assert end.value.code == 2
    assert said in err
    assert err.count("\n") == 1, err
    assert out == ""
    assert sorted(tmp_path.rglob("*")) == before, "nothing may be written"


def test_public_errors_are_the_same_class() -> None:
    assert sl.SlimlineError is SlimlineError
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        _ = sl.compres
