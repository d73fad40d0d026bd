"""Sizes as formulas: the grammar in which a program may write them, read without evaluating a text.

torch hands such a text to sympy's parser, which is Python's `eval`. Here it is read by a grammar of integers, symbols
``s0`` or ``u0`` and the arithmetic that torch writes; what is built is bounded, so that a short text cannot stand for
a number or a sum without end.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import sympy
from torch.utils._sympy import functions as torch_functions

from slimline.files.strictjson import Malformed

LENGTH, PARTS, TERMS, DEGREE, LARGEST = 4000, 400, 2000, 8, 2**63
SYMBOL = re.compile(r"(s|u|zuf|zf|f|i|x|y|z|r|q|p)\d{1,5}")
_TEXT = re.compile(r"[A-Za-z0-9_ ,.()'*/+\-=%<>!&|~]*")
_ASSUMPTIONS = ("integer", "positive", "nonnegative", "negative", "nonpositive", "nonzero", "zero", "real", "finite")
_OWN = (
    *("FloorDiv", "CleanDiv", "CeilDiv", "ModularIndexing", "PythonMod", "Mod", "CeilToInt", "FloorToInt"),
    *("TruncToInt", "TruncToFloat", "RoundToInt", "IntTrueDiv", "FloatTrueDiv", "ToFloat", "Where", "Identity"),
)
_SYMPY = (
    *("Add", "Mul", "Max", "Min", "And", "Or", "Not", "Equality", "Unequality", "Eq", "Ne", "StrictLessThan"),
    *("LessThan", "StrictGreaterThan", "GreaterThan", "Lt", "Le", "Gt", "Ge"),
)
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: getattr(torch_functions, name) for name in _OWN},
    **{name: getattr(sympy, name) for name in _SYMPY},
}
_BINARY: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: torch_functions.FloorDiv,
    ast.Mod: torch_functions.Mod,
}
_COMPARE: dict[type, Callable[..., Any]] = {
    ast.Eq: sympy.Eq,
    ast.NotEq: sympy.Ne,
    ast.Lt: sympy.Lt,
    ast.LtE: sympy.Le,
    ast.Gt: sympy.Gt,
    ast.GtE: sympy.Ge,
}
_SORTED = (sympy.Add, sympy.Mul, sympy.Max, sympy.Min, sympy.And, sympy.Or)


class Expressions:
    """Reads the formulas of one program, in which a symbol is always the same symbol."""

    def __init__(self) -> None:
        self._symbols: dict[str, sympy.Symbol] = {}
        self._parts = 0

    def parse(self, text: str) -> Any:
        """The formula that `text` writes.

        Raises
        ------
        Malformed : anything that is not in the grammar, or stands for more than `TERMS` terms, a power above
            `DEGREE`, or a number of 2 ** 63 or more.
        """
        if len(text) > LENGTH or not _TEXT.fullmatch(text):
            raise _refused(text)
        try:
            tree = ast.parse(text.strip(), mode="eval").body
            self._parts = 0
            return self._build(tree)[0]
        except Malformed:
            raise
        except (SyntaxError, ValueError, TypeError, ArithmeticError, AttributeError, RecursionError, MemoryError) as e:
            raise _refused(text) from e

    def _build(self, tree: ast.AST) -> tuple[Any, int]:
        """A formula, and of how many terms it is when multiplied out."""
        self._parts += 1
        if self._parts > PARTS:
            raise Malformed("holds a formula of too many parts")
        match tree:
            case ast.Constant(value=bool(value)):
                return sympy.true if value else sympy.false, 1
            case ast.Constant(value=int(value)) if abs(value) < LARGEST:
                return sympy.Integer(value), 1
            case ast.Constant(value=float(value)):
                return _bounded(sympy.Float(value)), 1
            case ast.Name(id="true" | "false" as word):
                return getattr(sympy, word), 1
            case ast.Name(id=name):
                return self._symbol(name, {"integer": True}), 1
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                value, terms = self._build(operand)
                return -value, terms
            case ast.BinOp(left=left, op=ast.Pow(), right=right):
                return self._power(left, right)
            case ast.BinOp(left=left, op=kind, right=right) if type(kind) in _BINARY:
                product = isinstance(kind, ast.Mult)
                return self._apply(_BINARY[type(kind)], [left, right], product)
            case ast.Compare(left=left, ops=[kind], comparators=[right]) if type(kind) in _COMPARE:
                return self._apply(_COMPARE[type(kind)], [left, right])
            case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str(name))], keywords=keywords):
                return self._symbol(name, _assumed(keywords)), 1
            case ast.Call(func=ast.Name(id="Float"), args=[ast.Constant(value=str(digits))], keywords=keywords):
                return _float(digits, keywords), 1
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
                return self._call(name, arguments)
            case _:
                raise _refused(ast.unparse(tree))

    def _call(self, name: str, arguments: Sequence[ast.AST]) -> tuple[Any, int]:
        if name == "Integer" and len(arguments) == 1:
            value, terms = self._build(arguments[0])
            if not value.is_Integer:
                raise _refused(name)
            return value, terms
        if name == "Rational" and len(arguments) == 2:
            above, below = (self._build(a)[0] for a in arguments)
            if not (above.is_Integer and below.is_Integer and below != 0):
                raise _refused(name)
            return above / below, 1
        if name in ("Pow", "PowByNatural") and len(arguments) == 2:
            return self._power(*arguments)
        if name not in _FUNCTIONS:
            raise _refused(name)
        return self._apply(_FUNCTIONS[name], arguments, name == "Mul")

    def _apply(
        self, function: Callable[..., Any], arguments: Sequence[ast.AST], product: bool = False
    ) -> tuple[Any, int]:
        built = [self._build(a) for a in arguments]
        terms = 1
        for _, count in built:
            terms = terms * count if product else terms + count
            if terms > TERMS:
                raise Malformed("holds a formula of too many terms")
        return _bounded(function(*(value for value, _ in built))), terms

    def _power(self, base: ast.AST, exponent: ast.AST) -> tuple[Any, int]:
        value, terms = self._build(base)
        power, _ = self._build(exponent)
        if not power.is_Integer or not -1 <= power <= DEGREE or terms ** max(int(power), 1) > TERMS:
            raise Malformed("holds a formula with too high a power")
        return _bounded(value**power), terms ** max(int(power), 1)

    def _symbol(self, name: str, assumed: dict[str, bool]) -> Any:
        if not SYMBOL.fullmatch(name):
            raise _refused(name)
        symbol = sympy.Symbol(name, **assumed)
        if self._symbols.setdefault(name, symbol) != symbol:
            raise Malformed(f"says two things of the size {name}")
        return symbol


def _bounded(value: Any) -> Any:
    if isinstance(value, sympy.Basic) and value.has(sympy.oo, -sympy.oo, sympy.zoo, sympy.nan):
        raise Malformed("holds a formula with infinity")
    for number in value.atoms(sympy.Number) if isinstance(value, sympy.Basic) else ():
        if number.is_Rational and max(abs(number.p), abs(number.q)) >= LARGEST:
            raise Malformed("holds a formula with too large a number")
    return value


def _assumed(keywords: Sequence[ast.keyword]) -> dict[str, bool]:
    assumptions = {}
    for keyword in keywords:
        match keyword:
            case ast.keyword(arg=str(name), value=ast.Constant(value=bool(value))) if name in _ASSUMPTIONS:
                assumptions[name] = value
            case _:
                raise _refused(ast.unparse(keyword))
    return assumptions


def _float(digits: str, keywords: Sequence[ast.keyword]) -> Any:
    match [*keywords]:
        case [] | [ast.keyword(arg="precision", value=ast.Constant(value=53))]:
            return _bounded(sympy.Float(float(digits)))
    raise _refused(digits)


def text_of(value: Any) -> str:
    """A formula as text that `Expressions.parse`, and torch, read back; the same for the same formula."""
    if isinstance(value, sympy.Symbol):
        assumptions = {k: v for k, v in sorted(value._assumptions_orig.items()) if k in _ASSUMPTIONS}
        return f"Symbol({', '.join([repr(value.name), *(f'{k}={v}' for k, v in assumptions.items())])})"
    if value in (sympy.true, sympy.false):
        return str(value).lower()
    if isinstance(value, sympy.Integer):
        return f"Integer({int(value)})"
    if isinstance(value, sympy.Rational):
        return f"Rational({value.p}, {value.q})"
    if isinstance(value, sympy.Float):
        return f"Float('{float(value)!r}', precision=53)"
    parts = [text_of(part) for part in value.args]
    if isinstance(value, _SORTED):
        parts.sort()
    return f"{type(value).__name__}({', '.join(parts)})"


def _refused(text: str) -> Malformed:
    return Malformed(f"holds {text[:60]!r} where a formula of sizes is allowed")
