"""Several arrays that belong together, in an order and by name: a network's outputs, or the labels of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

from slimline.basics.arrays import Array
from slimline.basics.errors import unknown


class Named:
    """Arrays by position or by name: ``arrays[0]``, ``arrays["logits"]``, ``logits, age = arrays``.

    Parameters
    ----------
    arrays : in their order; None where there is none, such as the labels of an output without labels.
    names : one for each, or empty.
    """

    def __init__(self, arrays: Sequence[Array | None], names: Sequence[str] = ()) -> None:
        self.arrays = tuple(arrays)
        self.names = tuple(names)
        assert not self.names or len(self.names) == len(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.arrays)

    def __getitem__(self, key: int | str) -> Any:
        if isinstance(key, str):
            if key not in self.names:
                raise unknown("output", key, self.names)
            return self.arrays[self.names.index(key)]
        return self.arrays[key]

    def __repr__(self) -> str:
        names = self.names or range(len(self.arrays))
        shapes = ("None" if a is None else f"{a.dtype}{a.shape}" for a in self.arrays)
        return f"Named({', '.join(f'{n}: {s}' for n, s in zip(names, shapes, strict=True))})"

    def keys(self) -> tuple[str, ...]:
        """The names, so that ``dict(arrays)`` is a dict by name."""
        return self.names

    def items(self) -> Iterator[tuple[str, Any]]:
        """Names and arrays."""
        return zip(self.names, self.arrays, strict=True)

    def copy(self) -> Named:
        """With copies of the arrays."""
        return Named([None if a is None else a.copy() for a in self.arrays], self.names)


Labels: TypeAlias = Array | Named | None
"""Of samples: an array ``(samples, …)`` of the first output's, several of them, or none."""


def parts(labels: Labels) -> tuple[Array | None, ...]:
    """The arrays of labels or outputs, one or several."""
    return labels.arrays if isinstance(labels, Named) else (labels,)


def rows(labels: Labels, index: slice | Array) -> Labels:
    """The labels of some samples."""
    if isinstance(labels, Named):
        return Named([None if a is None else a[index] for a in labels.arrays], labels.names)
    return None if labels is None else labels[index]


def joined(batches: Sequence[Labels]) -> Labels:
    """The labels of all batches, which are of one structure.

    Raises
    ------
    ValueError : they are not, or their shapes differ.
    """
    first = batches[0]
    if isinstance(first, Named):
        if any(not isinstance(b, Named) or b.names != first.names or len(b) != len(first) for b in batches):
            raise ValueError("labels of different outputs")
        columns = zip(*(parts(b) for b in batches), strict=True)
        return Named([_stacked(column) for column in columns], first.names)
    return _stacked([None if isinstance(b, Named) else b for b in batches])


def _stacked(arrays: Sequence[Array | None]) -> Array | None:
    present = [a for a in arrays if a is not None]
    if present and len(present) != len(arrays):
        raise ValueError("labels that some batches have and some have not")
    return np.concatenate(present) if present else None
