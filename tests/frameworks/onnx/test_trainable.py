"""ONNX graphs as torch modules: ONNX's own cases, whole networks, training as torch does it, and what is refused."""

from __future__ import annotations

import io
import json
import re
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from sklearn.datasets import load_digits

import slimline as sl
from slimline import cli
from slimline.basics.errors import SlimlineError
from slimline.frameworks.base import Term
from slimline.frameworks.onnx.canonical import canonical
from slimline.frameworks.onnx.train import OnnxTrainer
from slimline.frameworks.onnx.trainable import Untrainable, trainable
from slimline.frameworks.onnx.trainable.call import RULES
from slimline.measure.size import Memory
from slimline.model import Model
from slimline.training.loop import recover
from slimline.zoo.torch import ResidualCNN
from tests import kill_job
from tests.digit_models import digits, fitted
from tests.frameworks.onnx.graphs import exported, images, weights
from tests.onnx_cases import cases_of, first_input_free
from tests.zoo_torch import ZOO

NEWER = ("tied_lm", "gated_mlp")
"""Families that only torch's newer exporter writes."""
QUICK = ("mobilenet_v3", "unet", "vit", "lstm")
NEWEST = 24
"""The latest version of operators that ONNX Runtime takes."""
OTHERWISE = ("test_resize_downsample_scales_linear_align_corners", "test_resize_downsample_scales_cubic_align_corners")
"""What ONNX Runtime computes otherwise than ONNX says."""


@cache
def cases() -> dict[str, Any]:
    """The cases that come with ONNX of operators that have a rule, by name."""
    return {
        name: case
        for name, case in cases_of(set(RULES)).items()
        if name not in OTHERWISE and all(x.size for s in case.data_sets[0] for x in s)
    }


def outcome(case: Any) -> str:
    """What comes of a case whose first input is free: ``equal``, why it is refused, or what is wrong."""
    proto = first_input_free(case)
    for imported in proto.opset_import:
        imported.version = min(imported.version, NEWEST)
    proto.ir_version = min(proto.ir_version, 10)
    inputs, expected = case.data_sets[0]
    try:
        native, example = canonical(proto, inputs[:1])
    except SlimlineError as error:
        return f"unread: {error}"
    try:
        module = trainable(native).module
    except Untrainable as reason:
        return str(reason)
    answers = [x.detach().numpy() for x in module.forward(*map(torch.from_numpy, example))]
    for mine, right in zip(answers, expected, strict=True):
        if mine.shape != right.shape or not np.allclose(mine, right, rtol=1e-3, atol=1e-5, equal_nan=True):
            return "WRONG numbers"
    return "equal"


def check(names: list[str], least: float) -> set[str]:
    """No case is wrong and these are equal; the operators in those."""
    outcomes = {name: outcome(cases()[name]) for name in names}
    wrong = {name: text for name, text in outcomes.items() if text.startswith("WRONG")}
    assert not wrong, wrong
    read = {name: text for name, text in outcomes.items() if not text.startswith("unread")}
    for name, text in read.items():
        assert text == "equal" or re.match(r"slimline has no rule to train|as a torch module|PyTorch does", text), name
    assert sum(text == "equal" for text in read.values()) >= least * len(read)
    return {node.op_type for n, t in read.items() if t == "equal" for node in cases()[n].model.graph.node}


def test_one_case_of_each_operator_as_onnx_defines_it() -> None:
    chosen: dict[str, str] = {}
    for name, case in cases().items():
        if "expanded" not in name and len(case.model.graph.node) == 1:
            chosen.setdefault(case.model.graph.node[0].op_type, name)
    assert len(chosen) > 110
    check(list(chosen.values()), 0.85)


@pytest.mark.slow
def test_every_case_as_onnx_defines_it() -> None:
    assert len(cases()) > 600
    equal = check(list(cases()), 0.85)
    assert set(RULES) - equal <= {each.partition("(")[0] for each in " ".join(OTHERS).split()} | {"And", "Xor"}


