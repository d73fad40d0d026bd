"""OpenVINO's own dynamic quantization: no step asks for it, and it is what is said of it."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import pytest

import slimline as sl
from slimline.runtimes.base import runtime
from slimline.runtimes.processor import saturates

torch = pytest.importorskip("torch")
pytest.importorskip("openvino")

INPUTS, OUTPUTS, GROUP = 256, 96, 32
"""In the plugin's groups each row has ranges of its own."""


@pytest.fixture(scope="module")
def layer() -> sl.Model:
    torch.manual_seed(0)
    return sl.load(torch.nn.Linear(INPUTS, OUTPUTS, bias=False).eval(), np.ones((2, INPUTS), np.float32))


@pytest.mark.parametrize("rows", [1, 8])
def test_rows_are_rounded_in_groups_by_their_largest_number(layer: sl.Model, rows: int, tmp_path: Path) -> None:
    stored = sl.apply(
        layer, sl.WeightQuantization(dtype="int8", group_size=None, rounding="nearest"), target="openvino"
    )
    artifact = sl.export(stored, "openvino", tmp_path / "out")
    x = np.random.default_rng(rows).normal(size=(rows, INPUTS)).astype(np.float32) * np.logspace(
        -2, 1, INPUTS, dtype="f4"
    )
    answer = runtime("openvino").load(artifact).run((x,))

    (weight,) = stored.parameters().values()
    groups = x.reshape(rows, -1, GROUP)
    scale = np.abs(groups).max(2, keepdims=True) / 127
    rounded = (np.rint(groups / scale) * scale).reshape(x.shape)
    size = np.abs(answer).max()
    errors = {name: np.abs(answer - each @ weight.T).max() / size for name, each in (("float", x), ("int", rounded))}
    assert min(errors.values()) < 1e-4 < max(errors.values())
    if platform.machine() in ("x86_64", "AMD64") and not saturates():
        assert errors["int"] < errors["float"]


def test_the_step_says_what_to_use_instead(layer: sl.Model) -> None:
    with pytest.raises(sl.SlimlineError, match=r"finds them by itself .* use WeightQuantization for it; or choose the"):
        sl.apply(layer, sl.DynamicQuantization(), target="openvino")
