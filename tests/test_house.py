"""The house holds: no module above the adapters knows a framework or a target by its name."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "slimline"
ABOVE = ("run", "search", "steps", "training", "evidence", "plans", "model", "report", "data", "measure")
BELOW = ("graph", "recipe", "files", "methods", "basics")
NAMES = {
    "torch",
    "keras",
    "tensorflow",
    "jax",
    "onnx",
    "onnxruntime",
    "litert",
    "executorch",
    "coreml",
    "tensorrt",
    "openvino",
    ".pt2",
    ".keras",
    ".tflite",
}
# What `slimline.load` takes, and what it returns.
WHAT_USERS_BRING = ("model/loading.py", "model/model.py", "run/sources.py")


def _strings(tree: ast.AST) -> list[tuple[int, str]]:
    """Texts of a module that are no docstrings."""
    documentation = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in documentation]
    return [(node.lineno, node.value) for node in constants if isinstance(node.value, str)]


@pytest.mark.parametrize("folder", [*ABOVE, *BELOW])
def test_no_framework_and_no_target_is_named(folder: str) -> None:
    named = [
        f"{path.relative_to(SOURCE)}:{line} {text!r}"
        for path in sorted((SOURCE / folder).rglob("*.py"))
        for line, text in _strings(ast.parse(path.read_text("utf-8")))
        if text in NAMES
    ]
    assert not named


@pytest.mark.parametrize("folder", [*ABOVE, *BELOW])
def test_no_comment_and_no_docstring_leans_on_a_framework(folder: str) -> None:
    named = [
        f"{path.relative_to(SOURCE)}:{number} {line.strip()}"
        for path in sorted((SOURCE / folder).rglob("*.py"))
        if str(path.relative_to(SOURCE)) not in WHAT_USERS_BRING
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if re.search("torch|keras|tensorflow", line) or re.search("PyTorch|Keras|TensorFlow", line)
    ]
    assert not named


def test_the_root_holds_the_surface_only() -> None:
    assert {path.name for path in SOURCE.glob("*.py")} == {"__init__.py", "__main__.py", "cli.py", "demo.py"}


def test_each_family_of_steps_has_one_handler() -> None:
    from slimline.recipe.registry import handlers

    folders = {path.parent.name for path in (SOURCE / "steps").glob("*/__init__.py")}
    homes = [type(handler).__module__.removeprefix("slimline.steps.") for handler in handlers().values()]
    assert sorted(homes) == sorted(folders)


def test_each_step_is_a_public_name() -> None:
    import slimline
    from slimline.recipe.registry import handlers

    assert handlers().keys() <= set(slimline.__all__)


def test_no_table_of_the_command_line_lacks_json() -> None:
    tree = ast.parse((SOURCE / "cli.py").read_text("utf-8"))
    commands = [each for each in tree.body if isinstance(each, ast.FunctionDef) and each.decorator_list]
    prints = {"_print", "_show", "Table"}
    tables = [
        each for each in commands if any(isinstance(node, ast.Name) and node.id in prints for node in ast.walk(each))
    ]
    assert len(tables) >= 10
    assert all("as_json" in {argument.arg for argument in each.args.args} for each in tables)


BARE = """
import sys

EXTRAS = {"torch", "keras", "tensorflow", "ai_edge_litert", "flatbuffers", "executorch", "coremltools", "openvino"}

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in EXTRAS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from slimline.measure.results import environment
from slimline.recipe.registry import handlers
from slimline.runtimes.base import names, runtime
assert {"coreml", "executorch", "litert", "onnxruntime", "openvino", "tensorrt"} <= set(names())
assert all(runtime(name).policy for name in names())
# A process that measures asks which targets there are, and so do commands: that loads none of their libraries.
slow = {"onnx", "onnx_ir", "onnxscript", "onnxruntime", "scipy", "sklearn"} & set(sys.modules)
assert not slow, slow
assert "ChannelPruning" in handlers()
environment()
"""


def test_targets_and_steps_are_told_where_no_extra_is_installed() -> None:
    done = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
