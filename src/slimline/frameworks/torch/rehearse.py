"""A program from a file run with shapes alone, before any number of it is computed."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)

from slimline.basics.errors import first_line
from slimline.files.strictjson import Malformed
from slimline.frameworks.base import Array
from slimline.frameworks.torch.native import Native, tensors, to_tensors

_UNKNOWN = (
    DynamicOutputShapeException,
    DataDependentOutputException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
FREE_BYTES, RATIO, COUNT = 256 << 20, 256, 2**62
"""A value may take so many bytes, or so many times those of weights and inputs if that is more."""
PIECES = 2**17
"""Into how many tensors all operators together may take tensors apart."""


def rehearse(native: Native, example: Sequence[Array]) -> None:
    """Hold every operator against its inputs' shapes and types.

    Raises
    ------
    Malformed : an operator that does not take what it is given, or a value so large that no honest file has it.
    """
    inputs = to_tensors(example)
    if len(inputs) != len(native.graph.find_nodes(op="placeholder")):
        raise Malformed(f"takes {len(native.graph.find_nodes(op='placeholder'))} inputs and has {len(inputs)} examples")
    stored = [*tensors(native).values(), *inputs]
    limit = max(FREE_BYTES, RATIO * sum(t.numel() * t.element_size() for t in stored))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with _quiet(), mode, torch.no_grad():
            _Rehearsal(native, limit).run(*map(mode.from_tensor, inputs))
    except Malformed as reason:  # fx has written where it happened behind the sentence
        raise Malformed(str(reason).splitlines()[0]) from reason
    except _UNKNOWN:  # sizes that the numbers decide: from here on only a real run can tell
        return
    except Exception as reason:  # shape functions of torch raise whatever they like
        raise Malformed(f"does not run on its example inputs ({first_line(reason)[:200]})") from reason


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from writing the traceback of what is raised to the user's terminal."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before = log.disabled
    log.disabled = True
    try:
        yield
    finally:
        log.disabled = before


class _Rehearsal(fx.Interpreter):
    def __init__(self, native: Native, limit: int) -> None:
        super().__init__(native)
        self._limit = limit
        self._pieces = 0

    def run_node(self, n: fx.Node) -> Any:
        if isinstance(n.target, torch._ops.OpOverload):
            self._pieces += _pieces(n.target, *self.fetch_args_kwargs_from_env(n))
            if self._pieces > PIECES:
                raise Malformed(f"takes tensors apart into more than {PIECES:,} at {n.name}")
        result = super().run_node(n)
        for value in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(value, int) and abs(value) > COUNT:
                raise Malformed(f"counts to {len(bin(value)):,} bits at {n.name}")
            if isinstance(value, Tensor):
                size = math.prod(value.shape) * value.element_size()
                if isinstance(size, int) and size > self._limit:
                    raise Malformed(f"makes a value of {size:,} bytes at {n.name}: export it with smaller inputs")
        return result


def _pieces(target: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """How many tensors an operator gives that cuts one along a dimension, at most; 0 for others."""
    schema = target._schema
    if not (len(schema.returns) == 1 and str(schema.returns[0].type) == "List[Tensor]" and args):
        return 0
    x = args[0]
    passed = dict(zip((a.name for a in schema.arguments), args, strict=False)) | dict(kwargs)
    if not isinstance(x, Tensor) or not x.dim():
        return 0
    dim = passed.get("dim", 0)
    longest = max(x.shape) if "dim" not in {a.name for a in schema.arguments} else x.shape[dim]
    for name in ("chunks", "sections"):
        if isinstance(passed.get(name), int):
            return min(int(longest), int(passed[name]))
    if isinstance(passed.get("split_size"), int):
        return -(-int(longest) // max(int(passed["split_size"]), 1))
    return int(longest) if schema.name == "aten::unbind" else 0
