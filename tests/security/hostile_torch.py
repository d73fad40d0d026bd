"""A small program of `torch.export.save`, and the tools to make it hostile."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

Members = dict[str, bytes]
MODEL, WEIGHTS, CONSTANTS = "models/model.json", "data/weights/model_weights_config.json", "data/constants/"
CONSTANTS_CONFIG = CONSTANTS + "model_constants_config.json"
SAMPLES = "data/sample_inputs/model.pt"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x).relu() + torch.tensor([1.0, 2.0, 3.0, 4.0])
        a, b = y.chunk(2, 1)
        return self.last(torch.cat([b, a], 1).reshape(x.shape[0], -1))


def foreign(path: Path) -> Path:
    """A benign file as torch writes it, for a free batch."""
    torch.manual_seed(0)
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(Net().eval(), (torch.ones(2, 8),), dynamic_shapes=shapes)
    torch.export.save(program, path)
    return path


def members(path: Path) -> tuple[str, Members]:
    """The folder in the archive, and what is in it."""
    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].partition("/")[0]
        return root, {n.partition("/")[2]: archive.read(n) for n in archive.namelist()}


def write(path: Path, root: str, held: Members) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in held.items():
            archive.writestr(f"{root}/{name}", content)


def in_json(name: str, change: Callable[[Any], Any]) -> Callable[[Members], None]:
    """A change of the JSON in one member."""

    def apply(held: Members) -> None:
        value = json.loads(held[name])
        change(value)
        held[name] = json.dumps(value).encode()

    return apply


def nodes(program: Any) -> list[Any]:
    return program["graph_module"]["graph"]["nodes"]


class Bomb:
    """Unpickling it makes the canary file."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> Any:
        return open, (self.canary, "w")


def saved(value: Any) -> bytes:
    """As `torch.save` writes it."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def pickled(value: Any) -> bytes:
    return pickle.dumps(value)
