"""Recurrent operators stay whole while a model is traced.

torch knows the shapes of what LSTM, GRU and plain RNN give only by running every step of every sequence, some
milliseconds each: 24 s for three layers of 160 steps. Here their shapes are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._decomp import decomposition_table
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

_aten = torch.ops.aten
_KEYS = (DispatchKey.Autograd, DispatchKey.CompositeImplicitAutograd)


@contextmanager
def whole() -> Iterator[None]:
    """While it lasts, recurrent operators on fake tensors answer by shape alone; on real ones they compute."""
    before = {operator: (dict(operator.py_kernels), decomposition_table.get(operator)) for operator in _SHAPES}
    for operator, shapes in _SHAPES.items():
        for key in _KEYS:
            operator.py_kernels[key] = _by_shape(shapes, operator.py_kernels.get(key))
        decomposition_table[operator] = _by_shape(shapes, decomposition_table.get(operator))
        operator._dispatch_cache.clear()
    try:
        yield
    finally:
        for operator, (kernels, decomposition) in before.items():
            operator.py_kernels.clear()
            operator.py_kernels.update(kernels)
            del decomposition_table[operator]
            if decomposition is not None:
                decomposition_table[operator] = decomposition
            operator._dispatch_cache.clear()


def _by_shape(shapes: Callable[..., Any], run: Any) -> Callable[..., Any]:
    def answer(x: Tensor, *args: Any) -> Any:
        return shapes(x, *args) if run is None or _fake(x) else run(x, *args)

    return answer


def _fake(x: Tensor) -> bool:
    """Whether a tensor, below what wraps it, holds no numbers."""
    while isinstance(x, FunctionalTensor) or torch._is_functional_tensor(x):
        x = x.elem if isinstance(x, FunctionalTensor) else torch._from_functional_tensor(x)
    return isinstance(x, FakeTensor)


def _lstm(
    x: Tensor, hx: Sequence[Tensor], params: Sequence[Tensor], biases: bool, layers: int, dropout: float, train: bool,
    bidirectional: bool, batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _sequence(x, hx[0], bidirectional), *(torch.empty_like(state) for state in hx[:2])  # type: ignore[return-value]


def _single(
    x: Tensor, hx: Tensor, params: Sequence[Tensor], biases: bool, layers: int, dropout: float, train: bool,
    bidirectional: bool, batch_first: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _sequence(x, hx, bidirectional), torch.empty_like(hx)


def _sequence(x: Tensor, state: Tensor, bidirectional: bool) -> Tensor:
    """What all steps give: `x` with the width of the hidden state, once for each direction."""
    return x.new_empty((*x.shape[:-1], state.shape[-1] * (1 + bidirectional)))


_SHAPES: dict[Any, Callable[..., Any]] = {
    _aten.lstm.input: _lstm,
    _aten.gru.input: _single,
    _aten.rnn_tanh.input: _single,
    _aten.rnn_relu.input: _single,
}
