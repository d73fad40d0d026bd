"""The Python of README.md and docs/ runs."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import typer
from sklearn.datasets import load_digits

import slimline as sl
from slimline import cli
from slimline.recipe.registry import handlers

torch = pytest.importorskip("torch")
nn = torch.nn

ROOT = Path(__file__).parent.parent
PAGES = [
    pytest.param(page, id=page.name, marks=[pytest.mark.slow] * (page.name in ("README.md", "sparse-training.md")))
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if "```python" in page.read_text()
]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return torch.relu(x + self.b(torch.relu(self.a(x))))


class Network(nn.Module):
    """A network whose layers are called as in the pages."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.layer1, self.layer2, self.layer3 = (nn.Sequential(Block(16)) for _ in range(3))
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        return self.fc(self.layer3(self.layer2(self.layer1(torch.relu(self.conv1(x))))).mean((2, 3)))


def names():
    """What the pages take for granted."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    x, y, x_test, y_test = images[:600], labels[:600], images[600:1200], labels[600:1200]
    module, example = Network().eval(), x[:2]
    return {
        "x": x, "y": y, "x_test": x_test, "y_test": y_test, "module": module, "example_inputs": example,
        "model": sl.load(module, example), "data": sl.Data(train=(x, y), test=(x_test, y_test)),
    }  # fmt: skip


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch, capsys):
    # A network as small as this one has little to gain.
    text = page.read_text().replace(", max_latency=0.3", "")
    if page.name == "parts.md":
        pytest.importorskip("torchvision")
    monkeypatch.chdir(tmp_path)
    known = names()
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        capsys.readouterr()
        exec(compile(block, page.name, "exec"), known)
        said = capsys.readouterr().out
        for figure in re.findall(r"^print\(.*\)\s+# (\d.*?)(?: …)?$", block, re.M):
            assert figure in said, f"{page.name} says that this prints {figure!r}"


def table(heading):
    """The rows of the table in docs/commands.md whose first column is called `heading`."""
    lines = iter((ROOT / "docs" / "commands.md").read_text("utf-8").splitlines())
    for line in lines:
        if line.startswith(f"| {heading} |"):
            break
    next(lines)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in iter(lambda: next(lines, ""), "")]
    return {row[0].strip("`"): row[1:] for row in rows}


def test_the_table_of_steps_is_the_registry():
    expected = {name: [each.config.kind, each.summary, each.reading] for name, each in handlers().items()}
    assert table("step") == expected


def test_the_table_of_commands_is_the_command_line():
    found = typer.main.get_command(cli.app).commands
    listed = {name.split()[1]: row for name, row in table("command").items()}
    assert listed.keys() == found.keys()
    for name, command in found.items():
        options = {option for each in command.params for option in each.opts}
        assert (listed[name][1] == "yes") == ("--json" in options), name
