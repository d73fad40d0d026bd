"""The cases that come with ONNX, one or more of each operator, as oracles for whoever translates ONNX."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from typing import Any

import numpy as np
import onnx

DTYPES = {"float32", "int64", "int32", "bool"}


@cache
def _collected() -> tuple[Any, ...]:
    with np.errstate(all="ignore"):
        from onnx.backend.test.case.node import collect_testcases

        return tuple(list[Any](collect_testcases(None)))


def cases_of(operators: Collection[str]) -> dict[str, Any]:
    """By name, those of nothing but these operators, on numbers that networks hold."""
    return {
        case.name: case
        for case in _collected()
        if {node.op_type for node in case.model.graph.node} <= set(operators)
        and all(getattr(x, "dtype", np.dtype("O")).name in DTYPES for s in case.data_sets[0] for x in s)
    }


def first_input_free(case: Any) -> onnx.ModelProto:
    """The model of a case with all inputs but the first stored in it."""
    proto = onnx.ModelProto()
    proto.CopyFrom(case.model)
    values, inputs = list(proto.graph.input), case.data_sets[0][0]
    del proto.graph.input[1:]
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(x, value.name) for value, x in zip(values[1:], inputs[1:], strict=True)
    )
    return proto
