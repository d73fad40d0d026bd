"""Samples as slimline reads them: arrays or streams, in batches that depend on nothing but (seed, epoch).

Nothing here imports a framework: tensors are told by what they can do.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from slimline.errors import SlimlineError

Array = np.ndarray
Inputs = tuple[Array, ...]
Batch = tuple[Inputs, Array | None]
Augment = Callable[[Inputs, np.random.Generator], Inputs]
Spec = tuple[tuple[int, ...], str]
"""Shape without the batch dimension, and dtype."""


def as_array(value: Any) -> Array:
    """A numpy array of an array, a tensor of any framework or nested lists; other floats become float32."""
    if hasattr(value, "detach"):  # torch
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":
            value = value.float()
    if isinstance(value, np.ma.MaskedArray):
        raise SlimlineError("Data must not be masked arrays, whose holes no model sees: fill them first.")
    array = np.asarray(value)
    if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        raise SlimlineError(f"Data must be numbers, not {array.dtype}: convert it before it is given to slimline.")
    if array.dtype.kind == "f" or array.dtype.name == "bfloat16":
        array = array.astype(np.float32, copy=False)
    return array


def specs_of(inputs: Inputs) -> tuple[Spec, ...]:
    """Sample shape and dtype of each input."""
    return tuple((a.shape[1:], a.dtype.name) for a in inputs)


def is_array(value: Any) -> bool:
    """Whether `value` is one array or tensor rather than a collection of them."""
    return hasattr(value, "__array__") and hasattr(value, "shape")


def as_inputs(x: Any) -> tuple[Inputs, tuple[str, ...]]:
    """The model's inputs from an array, a tuple or list of arrays or a dict of them; names where it is a dict."""
    if isinstance(x, dict):
        return tuple(as_array(v) for v in x.values()), tuple(str(k) for k in x)
    if isinstance(x, tuple | list):
        return tuple(as_array(v) for v in x), ()
    return (as_array(x),), ()


def as_batch(given: Any, where: str) -> tuple[Inputs, Array | None, tuple[str, ...]]:
    """Inputs, labels and input names of ``(x, y)``, ``(x,)`` or ``x``; checked for length and finiteness."""
    x, y = given, None
    if isinstance(given, tuple | list):
        if len(given) not in (1, 2):
            raise SlimlineError(
                f"The {where} data is a tuple of {len(given)}: give (x, y) or (x,), with several inputs as a tuple x."
            )
        x, y = (given[0], given[1]) if len(given) == 2 else (given[0], None)
    inputs, names = as_inputs(x)
    labels = None if y is None else as_array(y)
    if not inputs:
        raise SlimlineError(f"The {where} data has no inputs: give (x, y) or x.")
    if any(a.ndim == 0 for a in inputs):
        raise SlimlineError(f"The {where} data holds a single number: the first dimension of x counts the samples.")
    sizes = [len(a) for a in inputs] + ([] if labels is None else [len(labels) if labels.ndim else 0])
    if len(set(sizes)) > 1:
        said = " and ".join(str(s) for s in sizes)
        raise SlimlineError(f"The {where} data has arrays of {said} samples: inputs and labels must be equally many.")
    if sizes[0] == 0:
        raise SlimlineError(f"The {where} data is empty: give at least one sample.")
    for array in (*inputs, *([] if labels is None else [labels])):
        if not finite(array):
            raise SlimlineError(f"The {where} data holds NaN or infinite numbers: remove or replace those samples.")
    return inputs, labels, names