OTHERS = [
    "d = LayerNormalization <axis = -1> (c, row)",
    "d = LayerNormalization <axis = 1> (c, channels, channels)",
    "e = ReduceLogSumExp <keepdims = 1> (c, last) d = Add(c, e)",
    "e = GlobalLpPool <p = 3> (c) d = Add(c, e)",
    "s = Shape <start = 0, end = 1> (c) e = ConstantOfShape <value = float[1] {2.0}> (s) "
    "k = Reshape(e, column) d = Mul(c, k)",
    "s = Shape <start = 1, end = 2> (x) n = Squeeze(s) r = Range(zero, n, one) q = Cast <to = 1> (r) "
    "m = ReduceSum <keepdims = 0> (q) d = Mul(c, m)",
    'd = Einsum <equation = "bchw,ck->bkhw"> (c, mixing)',
    'k = Cast <to = 2> (c) two = Cast <to = 2> (row) m = BitShift <direction = "LEFT"> (k, two) '
    "n = Cast <to = 1> (m) d = Add(c, n)",
]


@pytest.mark.parametrize("body", OTHERS)
def test_operators_that_no_case_shows(body: str) -> None:
    more = weights(row=(4,), channels=(12, 4, 4), mixing=(12, 12))
    more |= {"last": np.int64([3]), "zero": np.int64(0), "one": np.int64(1), "column": np.int64([-1, 1, 1, 1])}
    loaded = sl.load(images(body, more={name: x for name, x in more.items() if re.search(rf"\b{name}\b", body)}))
    answers = trainable(loaded.native).module.forward(*map(torch.from_numpy, loaded.example))
    for mine, right in zip(answers, loaded.outputs(*loaded.example), strict=True):
        np.testing.assert_allclose(mine.detach().numpy(), right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ZOO])
def test_families_of_torch(name: str) -> None:
    """Compared with ONNX Runtime at two batch sizes by `trainable`; here their gradients with torch's own."""
    proto, module, example = exported(name, None if name in NEWER else 17)
    loaded = sl.load(proto, example)
    form = trainable(loaded.native)
    own = {name: p for name, p in module.named_parameters() if p.requires_grad and p.dim() > 1}
    answers = module(*map(torch.from_numpy, example))
    answers = answers if isinstance(answers, torch.Tensor) else next(iter(answers))
    answers.square().sum().backward()
    mine = form.module.forward(*map(torch.from_numpy, example))[0]
    mine.square().sum().backward()
    same = [n for n in own if n in form.tensors and own[n].grad is not None]
    assert same or name == "lstm"
    for each in same:
        right, left = own[each].grad, form.module.get_parameter(form.tensors[each]).grad
        assert right is not None and left is not None
        left = left if left.shape == right.shape else left.T  # exporters turn matrices
        assert torch.allclose(left, right, atol=1e-3 * float(right.abs().max()) + 1e-6), each


# -- training ----------------------------------------------------------------------------


@cache
def pair() -> tuple[Model, Model]:
    """A small residual network that reads digits, as torch's and as ONNX'."""
    torch.manual_seed(0)
    module = fitted(lambda: ResidualCNN((8, 16), 1))
    example = torch.from_numpy(digits()[:2])
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, (example,), file, dynamo=False, opset_version=17, input_names=["x"],
            dynamic_axes={"x": {0: "batch"}}, training=torch.onnx.TrainingMode.PRESERVE,
        )  # fmt: skip
    return sl.load(module, example.numpy()), sl.load(onnx.load_from_string(file.getvalue()))


@cache
def samples() -> sl.Data:
    x, y = digits(), load_digits().target
    return sl.Data(train=(x[:900], y[:900]), selection=(x[900:1200], y[900:1200]), test=(x[1200:], y[1200:]))


def accuracy(model: Model) -> float:
    return float((model.predict(digits()[1200:]).argmax(1) == load_digits().target[1200:]).mean())


