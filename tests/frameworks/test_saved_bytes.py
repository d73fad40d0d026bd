"""What is saved: bytes that depend on the model alone, and names that are read back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import slimline as sl
from slimline.basics.errors import SlimlineError
from slimline.files.strictjson import Malformed
from slimline.frameworks.torch import program

X = np.random.default_rng(0).standard_normal((2, 3, 9, 9)).astype(np.float32)

TORCH = """
import sys
from pathlib import Path
import numpy as np, torch, slimline as sl
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.first, self.last = nn.Linear(8, 4), nn.Linear(8, 4, bias=False)
        self.last.weight = self.first.weight
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.register_buffer("scale", torch.arange(4.0), persistent=False)
    def forward(self, x):
        x = self.bn(self.conv(x)).relu().mean((2, 3))
        a, b = (self.first(x) * self.scale).chunk(2, 1)
        y = self.last(torch.cat([a, b, b, a], 1)) + torch.tensor([1.0, 2.0, 3.0, 4.0])
        with torch.no_grad():
            w = torch.maximum(y, y * 2).max(1)[0]
        return self.attention(y[:, None], y[:, None], y[:, None])[0][:, 0], w
torch.manual_seed(0)
garbage = [object() for _ in range(int(sys.argv[2]))]
x = np.random.default_rng(0).standard_normal((2, 3, 9, 9)).astype("float32")
model = sl.load(Net(), x)
"""
KERAS = """
import sys
from pathlib import Path
import numpy as np, slimline as sl, slimline.frameworks.keras
import keras
from keras import layers as L
garbage = [object() for _ in range(int(sys.argv[2]))]
keras.utils.set_random_seed(0)
shared = keras.initializers.GlorotUniform(seed=1)
x = keras.Input((8,), name="x")
y = L.Dense(4, activation="gelu", name="first", kernel_initializer=shared)(x) * 2.0
model = sl.load(keras.Model(x, L.Dense(2, name="last", kernel_initializer=shared)(y), name="net"))
"""
SAVE = """
suffix, folder = model.adapter.suffix, Path(sys.argv[1])
model.save(folder / ("a" + suffix))
sl.load(folder / ("a" + suffix)).save(folder / ("b" + suffix))
"""


@pytest.mark.parametrize("code", [TORCH, KERAS], ids=["torch", "keras"])
def test_bytes_are_the_model_s_alone_in_every_process_and_after_every_load(code: str, tmp_path: Path) -> None:
    contents = set()
    for seed in (1, 77):
        folder = tmp_path / ("somewhere" if seed == 1 else "deep/and/elsewhere")
        folder.mkdir(parents=True)
        (folder / "script.py").write_text(code + SAVE)
        environment = {**os.environ, "PYTHONHASHSEED": str(seed), "TZ": f"UTC+{seed % 9}"}
        subprocess.run(
            [sys.executable, "script.py", str(folder), str(seed * 999)], cwd=folder, env=environment, check=True
        )
        contents |= {p.read_bytes() for p in folder.iterdir() if p.suffix in (".pt2", ".keras")}
    assert len(contents) == 1
    (content,) = contents
    for trace in (str(tmp_path), "script.py", "site-packages", "stack_trace", "from_node", "2026-"):
        assert trace.encode() not in content, trace


class Named(nn.Module):
    """A layer, a parameter and a buffer of one name, and the layer again within another."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.Linear(4, 4))
        self.add_module("outer", nn.Sequential())
        self.outer.add_module(name + "x", nn.Linear(4, 4))
        self.register_buffer("b" + name, torch.ones(4))
        self.register_parameter("p" + name, nn.Parameter(torch.ones(4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self._modules[self.name](x).relu() * self._buffers["b" + self.name]
        return self.outer(y) + self._parameters["p" + self.name]


def _round_trip(name: str, path: Path) -> bool:
    """Whether a model with such names is captured; what is captured is saved and read back equal."""
    x = np.ones((2, 4), np.float32)
    torch.manual_seed(0)
    try:
        module = Named(name)
    except (KeyError, TypeError):  # not a name that torch lets a module have
        return False
    try:
        model = sl.load(module, x)
    except SlimlineError as error:
        assert "\n" not in str(error)
        return False
    model.save(path)
    back = sl.load(path)
    assert list(back.parameters()) == list(model.parameters())
    np.testing.assert_array_equal(back.predict(x), model.predict(x))
    assert [n.layer for n in back.graph.nodes] == [n.layer for n in model.graph.nodes]
    return True


@pytest.mark.parametrize(
    "name",
    ["a[0]", "f(x)", "a,b", "a;b", "it's", "größe", "日本", "a b", "x" * 300, "%41", "a:b", "{x}", "$a", "a@1", "self"],
)
def test_odd_names_are_saved_and_read_back(name: str, tmp_path: Path) -> None:
    assert _round_trip(name, tmp_path / "model.pt2")


@pytest.mark.parametrize("name", ['q"t', "back\\slash", "new\nline", "class", "\u202e", "\x07"])
def test_names_that_no_graph_can_hold_are_refused_when_the_module_is_loaded(name: str, tmp_path: Path) -> None:
    with pytest.raises(SlimlineError, match="rename"):
        sl.load(Named(name), np.ones((2, 4), np.float32))


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(exclude_characters="."), min_size=1, max_size=12))
def test_whatever_is_saved_loads(tmp_path: Path, name: str) -> None:
    _round_trip(name, tmp_path / "model.pt2")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(max_size=40))
def test_a_name_that_is_allowed_is_harmless_in_source(name: str) -> None:
    assert program.unescaped(program.escaped(name)) == name if name.isprintable() else True
    assert not set(program.escaped(name)) & set("[](),;")
    try:
        program.path(name)
    except Malformed:
        return
    assert eval(f'"{name}"', {"__builtins__": {}}) == name  # as torch writes it


@pytest.mark.parametrize("name", ["a.b", "a b", "größe", "a(b)", "a[0];c", "x" * 200, 'q"t', "a,b", "it's"])
def test_odd_names_of_keras_layers_are_saved_and_read_back_or_refused_when_saved(name: str, tmp_path: Path) -> None:
    import slimline.frameworks.keras  # noqa: F401  chooses the backend

    import keras  # isort: skip

    x = keras.Input((4,))
    y = keras.layers.Dense(3, name=name)(x)
    try:
        model = sl.load(keras.Model(x, keras.layers.Dense(2, name="last")(y)))
        model.save(tmp_path / "model.keras")
    except SlimlineError as error:
        assert "\n" not in str(error)
        return
    again = sl.load(tmp_path / "model.keras")
    assert list(again.parameters()) == list(model.parameters())
    np.testing.assert_array_equal(again.predict(*model.example), model.predict(*model.example))
