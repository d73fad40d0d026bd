"""Every family of networks, pruned at 30 %, is exported and equal in its runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import slimline as sl
from slimline.runtimes.base import runtime
from tests.zoo_keras import APPLICATIONS, SMALL
from tests.zoo_torch import ZOO

LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in APPLICATIONS]


def _equal(model: sl.Model, target: str, folder: Path) -> None:
    small = sl.apply(model, sl.ChannelPruning(ratio=0.3, criterion="l2"))
    session = runtime(target).load(sl.export(small, target, folder))
    rows = tuple(np.concatenate([x, x[::-1], x]) for x in small.example)
    for mine, theirs in zip(small.outputs(*rows), session.outputs(rows), strict=True):
        np.testing.assert_allclose(theirs, mine, rtol=1e-3, atol=1e-4 * float(np.abs(mine).max()))


@pytest.mark.parametrize("name", ZOO)
def test_torch_families_in_onnx_runtime(name: str, tmp_path: Path) -> None:
    factory, example = ZOO[name]
    _equal(sl.load(factory(), example()), "onnxruntime", tmp_path)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("mobilenet_v3", "vit") else pytest.mark.slow) for name in ZOO]
)
def test_torch_families_in_openvino(name: str, tmp_path: Path) -> None:
    factory, example = ZOO[name]
    _equal(sl.load(factory(), example()), "openvino", tmp_path)


@pytest.mark.parametrize("name", [*SMALL, *LARGE])
def test_keras_families_in_litert(name: str, tmp_path: Path) -> None:
    build = {**SMALL, **APPLICATIONS}[name]
    _equal(sl.load(build()), "litert", tmp_path)


QUICK = ("nested", "shared", "shuffled", "unet")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in (*SMALL, *APPLICATIONS)]
)
def test_keras_families_in_onnx_runtime(name: str, tmp_path: Path) -> None:
    build = {**SMALL, **APPLICATIONS}[name]
    _equal(sl.load(build()), "onnxruntime", tmp_path)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in ("attention_ops", "unet") else pytest.mark.slow) for name in SMALL],
)
def test_keras_families_in_openvino(name: str, tmp_path: Path) -> None:
    _equal(sl.load(SMALL[name]()), "openvino", tmp_path)


@pytest.mark.parametrize("name", [pytest.param("depthwise"), pytest.param("lstm", marks=pytest.mark.slow)])
def test_keras_families_in_tensorrt(name: str, tmp_path: Path) -> None:
    path = sl.export(sl.load(SMALL[name]()), "tensorrt", tmp_path)
    assert path.suffix == ".onnx"
