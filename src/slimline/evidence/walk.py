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

    Between two stops it holds what is computed and still read: the targets of the last one and, of what was passed on
    the way there, as of a residual stream, whatever the next stops begin with. So neither time nor memory of a stop
    grows with how many there were before.

    Parameters
    ----------
    stops : per stop the values that are wanted there. Neither they nor what they are computed from change after.
    """

    def __init__(self, model: Model, batches: Batches, stops: Sequence[Sequence[str]]) -> None:
        self.model, self.stops, self.batches = model, stops, batches
        self.position = 0
        self.producers = model.graph.producers()
        self.stored = set(model.graph.parameters)
        self.observable = model.adapter.observable(model.native)
        self.held: dict[str, list[Array]] = {
            name: [batch[i] for batch in batches] for i, name in enumerate(model.graph.inputs)
        }

    def on(self, native: Any, see: Callable[[str, Array], None]) -> None:
        """The next stop: every batch of every value that is wanted there goes to `see`."""
        targets = self.stops[self.position]
        self.position += 1
        inputs = self.model.graph.inputs
        origins, passed = self._way(targets, self.held)
        starts = [*inputs, *sorted(origins.difference(inputs))]
        at_hand = {*self.held, *(name for name in (*targets, *passed) if self._holdable(name))}
        needed = set(inputs).union(*(self._way(stop, at_hand)[0] for stop in self.stops[self.position :]))
        seen: dict[str, list[Array]] = {name: [] for name in sorted(needed) if name not in self.held}

        def store(name: str, array: Array) -> None:
            if name in seen:
                seen[name].append(np.array(array))
            if name in targets:
                see(name, array)

        batches = list(zip(*(self.held[name] for name in starts), strict=True))
        self.model.adapter.observe(native, batches, list(dict.fromkeys((*targets, *seen))), store, starts)
        self.held = {name: arrays for name, arrays in (self.held | seen).items() if name in needed}

    def _holdable(self, name: str) -> bool:
        """Whether a later stop may begin with it: a float activation that can be read, of not too many bytes."""
        value, batch = self.model.graph.values[name], self.model.graph.batch
        samples = sum(len(inputs[0]) for inputs in self.batches)
        size = math.prod(value.shape) / batch * samples * np.dtype(value.dtype).itemsize
        return value.dtype == "float32" and name in self.observable and size < MEMORY

    def _way(self, targets: Sequence[str], at_hand: Container[str]) -> tuple[set[str], set[str]]:
        """The values at hand from which all of `targets` can be computed, and those that are computed on the way."""
        starts, passed = set[str](), set[str]()
        pending = list(targets)
        while pending:
            name = pending.pop()
            if name in at_hand:
                starts.add(name)
            elif name not in passed and name not in self.stored:
                passed.add(name)
                pending += [n for n in self.producers[name].inputs if n is not None]
        return starts, passed
