"""How axes pass through an operator: one einops-like equation.

Names are axes, ``(g i)`` is an ordered product whose last axis varies fastest, ``1`` is a broadcast dimension and ``.``
a dimension that the operator takes or makes whole: nothing can be pruned through it. An axis of an input that no output
carries is reduced. ``*`` is a dimension of an output along which all is the same, so that any of it may go: it takes
the axis of its first reader, as a parameter's does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Dims = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Equation:
    """How the axes of the inputs become the axes of the outputs.

    Attributes
    ----------
    inputs, outputs : per tensor and dimension, the names of its axes, outermost first.
    sizes : sizes of axes that the shapes alone do not give.
    statistics : axes over which the operator averages, normalises, takes a maximum or contracts
        without a weight: a mask must leave what is removed out of them.
    fixed : axes that cannot be pruned through this operator, with the reason.
    """

    inputs: tuple[Dims, ...]
    outputs: tuple[Dims, ...]
    sizes: Mapping[str, int] = field(default_factory=dict)
    statistics: tuple[str, ...] = ()
    fixed: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        def tensor(dims: Dims) -> str:
            return " ".join(d[0] if len(d) == 1 else f"({' '.join(d)})" for d in dims)

        return f"{', '.join(map(tensor, self.inputs))} -> {', '.join(map(tensor, self.outputs))}"


def parse(
    text: str,
    sizes: Mapping[str, int] | None = None,
    statistics: Sequence[str] = (),
    fixed: Mapping[str, str] | None = None,
) -> Equation:
    """Read an equation such as ``"b (g i) . ., (g o) i . ., (g o) -> b (g o) . ."``."""

    def tensor(part: str) -> Dims:
        dims: list[tuple[str, ...]] = []
        group: list[str] | None = None
        for word in part.replace("(", " ( ").replace(")", " ) ").split():
            if word == "(":
                group = []
            elif word == ")":
                dims.append(tuple(group or ()))
                group = None
            elif group is not None:
                group.append(word)
            else:
                dims.append((word,))
        return tuple(dims)

    left, right = text.split("->")
    return Equation(
        tuple(map(tensor, left.split(","))) if left.strip() else (),
        tuple(map(tensor, right.split(","))),
        sizes or {},
        tuple(statistics),
        fixed or {},
    )


@dataclass(frozen=True)
class Window:
    """Where a convolution looks: per spatial dimension its stride, dilation and zeros before and after.

    `padding` may be ``"same"`` (as many outputs as inputs, at stride 1) or ``"ceil"`` (as many outputs as strides fit
    the input), which only the size of an input turns into numbers.
    """

    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...] | str

    def zeros(self, sizes: Sequence[int], kernel: Sequence[int]) -> list[tuple[int, int]]:
        """Zeros before and after each spatial dimension of an input of `sizes` under a `kernel`."""
        if not isinstance(self.padding, str):
            return list(self.padding)
        widths = []
        for n, k, s, d in zip(sizes, kernel, self.stride, self.dilation, strict=True):
            last = -(-n // s) - 1 if self.padding == "ceil" else n - 1
            total = max(last * (s if self.padding == "ceil" else 1) + d * (k - 1) + 1 - n, 0)
            widths.append((total // 2, total - total // 2))
        return widths
