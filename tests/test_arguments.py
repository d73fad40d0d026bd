"""Wrong arguments to the library's functions are one sentence, and leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slimline as sl
from slimline.basics.errors import first_line, raised
from slimline.measure import Report

torch = pytest.importorskip("torch")

X, Y = np.random.default_rng(0).random((200, 8)).astype(np.float32), np.arange(200) % 4
NET = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).eval()
PRUNE = sl.ChannelPruning(ratio=0.5)


@pytest.fixture(scope="module")
def model() -> sl.Model:
    return sl.load(NET, X[:2])


@pytest.fixture(scope="module")
def data() -> sl.Data:
    return sl.Data(train=(X, Y), test=(X[::-1].copy(), Y))


CALLS: list[tuple[Callable[[Any, Any, Path], Any], str]] = [
    (lambda m, d, p: sl.apply(NET, PRUNE), "model is a Sequential, no slimline model: load it with slimline.load"),
    (lambda m, d, p: sl.apply(m, "prune"), "'prune' is no step: give one or a list"),
    (lambda m, d, p: sl.apply(m, sl.ChannelPruning), "ChannelPruning is no step"),
    (lambda m, d, p: sl.apply(m, [PRUNE, None]), "None is no step"),
    (lambda m, d, p: sl.apply(m, sl.StaticQuantization(), (X, Y)), "data is a tuple: give slimline.Data"),
    (lambda m, d, p: sl.apply(m, PRUNE, target=3), "target is a int: give a name"),
    (lambda m, d, p: sl.apply(m, PRUNE, seed=-1), "seed is -1: give a whole number from 0"),
    (lambda m, d, p: sl.apply(m, PRUNE, seed="a"), "seed is 'a': give a whole number"),
    (lambda m, d, p: sl.apply(m, PRUNE, seed=True), "seed is True"),
    (lambda m, d, p: sl.apply(m, PRUNE, progress="bars"), "progress is 'bars'"),
    (lambda m, d, p: sl.plan(NET, PRUNE), "model is a Sequential"),
    (lambda m, d, p: sl.plan(m, None), "None is no step"),
    (lambda m, d, p: sl.plan(m, PRUNE, 3), "data is a int"),
    (lambda m, d, p: sl.plan(m, PRUNE).apply(NET), "model is a Sequential"),
    (lambda m, d, p: sl.plan(m, PRUNE).mask(NET), "model is a Sequential"),
    (lambda m, d, p: sl.finalize(NET), "model is a Sequential"),
    (lambda m, d, p: sl.to_torch_prune(3), "model is a int"),
    (lambda m, d, p: sl.export(NET, "onnxruntime", p), "model is a Sequential"),
    (lambda m, d, p: sl.export(m, None, p), "target is a NoneType"),
    (lambda m, d, p: sl.export(m, "onnxruntime", 3), "output is '3': give a path"),
    (lambda m, d, p: sl.export(m, "onnxruntime", "/dev/null/x"), "a part of the path is a file"),
    (lambda m, d, p: m.save(3), "path is '3': give a path"),
    (lambda m, d, p: m.save("a\0.pt2"), "give a path"),
    (lambda m, d, p: m.predict(X[:2], X[:2]), "The model cannot take inputs"),
    (lambda m, d, p: sl.compress(NET, None, output=p / "r"), "data is a NoneType: give slimline.Data"),
    (lambda m, d, p: sl.compress(3, d, output=p / "r"), "A int is no model slimline can read"),
    (lambda m, d, p: sl.compress(NET, d, recipe=3, output=p / "r"), "A recipe given as a list must hold steps"),
    (lambda m, d, p: sl.compress(NET, d, recipe=None, output=p / "r"), "A recipe given as a list must hold steps"),
    (lambda m, d, p: sl.compress(NET, d, budget=0.1, output=p / "r"), "Budget is 0.1 but must be"),
    (lambda m, d, p: sl.compress(NET, d, batch_sizes=3, output=p / "r"), "batch_sizes is '3': give a list"),
    (lambda m, d, p: sl.compress(NET, d, recipe="int8", threads="x", output=p / "r"), "threads of Recipe is 'x'"),
    (lambda m, d, p: sl.compress(NET, d, recipe="int8", seed=1.5, output=p / "r"), "seed is 1.5"),
    (lambda m, d, p: sl.compress(NET, d, recipe="int8", progress="x", output=p / "r"), "progress is 'x'"),
    (lambda m, d, p: sl.compress(NET, d, recipe="int8", output=None), "output is 'None': give a path"),
    (lambda m, d, p: sl.resume(None), "path is 'None': give a path"),
    (lambda m, d, p: sl.Run.open(3), "path is '3': give a path"),
    (lambda m, d, p: sl.load(NET, X[:2], parts=3), "parts is 3: give names of submodules"),
    (lambda m, d, p: d.split(3), "There is no split 3; choose one of"),
    (lambda m, d, p: sl.Data(test=(X, Y), seed="a"), "seed is 'a': give a whole number"),
    (lambda m, d, p: sl.Data(test=(X, Y), seed=-3), "seed is -3"),
    (lambda m, d, p: sl.Data(test=(X, Y), classes="x"), "classes is 'x': give a whole number"),
    (lambda m, d, p: sl.pruning(torch.nn.Linear(3, 3), 3, total=3).__enter__(), "3 is no step"),
    (lambda m, d, p: Report.from_json(None), "it is a NoneType, not text"),
]


@pytest.mark.parametrize(("call", "said"), CALLS, ids=[f"{i}-{said[:40]}" for i, (_, said) in enumerate(CALLS)])
def test_a_wrong_argument_is_one_sentence(
    call: Callable[[Any, Any, Path], Any], said: str, model: sl.Model, data: sl.Data, tmp_path: Path
) -> None:
    with pytest.raises(sl.SlimlineError) as error:
        call(model, data, tmp_path)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_the_first_line_of_an_error_is_quoted_without_its_full_stop() -> None:
    assert first_line(ValueError("\n  the size is wrong.\nTraceback: long")) == "the size is wrong"
    assert first_line(EOFError()) == "EOFError"
    assert raised(EOFError()) == "raised EOFError"
    assert raised(KeyError("a:")) == "raised KeyError ('a:')"
