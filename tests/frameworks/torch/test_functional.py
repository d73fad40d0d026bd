"""Writes in place: what is captured, folded and pruned computes what the module does, whoever shares its memory."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

from slimline.basics.errors import SlimlineError
from slimline.frameworks.base import adapter
from slimline.frameworks.torch.operators import writes
from slimline.graph.edits import FoldNorms
from slimline.model import Model
from slimline.model.lowering import write
from slimline.runtimes.onnxruntime import runtime
from slimline.steps.channels.selection import plan
from slimline.steps.channels.step import ChannelPruning
from tests.frameworks.torch.programs import Program, Step, programs

TORCH = adapter("torch")
TOKENS = torch.randn((5, 4, 8), generator=torch.Generator().manual_seed(0))
Function = Callable[[Any, Tensor], Tensor]


class Block(nn.Module):
    """A function between two layers; both and a buffer are its own."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.function = nn.Linear(8, 8), nn.Linear(8, 3), function
        self.register_buffer("table", torch.linspace(-1, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self, self.first(x)))


def relative_positions(b, x):
    scores = x @ x.transpose(1, 2)
    scores[:, 1:, 1:] += torch.linspace(0, 1, 9).reshape(3, 3)
    return scores.softmax(-1) @ x


def zeroed_slice(b, x):
    bias = b.first.bias.clone()
    bias[2:5] = 0
    return x * bias


def two_views(b, x):
    left, right = x[..., :6], x[..., 2:]
    left.mul_(2)
    right.add_(1)
    return x + left.sum(-1, keepdim=True)


def apart(b, x):
    q, k = x.unflatten(-1, (2, 4)).unbind(2)
    q *= 0.5
    return torch.cat([q, k], -1)


def chain(b, x):
    x.view(-1, 4, 2, 4).transpose(1, 2).select(1, 1).narrow(2, 1, 2).squeeze().fill_(3)
    return x


def view_taken_before(b, x):
    flat = x.flatten(1)
    x[:, 0].zero_()
    return x + flat.mean(-1)[:, None, None]


def first_and_last(b, x):
    x[-1] += 1
    x[:1].mul_(2)
    x[1:] -= 0.5
    return x


def every_other(b, x):
    x[..., ::2] = x[..., 1::2].relu()
    return x


def diagonals(b, x):
    x[..., :4].diagonal(0, 1, 2).zero_()
    return x


def no_grad_weight(b, x):
    with torch.no_grad():
        b.first.weight.clamp_(min=0)
    return nn.functional.linear(x, b.first.weight)


def buffer(b, x):
    b.table[:3] = 2
    return x * b.table


def layouts(b, x):
    y = x.clone()
    y.transpose_(1, 2).unsqueeze_(1)[:, 0, 3] = 1
    return y.squeeze(1).mT


def dropped(b, x):
    y = nn.functional.dropout(x, 0.5, b.training)
    y += 1
    return x * y


def types(b, x):
    counts = torch.zeros(8, dtype=torch.int64)
    counts[2:] += 3
    double = x.to(torch.float64)
    double[..., 0] = 1
    x.add_(double.new_ones(()))
    return x * counts + double.float()


def masks(b, x):
    x[x > 0.5] = 0.25
    x[:, 1].masked_fill_(x[:, 2] < 0, -1)
    return x


def repeated(b, x):
    row = x[:, :1].clone()
    row.expand(-1, 4, -1)[:, 2].mul_(2)
    return x + row


def cut_edges(b, x):
    x.add_(1)
    return nn.functional.pad(x, (0, 0, -1, 1)) + x


BLOCKS: dict[str, Function] = {
    f.__name__: f
    for f in (
        relative_positions, zeroed_slice, two_views, apart, chain, view_taken_before, first_and_last, every_other,
        diagonals, no_grad_weight, buffer, layouts, dropped, types, masks, repeated,
        cut_edges,
    )
}  # fmt: skip


def _model(module: nn.Module, x: Tensor) -> Model:
    native, example = TORCH.load(copy.deepcopy(module), (x[:2].numpy().copy(),))
    return Model(TORCH, native, example)


def _eager(module: nn.Module, x: Tensor) -> np.ndarray:
    with torch.no_grad():
        return copy.deepcopy(module)(x.clone()).numpy()


def _functional(native: nn.Module) -> bool:
    graphs = [m.graph for m in native.modules() if isinstance(m, torch.fx.GraphModule)]
    return not any(writes(node) for graph in graphs for node in graph.nodes)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_write_through_a_view_reaches_all_that_share_its_memory(name: str, tmp_path: Path) -> None:
    module = Block(BLOCKS[name]).eval()
    model = _model(module, TOKENS)
    assert _functional(model.native)
    sizes = (5, 2) if model.native.fixed_batch is None else (2,)  # a part of the batch that is written fixes its size
    assert len(sizes) == 2 or name == "first_and_last"
    write(runtime, model, tmp_path / "m.onnx")
    session = runtime.load(tmp_path / "m.onnx")
    folded = model.edit(FoldNorms())
    for rows in sizes:
        x, wish = TOKENS[:rows], _eager(module, TOKENS[:rows])
        for found in (model.predict(x.numpy()), TORCH.outputs(folded, (x.numpy(),))[0], session.run((x.numpy(),))):
            np.testing.assert_allclose(found, wish, atol=1e-5)


