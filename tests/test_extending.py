"""The package in docs/extending.md is installed, and compresses networks from a recipe in YAML."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"
SOURCE = Path(__file__).parent.parent / "src"
BLOCK = re.compile(r"```\w+\n# file: (\S+)\n(.*?)```", re.DOTALL)

NET = """
import numpy as np, torch
import slimline as sl

def model():
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 16, 16), torch.nn.ReLU(),
        torch.nn.Linear(16, 3))
    return net.eval(), (np.zeros((2, 1, 6, 6), np.float32),)

def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 1, 6, 6)).astype(np.float32)
    return sl.Data(test=(x, rng.integers(0, 3, 300)))
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipe and the installed package."""
    folder = tmp_path_factory.mktemp("extras")
    for name, text in BLOCK.findall(PAGE.read_text("utf-8")):
        path = folder / "package" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    (folder / "package" / "slimline_extras" / "__init__.py").write_text("")
    (folder / "package" / "recipe.yaml").rename(folder / "recipe.yaml")
    (folder / "net.py").write_text(NET)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(folder / "site"), str(folder / "package")], check=True)
    return folder


def run(project: Path, *words: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(project / "site"), str(SOURCE)])
    environment = {**os.environ, "PYTHONPATH": path, "SLIMLINE_STATE": str(project / "state"), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, *words], cwd=project, env=environment, capture_output=True, text=True, timeout=500
    )


def test_a_recipe_with_the_step_for_the_target(project: Path) -> None:
    done = run(
        project, "-m", "slimline", "compress", "net:model", "--data", "net:data", "--recipe", "recipe.yaml", "-o", "run"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((project / "run" / "report.json").read_text())
    assert report["target"] == "onnxreference"
    assert [step["step"] for step in report["steps"]] == ["ChannelPruning", "RoundedWeights"]
    assert report["parity"]["passed"]
    assert report["compressed"]["latency"]["1"]["median_ms"] > 0
    assert (project / "run" / "onnxreference" / "model.onnx").is_file()
    listed = run(project, "-m", "slimline", "targets").stdout
    assert "onnxreference" in listed and "onnxruntime" in listed


def test_every_command_takes_them(project: Path) -> None:
    words = ("plan", "net:model", "--data", "net:data", "--recipe", "recipe.yaml", "--json")
    plan = run(project, "-m", "slimline", *words)
    assert plan.returncode == 0, plan.stderr
    found = json.loads(plan.stdout)
    assert found["target"] == "onnxreference" and not found["steps"][1]["skipped"]
    assert [row["step"] for row in found["steps"]] == ["ChannelPruning", "RoundedWeights"]
    listed = json.loads(run(project, "-m", "slimline", "steps", "--json").stdout)["steps"]
    assert {
        "name": "RoundedWeights",
        "kind": "sparse",
        "summary": "rounds weights to a few decimals",
        "reads": [],
    } in listed
    for target in ("onnxruntime", "onnxreference"):  # both load .onnx
        out = str(project / target)
        written = run(project, "-m", "slimline", "export", "net:model", "--target", target, "-o", out)
        assert (written.returncode, written.stdout) == (0, f"Artifact: {out}/model.onnx\n"), written.stderr
        words = ("measure", f"{out}/model.onnx", "--data", "net:data", "--target", target, "--batch", "1", "--json")
        measured = run(project, "-m", "slimline", *words)
        assert measured.returncode == 0, measured.stderr
        assert json.loads(measured.stdout)["targets"] == {"artifact": target}
    shown = run(project, "-m", "slimline", "inspect", "net:model", "--target", "onnxreference")
    assert shown.returncode == 0 and "INT8 on onnxreference" in shown.stdout


CHECK = """
import numpy as np
import slimline as sl
from slimline.recipe.registry import handlers

model = sl.load(*__import__("net").model())
small = sl.apply(model, sl.Recipe.model_validate({"steps": [{"step": "RoundedWeights", "decimals": 1}]}).steps)
weights = [w for name, w in small.parameters().items() if name.endswith("weight")]
assert all(np.allclose(w * 10, np.round(w * 10), atol=1e-5) for w in weights)
assert handlers()["RoundedWeights"].summary == "rounds weights to a few decimals"
try:
    sl.apply(model, handlers()["RoundedWeights"].config(layers=("type:lstm",)))
except sl.SlimlineError as error:
    print(error)
"""


def test_the_step_from_python(project: Path) -> None:
    done = run(project, "-c", CHECK)
    assert done.returncode == 0, done.stderr


RULE = """
import numpy as np, torch
import slimline as sl

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(6, 8), torch.nn.Linear(8, 3)
    def forward(self, x):
        return self.b(self.a(x).logcumsumexp(1)).mean(1)

x = np.random.default_rng(0).normal(size=(3, 5, 6)).astype(np.float32)
plan = lambda: sl.plan(sl.load(Net(), x), sl.ChannelPruning(ratio=0.5, criterion="l2"))
try:
    plan()
    raise SystemExit("pruned without a rule")
except sl.SlimlineError as error:
    assert "logcumsumexp" in str(error), error
import slimline_extras.rules
model = sl.load(Net(), x)
found = sl.plan(model, sl.ChannelPruning(ratio=0.5, criterion="l2"))
assert found.parameters < model.graph.size
assert np.allclose(found.apply(model).predict(x), found.mask(model).predict(x), atol=1e-6)
"""


def test_the_rule(project: Path) -> None:
    done = run(project, "-c", RULE)
    assert done.returncode == 0, done.stderr


FRAMEWORK = """
import numpy as np
from pathlib import Path
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier
import slimline as sl

x, y = load_digits(return_X_y=True)
x = (x / 16).astype(np.float32)
net = MLPClassifier((32,), max_iter=20, random_state=0).fit(x, y)
model = sl.load(net)
assert model.framework == "sklearn"
assert (model.predict(x).argmax(1) == net.predict(x)).mean() > 0.999
small = sl.apply(model, sl.ChannelPruning(ratio=0.5, criterion="l2"))
assert small.graph.size < 0.6 * model.graph.size
assert sl.export(small, small.usual_target, "out").is_file()
"""


def test_the_framework(project: Path) -> None:
    done = run(project, "-W", "ignore", "-c", FRAMEWORK)
    assert done.returncode == 0, done.stderr


def test_a_package_that_cannot_be_used_is_named(project: Path) -> None:
    broken = project / "site" / "broken-1.0.dist-info"
    broken.mkdir()
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (broken / "entry_points.txt").write_text("[slimline.targets]\nlost = nowhere.to.be:found\n")
    try:
        done = run(project, "-m", "slimline", "targets")
    finally:
        (broken / "entry_points.txt").unlink()
    assert done.returncode == 2
    assert "The target 'lost' of the package broken cannot be used" in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr


def test_a_name_that_is_taken_is_refused(project: Path) -> None:
    double = project / "site" / "double-1.0.dist-info"
    double.mkdir()
    (double / "METADATA").write_text("Metadata-Version: 2.1\nName: double\nVersion: 1.0\n")
    (double / "entry_points.txt").write_text("[slimline.targets]\nmine = slimline.runtimes.litert:runtime\n")
    try:
        done = run(project, "-m", "slimline", "targets")
    finally:
        (double / "entry_points.txt").unlink()
    assert done.returncode == 2 and "Two packages register a target litert" in done.stderr
