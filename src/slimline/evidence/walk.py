"""A model that is run from stop to stop, each with a model that has changed behind the last one."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence
from typing import Any

import numpy as np

from slimline.model import Model

Array = np.ndarray[Any, np.dtype[Any]]
Batches = Sequence[tuple[Array, ...]]

MEMORY = 2**30  # bytes of one value, or of what is compared with it, that are kept at a time


class Walk:
    """Runs a model from stop to stop: what was computed up to one of them is not computed again for the next.

    Parameters
    ----------
    stops : per stop the values that are wanted there; they do not change after.
    """

    def __init__(self, model: Model, batches: Batches, stops: Sequence[Sequence[str]]) -> None:
        self.model, self.stops, self.batches = model, stops, batches
        self.position = 0
        self.producers = model.graph.producers()
        self.stored = set(model.graph.parameters)
        self.held: dict[str, list[Array]] = {
            name: [batch[i] for batch in batches] for i, name in enumerate(model.graph.inputs)
        }

    def on(self, native: Any, see: Callable[[str, Array], None]) -> None:
        """The next stop: every batch of every value that is wanted there goes to `see`."""
        targets = self.stops[self.position]
        self.position += 1
        starts = sorted(self._starts(targets, self.held).union(self.model.graph.inputs))
        at_hand = {*self.held, *(name for name in targets if self._bytes(name) < MEMORY)}
        needed = set(self.model.graph.inputs).union(
            *(self._starts(stop, at_hand) for stop in self.stops[self.position :])
        )
        seen: dict[str, list[Array]] = {name: [] for name in needed if name not in self.held}

        def store(name: str, array: Array) -> None:
            if name in seen:
                seen[name].append(np.array(array))
            see(name, array)

        inputs = list(zip(*(self.held[name] for name in starts), strict=True))
        self.model.adapter.observe(native, inputs, targets, store, starts)
        self.held = {name: arrays for name, arrays in (self.held | seen).items() if name in needed}

    def _bytes(self, name: str) -> float:
        value = self.model.graph.values[name]
        samples = sum(len(batch[0]) for batch in self.batches)
        return samples * math.prod(value.shape[1:]) * np.dtype(value.dtype).itemsize

    def _starts(self, targets: Sequence[str], at_hand: Container[str]) -> set[str]:
        """The values at hand from which all of `targets` can be computed."""
        starts: set[str] = set()
        pending, passed = list(targets), set[str]()
        while pending:
            name = pending.pop()
            if name in at_hand:
                starts.add(name)
            elif name not in passed and name not in self.stored:
                passed.add(name)
                pending += [n for n in self.producers[name].inputs if n is not None]
        return starts