@pytest.mark.parametrize("name", ["apart", "two_views", "every_other", "zeroed_slice", "masks"])
def test_axes_pass_through_what_is_written(name: str) -> None:
    """No axis is frozen that was free: what is removed computes what is masked."""
    model = _model(Block(BLOCKS[name]), TOKENS)
    pruning = plan(model, ChannelPruning(ratio=0.3, criterion="l2", factors="all"))
    assert not [f for f in pruning.units.frozen if "rule" in f.reason]
    assert pruning.parameters < pruning.graph.size
    removed, masked = pruning.apply(model), pruning.mask(model)
    np.testing.assert_allclose(removed.predict(TOKENS.numpy()), masked.predict(TOKENS.numpy()), atol=1e-5)


@pytest.mark.parametrize("name", ["two_views", "dropped", "relative_positions", "layouts"])
def test_gradients_are_those_of_the_module(name: str) -> None:
    module = Block(BLOCKS[name]).eval()
    model = _model(module, TOKENS)
    module(TOKENS).square().mean().backward()
    model.native(TOKENS).square().mean().backward()
    wish = dict(module.named_parameters())
    for parameter, tensor in model.native.named_parameters():
        torch.testing.assert_close(tensor.grad, wish[parameter].grad, rtol=1e-4, atol=1e-6)


def test_a_weight_that_is_clamped_without_gradients_still_learns() -> None:
    model = _model(Block(no_grad_weight), TOKENS)
    model.native(TOKENS).square().mean().backward()
    gradient = model.native.get_parameter("first.weight").grad
    assert gradient is not None and bool(gradient.any())


class Writes(nn.Module):
    """Writes into its input and into its buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.linspace(-1, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        x[:, 1:] *= 2
        self.table.add_(1)
        return x * self.table


def test_inputs_and_buffers_are_left_as_they_are() -> None:
    module = Writes().eval()
    wish = _eager(module, TOKENS)
    model, x = _model(module, TOKENS), TOKENS.numpy().copy()
    for _ in range(2):
        np.testing.assert_allclose(model.predict(x), wish, atol=1e-5)
    np.testing.assert_array_equal(x, TOKENS.numpy())


def test_a_program_with_writes_in_place_loads_and_names_stay() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)).eval()
    program = torch.export.export(module, (TOKENS[:2],))
    assert any(map(writes, program.graph.nodes))  # as slimline stored them once
    native, _ = TORCH.load(program, None)
    assert "relu_" in {node.name for node in native.graph.nodes} and _functional(native)


def _windows(b: nn.Module, x: Tensor) -> Tensor:
    x.unfold(2, 2, 2).mul_(2)
    return x


def test_a_write_without_functional_form_is_refused_in_one_sentence() -> None:
    with pytest.raises(SlimlineError, match=r"aten.mul .* unfold") as refused:
        _model(Block(_windows), TOKENS)
    assert "\n" not in str(refused.value)


def _same(steps: list[Step], shared: bool, path: Path | None) -> None:
    """Captured, folded and, at `path`, exported, a program computes what it does in torch, at two batch sizes."""
    torch.manual_seed(0)
    module, x = Program(steps, shared).eval(), torch.randn(3, 4, 6)
    try:
        wish = {rows: _eager(module, x[:rows]) for rows in (3, 1)}
    except RuntimeError:  # no program of torch
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = _model(module, x)
    assert _functional(model.native)
    if model.native.fixed_batch is not None:
        return
    folded = model.edit(FoldNorms())
    if path is not None:
        write(runtime, model, path)
    for rows, expected in wish.items():
        inputs = (x[:rows].numpy().copy(),)
        found = [TORCH.outputs(native, inputs)[0] for native in (model.native, folded)]
        found += [runtime.load(path).run(inputs)] if path is not None else []
        for answer in found:
            np.testing.assert_allclose(answer, expected, rtol=1e-4, atol=1e-4)


def _drawn(steps: int, count: int, shared: bool, path: Path | None) -> None:
    quick = settings(
        deadline=None,
        derandomize=True,
        database=None,
        max_examples=count,
        suppress_health_check=list(HealthCheck),
    )
    quick(given(programs(steps))(lambda drawn: _same(drawn, shared, path)))()


def test_any_program_of_views_and_writes_is_captured_for_what_it_computes(tmp_path: Path) -> None:
    _drawn(6, 6, False, tmp_path / "program.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True])
def test_many_programs(shared: bool, tmp_path: Path) -> None:
    _drawn(9, 100, shared, None)
    _drawn(7, 25, shared, tmp_path / "program.onnx")
