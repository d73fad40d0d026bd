"""Small programs of views and writes in place, as data: a module runs one, and Hypothesis draws them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

Step = tuple[str, int, int]
"""What is done, to which tensor of those that there are, and a number that says how."""

VIEWS: dict[str, Callable[[Tensor, int], Any]] = {
    "select": lambda t, n: t.select(n % t.dim(), -1 if n % 2 else 0),
    "slice": lambda t, n: t.narrow(t.dim() - 1, 0, max(t.shape[-1] - 1, 1)) if n % 2 else t[..., n % t.shape[-1] :],
    "rows": lambda t, n: t[:1] if n % 2 else t[-1:],
    "steps": lambda t, n: t[..., n % 2 :: 2],
    "transpose": lambda t, n: t.transpose(n % t.dim(), -1),
    "permute": lambda t, n: t.permute(*((d + n) % t.dim() for d in range(t.dim()))),
    "flatten": lambda t, n: t.flatten(-2) if t.dim() > 2 else t.reshape(t.shape),
    "view": lambda t, n: t.contiguous().view(-1, t.shape[-1]),
    "unflatten": lambda t, n: t.unflatten(-1, (-1, 2)) if t.shape[-1] % 2 == 0 else t.unsqueeze(-1),
    "unsqueeze": lambda t, n: t.unsqueeze(n % (t.dim() + 1)).squeeze(n % (t.dim() + 1)),
    "chunk": lambda t, n: t.chunk(2, -1)[n % len(t.chunk(2, -1))],
    "split": lambda t, n: t.split([1, t.shape[-1] - 1], -1)[1] if t.shape[-1] > 1 else t,
    "unbind": lambda t, n: t.unbind(-1)[n % t.shape[-1]],
    "diagonal": lambda t, n: t.diagonal(0, -2, -1) if t.dim() > 2 else t,
    "expand": lambda t, n: t.unsqueeze(-1).expand(*t.shape, 1).squeeze(-1),
    "detach": lambda t, n: t.detach(),
    "dropout": lambda t, n: nn.functional.dropout(t, 0.5, training=False),
    "to": lambda t, n: t.to(torch.float32),
    "wide": lambda t, n: t.unsqueeze(-1).expand(*t.shape, 3),
    "clone": lambda t, n: t.clone(),
    "sum": lambda t, n: t + n,
}


def _set(t: Tensor, n: int) -> None:
    t[..., n % t.shape[-1] :] += 0.5 * n


def _put(t: Tensor, n: int) -> None:
    t.index_put_((torch.tensor([0]),), torch.full(t.shape[1:], float(n)))


WRITES: dict[str, Callable[[Tensor, int], Any]] = {
    "add_": lambda t, n: t.add_(n),
    "mul_": lambda t, n: t.mul_(1.5),
    "relu_": lambda t, n: t.relu_(),
    "zero_": lambda t, n: t.zero_(),
    "fill_": lambda t, n: t.fill_(n),
    "copy_": lambda t, n: t.copy_(t.clone().flip(-1) * 2),
    "copy_ row": lambda t, n: t.copy_(torch.arange(float(t.shape[-1]))),
    "masked_fill_": lambda t, n: t.masked_fill_(t > 0.3, n),
    "masked": lambda t, n: t.__setitem__(t > 0.5, float(n)),
    "clamp_": lambda t, n: t.clamp_(-0.5, 0.5),
    "setitem": _set,
    "index_put_": _put,
    "sub_": lambda t, n: t.sub_(t.clone().amax(-1, keepdim=True)),
    "tanh": lambda t, n: torch.tanh(t, out=t) if not t.requires_grad else t.tanh_(),
    "unsqueeze_": lambda t, n: t.unsqueeze_(0).squeeze_(0),
}


class Program(nn.Module):
    """Runs a program on two tensors, one of which it makes of the other, and mixes all that there is at the end."""

    def __init__(self, steps: list[Step], buffer: bool = False) -> None:
        super().__init__()
        self.first, self.steps, self.writes_input = nn.Linear(6, 6), steps, buffer
        self.register_buffer("table", torch.linspace(-1, 1, 24).reshape(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        there = [
            self.first(x),
            x if self.writes_input else x.clone(),
            self.table if self.writes_input else self.table + 0,
        ]
        for what, which, number in self.steps:
            tensor = there[which % len(there)]
            if what in WRITES:
                if not (what == "tanh" and tensor.dim() == 0) and 0 not in tensor.stride():
                    WRITES[what](tensor, number)
            elif tensor.dim() > 1:
                there.append(VIEWS[what](tensor, number))
        mixed = [(1 + k) * (t * torch.linspace(0.5, 1, t.shape[-1])).mean() for k, t in enumerate(there) if t.dim()]
        return self.first(there[0].reshape(x.shape[0], -1, 6)).flatten(1) + torch.stack(mixed).sum()


def programs(length: int) -> st.SearchStrategy[list[Step]]:
    """Programs of up to `length` steps, at least one of which writes."""
    names = st.one_of(st.sampled_from(sorted(VIEWS)), st.sampled_from(sorted(WRITES)))
    step = st.tuples(names, st.integers(0, 12), st.integers(0, 5))
    return st.lists(step, min_size=2, max_size=length).filter(lambda steps: any(s[0] in WRITES for s in steps))
