"""The sweeps over model zoos: one small model of every family is examined anew, and the stored tables hold together.

torchvision, timm and transformers live in an environment of their own, ``.venv-zoo``, which ``make test-all`` makes.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SWEEPS = {
    "torchvision": (
        "alexnet", "squeezenet1_1", "shufflenet_v2_x0_5", "mnasnet0_5", "mobilenet_v3_small", "regnet_y_400mf",
        "efficientnet_b0", "googlenet", "densenet121", "resnet18", "swin_t", "convnext_tiny", "vit_b_32",
        "lraspp_mobilenet_v3_large", "mc3_18", "raft_small",
        "fasterrcnn_mobilenet_v3_large_320_fpn",
    ),
    "timm": ("byobnet", "edgenext", "eva", "gemma4_vit", "hiera", "mobilevit", "mvitv2", "nfnet", "volo", "xcit"),
    "transformers": ("bert", "deberta-v2", "llama", "t5", "swin", "wav2vec2", "clip"),
    "keras": ("VGG16", "MobileNetV3Small", "EfficientNetB0", "DenseNet121", "ConvNeXtTiny"),
}  # fmt: skip
TABLES = sorted((ROOT / "benchmarks/results").glob("zoo_*.json"))


@functools.cache
def python(zoo: str) -> str | None:
    """An interpreter that has the zoo's package."""
    other = ROOT / ".venv-zoo/bin/python"
    if importlib.util.find_spec(zoo):
        return sys.executable
    return str(other) if other.exists() else None


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("zoo", "name"), [(zoo, name) for zoo, names in SWEEPS.items() for name in names])
def test_a_model_of_every_family_is_covered(zoo: str, name: str) -> None:
    found = python(zoo)
    if found is None:
        pytest.skip(f"{zoo} is not installed: make .venv-zoo/.ready")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [found, str(ROOT / f"benchmarks/zoo_{zoo}.py"), "--one", name]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["covered"], row["failure"]


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_the_stored_table_counts_what_its_rows_say(path: Path) -> None:
    rows = json.loads(path.read_text())["rows"]
    covered = [r for r in rows if r["covered"]]
    assert path.with_suffix(".md").read_text().startswith(f"# {path.stem}: {len(covered)} of {len(rows)} covered\n")
    assert all(r["less"] >= 0.25 and r["error"] <= 1e-4 and r["saved"] for r in covered)
    assert all(r["trained"] for r in covered if path.stem != "zoo_onnx")  # files do not train
    assert all(r["failure"] for r in rows if not r["covered"])


def test_the_column_of_exports_says_what_was_measured() -> None:
    spec = importlib.util.spec_from_file_location("zoo_sweeps", ROOT / "benchmarks/zoo.py")
    assert spec is not None and spec.loader is not None
    sweeps = importlib.util.module_from_spec(spec)
    sys.modules["zoo_sweeps"] = sweeps  # a dataclass looks for its module there
    spec.loader.exec_module(sweeps)
    row = {
        "covered": True, "failure": "", "less": 0.4, "macs_less": 0.5, "error": 1e-7, "operators": 9, "frozen": [],
        "factors": "largest", "parts": [], "seconds_to_load": 1, "seconds_to_plan": 1,
    }  # fmt: skip
    rows = [
        {**row, "model": "a", "exported": True, "export_failure": ""},
        {**row, "model": "b", "exported": False, "export_failure": "it disagrees"},
        {**row, "model": "c"},
        {"model": "d", "covered": False, "failure": "not captured"},
    ]
    page = sweeps.markdown("zoo_x", rows, {})
    assert page.startswith("# zoo_x: 3 of 4 covered\n") and "in the runtime: 1 of 2." in page
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ")[2] for line in page.splitlines() if line[:2] == "| "}
    assert cells == {"model": "exported and equal in the runtime", "a": "yes", "b": "no", "c": "–", "d": "–"}
    assert "export: it disagrees" in page


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_no_row_claims_an_export_that_was_not_measured(path: Path) -> None:
    rows = json.loads(path.read_text())["rows"]
    assert all(r["exported"] in (None, True, False) for r in rows)
    assert all(bool(r.get("export_failure")) == (r["exported"] is False) for r in rows)
    assert all("seconds_to_export" in r for r in rows if r["exported"])
