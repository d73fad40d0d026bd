"""Rounding to the grid ``int8_per_row`` of `slimline.methods.dynamic`, in standard operators: ONNX has none for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from slimline.frameworks.onnx.native import Editor
from slimline.frameworks.onnx.operators import OWN, attribute, standard, stored
from slimline.methods.dynamic import HIGH, LEVELS, LOW, NARROWEST

LIMITS = f"{LOW} {HIGH}"
"""The note on the last of the operators."""
_AXES_ARE_INPUTS = 18
"""The version of ONNX since which reductions take their axes so."""


@dataclass(frozen=True, eq=False)
class _Term:
    """An operator and its operands: terms, numbers, axes, or None for what is rounded."""

    operator: str
    operands: tuple[_Term | float | list[int] | None, ...]
    keeps: bool = False


def _rounded(axes: Sequence[int]) -> _Term:
    low = _Term("Min", (_Term("ReduceMin", (None, list(axes)), keeps=True), 0.0))
    high = _Term("Max", (_Term("ReduceMax", (None, list(axes)), keeps=True), 0.0))
    factor = _Term("Div", (float(LEVELS), _Term("Max", (_Term("Sub", (high, low)), NARROWEST))))
    first, last = _Term("Mul", (low, factor)), _Term("Mul", (high, factor))
    errors = _Term("Add", (_Term("Add", (first, float(LOW))), _Term("Add", (last, float(HIGH)))))
    ends = _Term("Sub", (float(LOW), first)), _Term("Sub", (float(HIGH), last))
    zero = _Term("Where", (_Term("Greater", (errors, 0.0)), *ends))
    zero = _Term("Round", (_Term("Clip", (zero, float(LOW), float(HIGH))),))
    whole = _Term("Round", (_Term("Mul", (None, factor)),))
    codes = _Term("Clip", (_Term("Add", (whole, zero)), float(LOW), float(HIGH)))
    return _Term("Mul", (_Term("Sub", (codes, zero)), _Term("Div", (1.0, factor))))


def round_rows(editor: Editor, x: ir.Value, axes: Sequence[int]) -> ir.Value:
    """New operators behind `x` that round it to one grid for all numbers along `axes`; the value they end in."""
    source = x.producer()
    at, place = (editor.first(), editor.insert) if source is None else (source, editor.append)
    values: dict[_Term, ir.Value] = {}

    def value(term: _Term | float | list[int] | None) -> ir.Value:
        nonlocal at
        if term is None:
            return x
        if isinstance(term, float):
            return editor.constant(np.array(term, np.float32), f"{x.name}_number")
        if isinstance(term, list):
            return editor.constant(np.array(term, np.int64), f"{x.name}_axes")
        if term not in values:
            attributes: dict[str, object] = {"keepdims": 1} if term.keeps else {}
            operands = term.operands
            if term.keeps and editor.opset < _AXES_ARE_INPUTS:
                attributes, operands = {**attributes, "axes": operands[1]}, operands[:1]
            inputs = [value(each) for each in operands]
            values[term] = place(at, term.operator, inputs, attributes, f"{x.name}_{term.operator}")
            own = values[term].producer()
            assert own is not None
            at = at if source is None else own
        return values[term]

    end = value(_rounded(axes))
    own = end.producer()
    assert own is not None
    own.metadata_props[OWN] = LIMITS
    return end


def row_source(end: ir.Value | None, axes: Sequence[int]) -> ir.Value | None:
    """What `end` is made of, if by `round_rows`; else None."""
    node = None if end is None else end.producer()
    if node is None or node.metadata_props.get(OWN) != LIMITS:
        return None
    values: dict[_Term | None, ir.Value] = {}

    def same(term: _Term | float | list[int] | None, value: ir.Value | None) -> bool:
        if value is None:
            return False
        if isinstance(term, float | list):
            array = stored(value)
            return array is not None and np.array_equal(array, np.asarray(term, array.dtype))
        if term in values or term is None:
            return values.setdefault(term, value) is value
        values[term] = value
        own, operands = value.producer(), term.operands
        if own is None or own.op_type != term.operator or not standard(own):
            return False
        if term.keeps and (attribute(own, "keepdims", 1) != 1 or attribute(own, "noop_with_empty_axes", 0)):
            return False
        if term.keeps and len(own.inputs) == 1:
            if list(attribute(own, "axes", ())) != operands[1]:
                return False
            operands = operands[:1]
        pairs = zip(operands, own.inputs, strict=False)
        return len(own.inputs) == len(operands) and all(same(*pair) for pair in pairs)

    return values[None] if same(_rounded(axes), end) else None