def test_a_trainer_does_what_torch_s_does() -> None:
    answers = []
    x, y = digits(), load_digits().target
    for loaded in pair():
        trainer = loaded.adapter.trainer(loaded.native, loaded.native, sl.Distillation(alpha=0.5), 0, 4)
        weight = "stages.0.0.conv1.weight"
        mask = np.arange(8 * 8 * 9).reshape(8, 8, 3, 3) % 3 > 0
        trainer.hold({weight: mask})
        first = next(n for n in loaded.graph.nodes if n.attributes.get("function") == "relu").outputs[0]
        trainer.add(Term.mean([first], lambda xp, a: xp.mean(xp.abs(a)), 0.1))
        losses = [trainer.step(((x[k * 32 : k * 32 + 32],), y[k * 32 : k * 32 + 32]), 0.003) for k in range(3)]
        slopes = trainer.slopes()
        gradients = trainer.gradients(((x[:64],), y[:64]))
        trainer.refresh([((x[:64],), y[:64])])
        trainer.set_weights({"stem.weight": 1.5 * trainer.weights()["stem.weight"]})
        state = trainer.state()
        trainer.step(((x[:32],), y[:32]), 0.003)
        trainer.restore(state)
        losses.append(trainer.step(((x[:32],), y[:32]), 0.003))
        end = trainer.native()
        stored = loaded.adapter.parameters(end)
        assert not stored[weight][~mask].any() and (loaded.parameters()[weight][~mask] != 0).any()
        answers.append((losses, slopes, gradients, trainer.weights(), stored, loaded.adapter.outputs(end, (x[:9],))[0]))
    (losses, *tensors, output), (own, *others, mine) = answers
    assert np.allclose(losses, own, rtol=1e-4)
    for left, right in zip(tensors, others, strict=True):
        assert set(right) <= set(left)
        for name in right:
            assert np.allclose(left[name], right[name], atol=2e-3 * np.abs(left[name]).max()), name
    assert np.allclose(output, mine, atol=2e-3 * np.abs(output).max())


def test_gradients_are_torch_s() -> None:
    found = []
    for loaded in pair():
        seen: list[Any] = []
        batches = [((digits()[k : k + 20],), load_digits().target[k : k + 20]) for k in (0, 20)]
        found.append((loaded.adapter.gradients(loaded.native, batches, "cross_entropy", seen.append), *seen))
    for left, right in zip(*found, strict=True):
        assert set(left) == set(right)
        assert all(np.allclose(left[n], right[n], atol=1e-4 * np.abs(left[n]).max() + 1e-7) for n in left)
    plans = [sl.plan(m, sl.ChannelPruning(ratio=0.5, criterion="taylor"), samples()) for m in pair()]
    assert plans[0].parameters == plans[1].parameters


def test_half_of_the_channels_go_and_the_accuracy_comes_back(tmp_path: Path) -> None:
    loaded = pair()[1]
    quick: Any = {"batch_size": 32, "learning_rate": 5e-3}
    trained = recover(loaded, None, sl.Distillation(epochs=4, alpha=0.0, **quick), samples(), 0).model
    tutor = Model(loaded.adapter, trained.native, loaded.example)
    steps = [sl.ChannelPruning(ratio=0.5), sl.Distillation(epochs=6, **quick)]
    pruned = sl.apply(tutor, steps[0])
    small = sl.apply(tutor, steps, samples())
    assert accuracy(tutor) > 0.9
    assert accuracy(pruned) < 0.3
    assert accuracy(small) - accuracy(pruned) > 0.8 * (accuracy(tutor) - accuracy(pruned))
    assert set(small.parameters()) == set(loaded.parameters()) and small.graph.size == pruned.graph.size
    path = sl.export(small, "onnxruntime", tmp_path)
    file = path if isinstance(path, Path) else tmp_path / "model.onnx"
    session = onnxruntime.InferenceSession(file / "model.onnx" if file.is_dir() else file)
    (answer,) = session.run(None, {session.get_inputs()[0].name: digits()[:50]})
    assert np.allclose(answer, small.predict(digits()[:50]), atol=1e-4 * np.abs(answer).max())
    again = sl.load(small.save(tmp_path / "small.onnx"))
    assert np.array_equal(again.predict(digits()[:50]), small.predict(digits()[:50]))
    sparse = sl.apply(small, [sl.SparsePruning(amount=0.5), sl.Distillation(epochs=1)], samples())
    for name, mask in sparse.masks.items():
        assert not sparse.parameters()[name][~mask].any()


