"""The road from ONNX to TensorFlow and LiteRT: ONNX's own cases, whole networks, integers, and what is refused."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tensorflow")
pytest.importorskip("ai_edge_litert")

import tensorflow as tf
import torch
from torch import nn

import slimline as sl
from slimline.runtimes.base import runtime
from slimline.runtimes.forms.onnx_tensorflow import (
    rules_elementwise,  # noqa: F401
    rules_kernels,  # noqa: F401
    rules_moves,  # noqa: F401
    rules_recurrent,  # noqa: F401
    rules_resize,  # noqa: F401
    to_function,
)
from slimline.runtimes.forms.onnx_tensorflow.call import RULES
from slimline.runtimes.forms.onnx_tensorflow.layout import Placed, aligned, arranged
from slimline.steps.quantization.calibration import calibrate
from tests.onnx_cases import cases_of, first_input_free
from tests.zoo_torch import ZOO

QUICK = ("mobilenet_v3", "unet", "vit", "lstm")
COMMON = ("Conv", "ConvTranspose", "Gemm", "AveragePool", "MaxPool", "Resize", "Pad")


@cache
def cases() -> dict[str, Any]:
    """The cases that come with ONNX of operators that have a rule, by name."""
    return cases_of(RULES)


def outcome(case: Any) -> str:
    """What comes of a case whose first input is free: ``equal``, the sentence of a refusal, or what is wrong."""
    inputs, expected = case.data_sets[0]
    try:
        answers = to_function(ir.from_proto(first_input_free(case))).concrete(*[tf.constant(x) for x in inputs[:1]])
    except sl.SlimlineError as error:
        return str(error)
    except Exception as error:
        return f"WRONG {type(error).__name__}: {error}"[:200]
    for mine, right in zip(answers, expected, strict=True):
        if tuple(mine.shape) != right.shape or mine.dtype.name != right.dtype.name:
            return f"WRONG {mine.dtype.name}{tuple(mine.shape)} instead of {right.dtype.name}{right.shape}"
        if not np.allclose(mine.numpy(), right, rtol=1e-3, atol=1e-5, equal_nan=True):
            return "WRONG numbers"
    return "equal"


def check(names: list[str], least: float) -> None:
    outcomes = {name: outcome(cases()[name]) for name in names}
    wrong = {name: text for name, text in outcomes.items() if text.startswith("WRONG")}
    assert not wrong, "\n".join(f"{name}: {text}" for name, text in wrong.items())
    for name, text in outcomes.items():
        assert text == "equal" or re.fullmatch(r"LiteRT has no .+, which .+ needs: express .+\.", text, re.S), (
            name,
            text,
        )
    assert sum(text == "equal" for text in outcomes.values()) >= least * len(names)


def test_common_operators_as_onnx_defines_them() -> None:
    chosen = [n for n, case in cases().items() if {node.op_type for node in case.model.graph.node} <= set(COMMON)]
    assert len(chosen) > 80
    check(chosen, 0.9)


@pytest.mark.slow
def test_every_operator_as_onnx_defines_it() -> None:
    assert len(cases()) > 500
    check(list(cases()), 0.8)


class Uncommon(nn.Module):
    """What TensorFlow Lite has no operator for, and is written in those that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, padding_mode="replicate")
        self.wide = nn.ConvTranspose2d(8, 8, 3, stride=2, dilation=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        resize = nn.functional.interpolate
        x = nn.functional.max_pool2d(self.conv(x), 3, 1, padding=1, dilation=2).relu()
        x = resize(x, scale_factor=0.6, mode="bicubic") + resize(x, (6, 6), mode="nearest")
        x = resize(self.wide(x), (5, 9), mode="bilinear", antialias=True)
        return self.head(nn.functional.avg_pool3d(x[:, None], (1, 2, 2))[:, 0].mean((2, 3)))


def test_what_litert_has_no_operator_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = sl.load(Uncommon().eval(), torch.randn(4, 3, 12, 12))
    session = runtime("litert").load(sl.export(model, "litert", tmp_path))
    x = np.random.default_rng(1).normal(size=(6, 3, 12, 12)).astype(np.float32)
    np.testing.assert_allclose(session.outputs((x,))[0], model.outputs(x)[0], rtol=1e-4, atol=1e-5)


@given(st.permutations(range(4)), st.permutations(range(4)), st.tuples(*[st.integers(1, 3)] * 4))
@settings(max_examples=40, deadline=None)
def test_an_order_of_dimensions_is_another_view_of_the_same_numbers(old: Any, new: Any, shape: Any) -> None:
    x = np.random.default_rng(0).random(shape)
    tensor = arranged(tf.constant(np.transpose(x, old)), tuple(old), tuple(new))
    np.testing.assert_array_equal(tensor.numpy(), np.transpose(x, new))


@given(st.permutations(range(3)), st.integers(0, 3), st.integers(0, 7))
@settings(max_examples=40, deadline=None)
def test_operands_broadcast_as_numpy_says(order: Any, rank: int, ones: int) -> None:
    rng = np.random.default_rng(1)
    x, shape = rng.random((2, 3, 4)), [1 if ones >> i & 1 else n for i, n in enumerate((2, 3, 4))]
    for stored in (True, False):
        y = rng.random(shape[3 - rank :])
        other = y if stored else Placed(tf.constant(y), tuple(range(rank)))
        (a, b), common = aligned([Placed(tf.constant(np.transpose(x, order)), tuple(order)), other])
        np.testing.assert_array_equal(Placed(a + b, common).plain.numpy(), x + y)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ZOO])