def finite(array: Array) -> bool:
    """Whether no number is NaN or infinite; looks at 16 MB at a time."""
    if array.dtype.kind != "f":
        return True
    rows = max(1, (1 << 22) // max(1, array[0].size)) if array.ndim else 1
    return all(bool(np.isfinite(array[i : i + rows]).all()) for i in range(0, len(array), rows))


@dataclass(frozen=True)
class Split:
    """Samples in memory that have one role.

    Attributes
    ----------
    name : the role: ``train``, ``calibration``, ``selection`` or ``certification``.
    source, targets : arrays ``(samples, …)`` as given, and the labels or None.
    index : rows that belong to the split, None for all.
    names : of the inputs, if they were given as a dict.
    dtypes : what each input is cast to when it is read; empty leaves them.
    augment : applied to shuffled batches.
    """

    name: str
    source: Inputs
    targets: Array | None
    index: Array | None = None
    names: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    augment: Augment | None = None

    def __len__(self) -> int:
        return len(self.source[0]) if self.index is None else len(self.index)

    @property
    def specs(self) -> tuple[Spec, ...]:
        """Sample shape and dtype of each input as given, before `dtypes` are applied."""
        return specs_of(self.source)

    @cached_property
    def inputs(self) -> Inputs:
        """The model's inputs, each ``(samples, …)``."""
        return self._rows(slice(None))[0]

    @cached_property
    def labels(self) -> Array | None:
        """``(samples, …)`` or None."""
        return self.targets if self.targets is None or self.index is None else self.targets[self.index]

    def batches(self, size: int, seed: int | None = None, epoch: int = 0) -> Iterator[Batch]:
        """Batches of at most `size` samples.

        With a `seed` they are shuffled and augmented, as a function of (seed, epoch) only, and of sizes that
        differ by at most one: a small last batch would spoil batch-norm statistics. Without, they are in order.
        """
        if seed is None:
            for i in range(0, len(self), size):
                yield self._rows(slice(i, i + size))
            return
        rng = np.random.default_rng((seed, epoch))
        for rows in np.array_split(rng.permutation(len(self)), -(-len(self) // size)):
            inputs, labels = self._rows(rows)
            yield (augmented(self.augment, inputs, rng) if self.augment else inputs), labels

    def _rows(self, rows: slice | Array) -> Batch:
        pick = rows if self.index is None else self.index[rows]
        inputs = cast(tuple(a[pick] for a in self.source), self.dtypes)
        return inputs, None if self.targets is None else self.targets[pick]


@dataclass(frozen=True)
class Stream:
    """Training samples that are read anew in every epoch and never held in memory.

    The stream shuffles as it was made to. Python's, numpy's and torch's global generators are seeded by
    (seed, epoch) while it is read, so a DataLoader with its workers in this process repeats exactly; a
    ``tf.data`` shuffle repeats if it was given a seed and ``reshuffle_each_iteration=False``.
    """

    name: str
    source: Iterable[Any]
    clean: Callable[[Array | None], Array | None]
    count: int
    specs: tuple[Spec, ...]
    names: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    augment: Augment | None = None

    def __len__(self) -> int:
        return self.count

    @property
    def inputs(self) -> Inputs:
        """Refused: that would hold the whole stream in memory."""
        raise SlimlineError("The train data is a stream: read it by batches, or give arrays to hold it in memory.")

    @property
    def labels(self) -> Array | None:
        """Refused as `inputs` is."""
        return self.inputs[0]

    def batches(self, size: int, seed: int | None = None, epoch: int = 0) -> Iterator[Batch]:
        """The stream cut into batches of `size`; with a `seed`, seeded and augmented by (seed, epoch)."""
        rng = np.random.default_rng((seed or 0, epoch))
        source = iter(self.source) if seed is None else seeded(self.source, int(rng.integers(2**31)))
        for inputs, labels in rebatch((self._clean(item) for item in source), size):
            inputs = cast(inputs, self.dtypes)
            yield (augmented(self.augment, inputs, rng) if self.augment and seed is not None else inputs), labels

    def _clean(self, item: Any) -> Batch:
        inputs, labels, _ = as_batch(item, self.name)
        return inputs, self.clean(labels)


def first(split: Split | Stream, samples: int, size: int = 64) -> list[Inputs]:
    """Inputs of the first `samples` of a split, `size` at a time."""
    found: list[Inputs] = []
    left = samples
    for inputs, _ in split.batches(size):
        found.append(tuple(x[:left] for x in inputs))
        left -= len(found[-1][0])
        if left <= 0:
            break
    return found


def cast(inputs: Inputs, dtypes: tuple[str, ...]) -> Inputs:
    """Inputs in the dtypes the model takes; as they are where `dtypes` is empty."""
    return tuple(a.astype(d, copy=False) for a, d in zip(inputs, dtypes, strict=True)) if dtypes else inputs


def augmented(augment: Augment, inputs: Inputs, rng: np.random.Generator) -> Inputs:
    """What the user's function makes of a batch, checked to be a batch of the same shapes."""
    after = augment(inputs, rng)
    if not isinstance(after, tuple) or [np.shape(a) for a in after] != [a.shape for a in inputs]:
        raise SlimlineError("augment must return a tuple of arrays of the shapes it was given.")
    return tuple(np.asarray(a, dtype=b.dtype) for a, b in zip(after, inputs, strict=True))


def rebatch(batches: Iterable[Batch], size: int) -> Iterator[Batch]:
    """The same samples in the same order, `size` at a time."""
    waiting: list[Batch] = []
    held = 0
    for batch in batches:
        waiting.append(batch)
        held += len(batch[0][0])
        if held < size:
            continue
        inputs, labels = concatenate(waiting)
        whole = held - held % size
        for i in range(0, whole, size):
            yield tuple(a[i : i + size] for a in inputs), None if labels is None else labels[i : i + size]
        waiting = [(tuple(a[whole:] for a in inputs), None if labels is None else labels[whole:])]
        held -= whole
    if held:
        yield concatenate(waiting)


def concatenate(batches: list[Batch]) -> Batch:
    """One batch of several."""
    try:
        inputs = tuple(np.concatenate(parts) for parts in zip(*(b[0] for b in batches), strict=True))
        labels = None if batches[0][1] is None else np.concatenate([b[1] for b in batches if b[1] is not None])
    except ValueError as e:
        raise SlimlineError("The batches of the data differ in shape: give samples of one shape.") from e
    return inputs, labels


def seeded(source: Iterable[Any], seed: int) -> Iterator[Any]:
    """Iterate over `source` with the global random generators seeded, and give them back between items."""
    torch = sys.modules.get("torch")
    state: Any = None
    iterator: Iterator[Any] | None = None
    while True:
        with _generators(torch, seed, state) as read_state:
            iterator = iter(source) if iterator is None else iterator
            try:
                item = next(iterator)
            except StopIteration:
                return
            state = read_state()
        yield item


@contextmanager
def _generators(torch: Any, seed: int, state: Any) -> Iterator[Callable[[], Any]]:
    def read() -> Any:
        return random.getstate(), np.random.get_state(), torch.get_rng_state() if torch else None

    def write(to: Any) -> None:
        random.setstate(to[0])
        np.random.set_state(to[1])
        if torch:
            torch.set_rng_state(to[2])

    outside = read()
    if state is None:
        random.seed(seed)
        np.random.seed(seed)
        if torch:
            torch.random.default_generator.manual_seed(seed)
    else:
        write(state)
    try:
        yield read
    finally:
        write(outside)
