"""The house holds: no module above the adapters knows a framework or a target by its name."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "slimline"
ABOVE = ("run", "search", "steps", "training", "evidence", "plans", "model", "report", "data", "measure")
BELOW = ("graph", "recipe", "files", "methods", "basics")
NAMES = {"torch", "keras", "tensorflow", "jax", "onnx", "onnxruntime", "litert", ".pt2", ".keras", ".tflite"}


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


def test_the_root_holds_the_surface_only() -> None:
    assert {path.name for path in SOURCE.glob("*.py")} == {"__init__.py", "__main__.py", "cli.py", "demo.py"}


def test_each_family_of_steps_has_one_handler() -> None:
    from slimline.recipe.registry import handlers

    folders = {path.parent.name for path in (SOURCE / "steps").glob("*/__init__.py")}
    homes = [type(handler).__module__.removeprefix("slimline.steps.") for handler in handlers().values()]
    assert sorted(homes) == sorted(folders)