def test_torch_families_in_litert(name: str, tmp_path: Path) -> None:
    """Gated by `sl.export` at several batch sizes; here again with samples of their own."""
    factory, example = ZOO[name]
    small = sl.apply(sl.load(factory(), example()), sl.ChannelPruning(ratio=0.3, criterion="l2"))
    session = runtime("litert").load(sl.export(small, "litert", tmp_path))
    rows = tuple(np.concatenate([x, x[::-1], x]) for x in small.example)
    for mine, theirs in zip(small.outputs(*rows), session.outputs(rows), strict=True):
        np.testing.assert_allclose(theirs, mine, rtol=1e-3, atol=1e-4 * float(np.abs(mine).max()))


def mobile() -> Any:
    """Everything that LiteRT computes in integers: gates, activations of several kinds, a norm by itself, widening."""

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int, function: Any) -> None:
            super().__init__()
            self.wide, self.wide_norm = nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
            self.deep = nn.Conv2d(outputs, outputs, 3, stride, 1, groups=outputs, bias=False)
            self.deep_norm, self.function = nn.BatchNorm2d(outputs), function
            self.squeeze, self.excite = nn.Conv2d(outputs, 4, 1), nn.Conv2d(4, outputs, 1)
            self.narrow, self.short = nn.Conv2d(outputs, outputs, 1), nn.Conv2d(inputs, outputs, 1, stride)

        def forward(self, x: Any) -> Any:
            y = self.function(self.deep_norm(self.deep(self.function(self.wide_norm(self.wide(x))))))
            gate = self.excite(torch.relu(self.squeeze(y.mean((2, 3), keepdim=True))))
            return self.narrow(y * torch.sigmoid(gate)) + self.short(x)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.pool = nn.Conv2d(1, 8, 3, 2, 1), nn.MaxPool2d(3, 1, 1)
            self.first, self.second = Block(8, 12, 1, nn.Hardswish()), Block(12, 16, 2, nn.SiLU())
            self.up, self.norm = nn.ConvTranspose2d(16, 12, 2, 2), nn.BatchNorm2d(24)
            self.head = nn.Linear(24, 10)

        def forward(self, x: Any) -> Any:
            x = self.first(self.pool(torch.relu(self.stem(x))))
            x = torch.cat([x, self.up(self.second(x))], 1)
            return self.head(torch.relu(self.norm(x)).mean((2, 3)))

    torch.manual_seed(0)
    net = Net()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return net.eval()


def test_a_quantized_torch_network_is_all_integers(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(64, 1, 16, 16)).astype(np.float32)
    model = sl.load(mobile(), x[:2])
    quantized = sl.apply(model, sl.StaticQuantization(undo=False), sl.Data(calibration=(x,)), target="litert")
    artifact = sl.export(quantized, "litert", tmp_path)
    computed = runtime("litert").integer_layers(artifact)
    assert set(computed.values()) == {"integer"}, [name for name, kind in computed.items() if kind == "float"]
    named = {name.partition(" ")[0] for name in computed}
    assert {"stem", "first.wide", "first.deep", "first.squeeze", "second.narrow", "up", "head"} <= named
    simulated, real = quantized.predict(x), runtime("litert").load(artifact).run((x,))
    step = np.ptp(simulated) / 255
    assert np.abs(simulated - real).max() <= 3 * step
    assert np.mean(np.abs(simulated - real)) <= 0.5 * step
    again = sl.export(quantized, "litert", tmp_path / "again")
    assert again.read_bytes() == artifact.read_bytes()


class Line(nn.Module):
    """Convolutions over one dimension: of all channels, of each by itself, and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.deep = nn.Conv1d(8, 8, 3), nn.Conv1d(8, 8, 3, groups=8)
        self.back, self.point = nn.ConvTranspose1d(8, 6, 3, 2), nn.Conv1d(6, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.point(torch.relu(self.back(torch.relu(self.deep(torch.relu(self.first(x))))))).mean(2)


def test_convolutions_over_one_dimension_are_integer(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(16, 8, 12)).astype(np.float32)
    torch.manual_seed(0)
    model = sl.load(Line().eval(), (x[:2],))
    small = calibrate(model, sl.StaticQuantization(), [(x,)], "litert")
    path = sl.export(small, "litert", tmp_path)
    kinds = runtime("litert").integer_layers(path)
    assert set(kinds.values()) == {"integer"} and {"first", "deep", "back", "point"} <= kinds.keys()
    expected = small.outputs(x)[0]
    answers = runtime("litert").load(path).run((x,))
    np.testing.assert_allclose(answers, expected, rtol=0, atol=0.02 * np.abs(expected).max())


def test_what_litert_has_not_is_refused_with_its_layer(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 2)

        def forward(self, x: Any) -> Any:
            return torch.atan(self.head(x))

    model = sl.load(Odd(), np.ones((2, 4), np.float32))
    with pytest.raises(sl.SlimlineError, match=r"LiteRT has no Atan, which .*Atan needs: express"):
        sl.export(model, "litert", tmp_path)
    assert not list(tmp_path.iterdir())