def test_a_run_of_the_command_line_is_stopped_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("slimline.run.proof.measure_latency", kill_job.timed)  # times say nothing of it
    monkeypatch.setattr("slimline.run.proof.measure_memory", lambda *args, **kwargs: Memory(2, 1))
    pair()[1].save(tmp_path / "net.onnx")
    x, y = digits(), load_digits().target
    np.savez(tmp_path / "d.npz", x_train=x[:600], y_train=y[:600], x_test=x[900:], y_test=y[900:])
    recipe = "steps: [{step: ChannelPruning, ratio: 0.5}, {step: Distillation, epochs: 2, batch_size: 100}]"
    (tmp_path / "recipe.yaml").write_text(f"{recipe}\nbudget: {{max_drop: 0.9}}\nbatch_sizes: [1]\n")
    monkeypatch.chdir(tmp_path)
    compress = ("compress", "net.onnx", "--data", "d.npz", "--recipe", "recipe.yaml", "-o")

    def slimline(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["slimline", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0), capsys.readouterr().err

    assert slimline(*compress, "whole")[0] == 0
    steps = OnnxTrainer.step
    taken = iter(range(100))

    def stop(trainer: OnnxTrainer, batch: Any, rate: float) -> float:
        if next(taken) == 8:  # in the second epoch
            raise KeyboardInterrupt
        return steps(trainer, batch, rate)

    with monkeypatch.context() as patch:
        patch.setattr(OnnxTrainer, "step", stop)
        code, err = slimline(*compress, "stopped")
    assert code and "slimline resume stopped" in err
    code, err = slimline("resume", "stopped")
    assert code == 0, err
    for file in ("onnxruntime/model.onnx", "model.onnx", "recipe.yaml"):
        assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    report = json.loads((tmp_path / "stopped" / "report.json").read_text())
    assert [row["stage"] for row in report["durations"]].count("02-Distillation") == 1


# -- what is refused ----------------------------------------------------------------------


def test_what_cannot_train_is_refused_before_work(tmp_path: Path) -> None:
    body = "v, i = MaxPool <kernel_shape = [1, 1]> (c) d = Cast <to = 1> (i)"
    loaded = sl.load(images(body))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 3, 6, 6)).astype(np.float32)
    labelled = sl.Data(train=(x[:100], np.arange(100) % 5), test=(x[100:], np.arange(300) % 5))
    for steps in (
        sl.ChannelPruning(ratio=0.3, criterion="taylor"),
        sl.SparsePruning(amount=0.5, criterion="taylor"),
        [sl.ChannelPruning(ratio=0.3), sl.Distillation(epochs=1)],
    ):
        with pytest.raises(SlimlineError, match="needs gradients, but slimline has no rule to train MaxPool"):
            sl.apply(loaded, steps, labelled)
    with pytest.raises(SlimlineError, match="needs gradients"):
        sl.compress(loaded, labelled, recipe=[sl.Distillation(epochs=1)], output=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    sound = sl.load(images("d = Relu(c)"))
    with pytest.raises(SlimlineError, match="beside the student, but slimline has no rule to train MaxPool"):
        sl.apply(sound, [sl.ChannelPruning(ratio=0.3), sl.Distillation(epochs=1)], labelled, teacher=loaded)
    with pytest.raises(SlimlineError, match="needs gradients, but conv_w is stored in float16"):
        half = images("d = Relu(c)")
        for tensor in half.graph.initializer:
            array = onnx.numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
        half.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
        half.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
        sl.apply(sl.load(half), sl.ChannelPruning(ratio=0.3, criterion="taylor"), labelled)


def test_without_torch_all_but_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimline.frameworks.onnx.train.has_torch", lambda: False)
    loaded = sl.load(images("d = Relu(c)"))
    assert sl.apply(loaded, sl.ChannelPruning(ratio=0.3)).graph.size < loaded.graph.size
    assert loaded.adapter.device(None) == "cpu"
    with pytest.raises(SlimlineError, match="on the CPU"):
        sl.apply(loaded, sl.ChannelPruning(ratio=0.3), device="cuda")
    with pytest.raises(SlimlineError, match=r"which is not installed \(pip install 'slimline\[torch\]'\)"):
        sl.apply(loaded, sl.ChannelPruning(ratio=0.3, criterion="taylor"))
    with pytest.raises(SlimlineError, match="need gradients, but ONNX models are trained by PyTorch"):
        loaded.adapter.gradients(loaded.native, [], "norm")


def test_weights_that_are_written_back_wrongly_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = sl.load(images("d = Relu(c)"))
    trainer = OnnxTrainer(loaded.native, None, sl.Distillation(alpha=0.0), 0, 2)
    trainer.step((tuple(loaded.example), np.zeros(len(loaded.example[0]), np.int64)), 1e-2)
    trainer.native()
    named = type(trainer._form).named
    monkeypatch.setattr(
        type(trainer._form), "named", lambda self, arrays: {n: x * 1.1 for n, x in named(self, arrays).items()}
    )
    with pytest.raises(SlimlineError, match="mean something else in the ONNX model"):
        trainer.native()
