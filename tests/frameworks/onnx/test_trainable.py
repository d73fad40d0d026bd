"""ONNX graphs as torch modules: ONNX's own cases, whole networks, training as torch does it, and what is refused."""

from __future__ import annotations

import io
import re
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
from slimline.basics.errors import SlimlineError
from slimline.frameworks.onnx.canonical import canonical
from slimline.frameworks.onnx.trainable import Untrainable, trainable
from slimline.frameworks.onnx.trainable.call import RULES
from slimline.model import Model
from slimline.zoo.torch import ResidualCNN
from tests.digit_models import digits, fitted
from tests.frameworks.onnx.graphs import exported, images, model, tokens, weights
from tests.zoo_torch import ZOO

DTYPES = {"float32", "int64", "int32", "bool"}
QUICK = ("mobilenet_v3", "unet", "vit", "lstm")
NEWEST = 24
"""The latest version of operators that ONNX Runtime takes."""
OTHERWISE = ("test_resize_downsample_scales_linear_align_corners", "test_resize_downsample_scales_cubic_align_corners")
"""What ONNX Runtime computes otherwise than ONNX says."""


@cache
def cases() -> dict[str, Any]:
    """The cases that come with ONNX of operators that have a rule, by name."""
    with np.errstate(all="ignore"):
        from onnx.backend.test.case.node import collect_testcases

        return {
            case.name: case
            for case in list[Any](collect_testcases(None))
            if case.name not in OTHERWISE
            and {node.op_type for node in case.model.graph.node} <= set(RULES)
            and all(getattr(x, "dtype", np.dtype("O")).name in DTYPES and x.size for s in case.data_sets[0] for x in s)
        }


def outcome(case: Any) -> str:
    """What comes of a case whose first input is free: ``equal``, why it is refused, or what is wrong."""
    proto = onnx.ModelProto()
    proto.CopyFrom(case.model)
    for imported in proto.opset_import:
        imported.version = min(imported.version, NEWEST)
    proto.ir_version = min(proto.ir_version, 10)
    inputs, expected = case.data_sets[0]
    values = list(proto.graph.input)
    del proto.graph.input[1:]
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(x, value.name) for value, x in zip(values[1:], inputs[1:], strict=True)
    )
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
    left = set(RULES) - check(list(cases()), 0.85)
    print(left)
