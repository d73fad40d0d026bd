"""Training that torch.compile made one program of: the same losses and answers as without."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

import slimline as sl
from slimline.basics.errors import SlimlineError
from slimline.steps.distillation.step import Distillation

torch = pytest.importorskip("torch")
nn = torch.nn

from slimline.frameworks.base import Term, teachers_of  # noqa: E402
from slimline.frameworks.torch.compiled import Program, uncompilable  # noqa: E402
from slimline.frameworks.torch.train import TorchTrainer  # noqa: E402
from tests.digit_models import digits  # noqa: E402


class Net(nn.Module):
    """A norm, dropout, a skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(width, 10)

    def forward(self, x: Any) -> Any:
        y = self.stem(x)
        return self.head(self.drop((y + torch.relu(self.norm(y))).mean((2, 3))))


def loaded(width: int) -> sl.Model:
    torch.manual_seed(width)
    return sl.load(Net(width).eval(), digits()[:2])


@pytest.mark.slow
@pytest.mark.skipif(uncompilable("cpu") is not None, reason="nothing compiles here")
def test_compiled_training_is_the_same_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """With values that are watched, dropout, a smaller last batch, and scores in between."""
    calls: list[int] = []
    program = Program.__call__
    monkeypatch.setattr(Program, "__call__", lambda self, *x: calls.append(len(x[0])) or program(self, *x))
    x, y = digits(), load_digits().target
    student, teacher = loaded(4), loaded(6)

    def train(compiled: bool) -> tuple[list[float], Any]:
        step = Distillation(compiled=compiled, features=("similarity",), alpha=0.5)
        native = TorchTrainer(student.native, teachers_of(teacher.native), step, 0, 4)
        native.add(_squares(student))
        losses, answers = [], []
        for start, stop in ((0, 64), (64, 128), (128, 150), (150, 214)):
            losses.append(native.step(((x[start:stop],), y[start:stop]), 1e-3))
            answers.append(native.outputs((x[:20],))[0])
        return losses, np.stack(answers)

    losses, answers = train(compiled=True)
    assert calls == [64, 64] * 3  # teacher and student; of the smaller batch neither
    expected, others = train(compiled=False)
    assert len(calls) == 6
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    np.testing.assert_allclose(answers, others, rtol=1e-3, atol=1e-4)


def _squares(student: sl.Model) -> Term:
    name = next(node.outputs[0] for node in student.graph.nodes if node.kind == "conv")
    return Term((name,), (name,), lambda xp, own, other, _: (own[0] ** 2).mean() * other[0].mean() ** 2)


def test_without_a_compiler_it_is_refused_before_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    x, y = digits(), load_digits().target
    with pytest.raises(SlimlineError, match="no C\\+\\+ compiler 'no-such-compiler', by which PyTorch compiles: leave"):
        sl.apply(loaded(4), [sl.ChannelPruning(ratio=0.5), Distillation(compiled=True)], sl.Data(train=(x, y)))
    with pytest.raises(SlimlineError, match="on cpu, as there is no C"):
        TorchTrainer(loaded(4).native, None, Distillation(compiled=True), 0, 1)


def test_what_cannot_be_compiled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        def run(*_: Any) -> Any:
            raise RuntimeError("no lowering\nand more")

        return run

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(SlimlineError, match=r"cannot compile the network .no lowering.: leave compiled out"):
        Program(loaded(4).native, ())(torch.zeros(2, 1, 8, 8))
    with pytest.raises(SlimlineError, match="leave it out while their numbers round"):
        sl.QuantizationAwareTraining(compiled=True)


def test_keras_compiles_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    keras = pytest.importorskip("keras")
    monkeypatch.setenv("CXX", "no-such-compiler")
    keras.utils.set_random_seed(0)
    inputs = keras.Input((64,))
    model = sl.load(keras.Model(inputs, keras.layers.Dense(10)(inputs)))
    data = sl.Data(train=(load_digits().data.astype(np.float32)[:400], load_digits().target[:400]))
    plain, compiled = (
        sl.apply(model, Distillation(epochs=1, compiled=each), data, teacher=model) for each in (False, True)
    )
    np.testing.assert_array_equal(
        compiled.predict(np.eye(64, dtype=np.float32)), plain.predict(np.eye(64, dtype=np.float32))
    )
    assert compiled.history[-1]["compiled"]
