"""Samples as slimline reads them: arrays or streams, in batches that depend on nothing but (seed, epoch).

Nothing here imports a framework: tensors are told by what they can do.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from slimline.basics.arrays import Array, as_array, finite, is_array
from slimline.basics.errors import SlimlineError, raised
from slimline.basics.named import Labels, Named, joined, parts, rows
from slimline.data import repeats
from slimline.frameworks.base import Adapter, imported

Inputs = tuple[Array, ...]
Batch = tuple[Inputs, Labels]
Augment = Callable[[Any, np.random.Generator], Any]
"""The user's own: a batch and a generator to the batch changed. One input is an array, several are a tuple of them;
what was given as a dict is one."""
T = TypeVar("T")
Spec = tuple[tuple[int, ...], str]
"""Shape without the batch dimension, and dtype."""


def ordered(inputs: tuple[T, ...], order: tuple[int, ...]) -> tuple[T, ...]:
    """What is of each input in the model's order, where that is another."""
    return tuple(inputs[i] for i in order) if order else inputs


def named(inputs: Inputs, names: tuple[str, ...]) -> Any:
    """One array, a tuple of several, or a dict of those that have names: as a user gives them."""
    if names:
        return dict(zip(names, inputs, strict=True))
    return inputs[0] if len(inputs) == 1 else inputs


def specs_of(inputs: Inputs) -> tuple[Spec, ...]:
    """Sample shape and dtype of each input."""
    return tuple((a.shape[1:], a.dtype.name) for a in inputs)


def as_inputs(x: Any, where: str) -> tuple[Inputs, tuple[str, ...]]:
    """The model's inputs from an array, a tuple or list of arrays, or a dict of them: then in the order of their names,
    which come too."""
    what = f"The {where} data"
    if isinstance(x, dict):
        arrays = {str(key): value for key, value in x.items()}
        names = tuple(sorted(arrays))
        return tuple(as_array(arrays[name], what) for name in names), names
    if isinstance(x, tuple | list) and not (len(x) and all(isinstance(v, int | float) for v in x)):
        return tuple(as_array(v, what) for v in x), ()
    return (as_array(x, what),), ()


def as_labels(y: Any, where: str, samples: int, loaded: bool) -> Labels:
    """Labels as they are given: of one output, or of several in a dict or a tuple, None for those without.

    Parameters
    ----------
    loaded : whether a loader gave them, which makes lists of tuples.
    """
    what = f"The labels of the {where} data"
    if isinstance(y, dict):
        return Named([None if v is None else as_array(v, what) for v in y.values()], [str(k) for k in y])
    listed = isinstance(y, list) and (loaded or len(y) != samples)
    if isinstance(y, tuple) or listed:
        several = all(v is None or (is_array(v) and len(v.shape)) for v in y) and any(v is not None for v in y)
        if several and (isinstance(y, tuple) or all(v is None or len(v) == samples for v in y)):
            return Named([None if v is None else as_array(v, what) for v in y])
    return None if y is None else as_array(y, what)


def as_batch(batch: Any, where: str, loaded: bool = False) -> tuple[Inputs, Labels, tuple[str, ...]]:
    """Inputs, labels and input names of ``(x, y)``, ``(x,)`` or ``x``, that a loader gave or the user; checked for
    length and finiteness."""
    x, y = batch, None
    if isinstance(batch, tuple | list):
        if len(batch) not in (1, 2):
            raise SlimlineError(
                f"The {where} data is a tuple of {len(batch)}: give (x, y) or (x,), with several inputs as a tuple x."
            )
        x, y = (batch[0], batch[1]) if len(batch) == 2 else (batch[0], None)
    inputs, names = as_inputs(x, where)
    if not inputs:
        raise SlimlineError(f"The {where} data has no inputs: give (x, y) or x.")
    labels = as_labels(y, where, len(inputs[0]) if inputs[0].ndim else 0, loaded)
    own = [a for a in parts(labels) if a is not None]
    if any(a.ndim == 0 for a in inputs):
        raise SlimlineError(f"The {where} data holds a single number: the first dimension of x counts the samples.")
    sizes = [len(a) for a in inputs] + [len(a) if a.ndim else 0 for a in own]
    if len(set(sizes)) > 1:
        counts = " and ".join(str(s) for s in sizes)
        raise SlimlineError(f"The {where} data has arrays of {counts} samples: inputs and labels must be equally many.")
    if sizes[0] == 0:
        raise SlimlineError(f"The {where} data is empty: give at least one sample.")
    for array in (*inputs, *own):
        if not finite(array):
            raise SlimlineError(f"The {where} data holds NaN or infinite numbers: remove or replace those samples.")
    return inputs, labels, names


@dataclass(frozen=True)
class Split:
    """Samples in memory that have one role.

    Attributes
    ----------
    name : the role: ``train``, ``calibration``, ``selection`` or ``certification``.
    source, targets : arrays ``(samples, …)`` as given, and the labels: an array, several, or None.
    index : rows that belong to the split, None for all.
    names : of the inputs, if they were given as a dict.
    order : which of `source` each input of the model is; empty where they are in its order.
    dtypes : what each input is cast to when it is read; empty leaves them.
    augment : applied to shuffled batches.
    grouping : ``(samples,)`` names of the groups the samples belong to, as `source`, or None.
    """

    name: str
    source: Inputs
    targets: Labels
    index: Array | None = None
    names: tuple[str, ...] = ()
    order: tuple[int, ...] = ()
    dtypes: tuple[str, ...] = ()
    augment: Augment | None = None
    grouping: Array | None = None

    def __len__(self) -> int:
        return len(self.source[0]) if self.index is None else len(self.index)

    @property
    def specs(self) -> tuple[Spec, ...]:
        """Sample shape and dtype of each input, before `dtypes` are applied."""
        return specs_of(ordered(self.source, self.order))

    @cached_property
    def inputs(self) -> Inputs:
        """The model's inputs, each ``(samples, …)``."""
        return self._rows(slice(None))[0]

    @cached_property
    def labels(self) -> Labels:
        """``(samples, …)``, several of them, or None."""
        return self.targets if self.index is None else rows(self.targets, self.index)

    @cached_property
    def groups(self) -> Array | None:
        """``(samples,)`` names or None."""
        return self.grouping if self.grouping is None or self.index is None else self.grouping[self.index]

    @cached_property
    def keys(self) -> Array:
        """``(samples,)`` hashes, equal for samples with equal inputs."""
        picked = self.source if self.index is None else tuple(a[self.index] for a in self.source)
        return repeats.keys(picked)

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
        for index in np.array_split(rng.permutation(len(self)), -(-len(self) // size)):
            inputs, labels = self._rows(index)
            yield (augmented(self.augment, inputs, rng, self.names) if self.augment else inputs), labels

    def take(self, index: Array, name: str | None = None) -> Split:
        """The samples at these positions of the split."""
        picked = index if self.index is None else self.index[index]
        return replace(self, index=picked, name=name or self.name)

    def _rows(self, index: slice | Array) -> Batch:
        pick = index if self.index is None else self.index[index]
        inputs = cast(tuple(a[pick] for a in ordered(self.source, self.order)), self.dtypes)
        return inputs, rows(self.targets, pick)


@dataclass(frozen=True)
class Stream:
    """Training samples that are read anew in every epoch and never held in memory.

    The stream shuffles as it was made to. Python's, numpy's and the frameworks' global generators are seeded by
    (seed, epoch) while it is read, so a DataLoader with its workers in this process repeats exactly; a
    ``tf.data`` shuffle repeats if it was given a seed and ``reshuffle_each_iteration=False``.
    """

    name: str
    source: Iterable[Any]
    clean: Callable[[Labels], Labels]
    count: int
    source_specs: tuple[Spec, ...]
    names: tuple[str, ...] = ()
    order: tuple[int, ...] = ()
    dtypes: tuple[str, ...] = ()
    augment: Augment | None = None
    labelled: bool = True
    keys: Array = field(default_factory=lambda: np.empty(0, np.uint64))

    def __len__(self) -> int:
        return self.count

    @property
    def specs(self) -> tuple[Spec, ...]:
        """Sample shape and dtype of each input, before `dtypes` are applied."""
        return ordered(self.source_specs, self.order)

    @property
    def inputs(self) -> Inputs:
        """Refused: that would hold the whole stream in memory."""
        raise SlimlineError("The train data is a stream: read it by batches, or give arrays to hold it in memory.")

    @property
    def labels(self) -> Labels:
        """Refused as `inputs` is."""
        raise SlimlineError("The labels of a stream are read by batches, or give arrays to hold them in memory.")

    def batches(self, size: int, seed: int | None = None, epoch: int = 0) -> Iterator[Batch]:
        """The stream cut into batches of `size`; with a `seed`, seeded and augmented by (seed, epoch)."""
        rng = np.random.default_rng((seed or 0, epoch))
        items = reading(self.source, self.name)
        source = items if seed is None else seeded(items, int(rng.integers(2**31)))
        count = 0
        for inputs, labels in rebatch((self._clean(item) for item in source), size):
            count += len(inputs[0])
            inputs = cast(inputs, self.dtypes)
            if self.augment and seed is not None:
                inputs = augmented(self.augment, inputs, rng, self.names)
            yield inputs, labels
        if not count:
            raise SlimlineError(
                f"The {self.name} data gave {self.count} samples at first and none now: give a list of batches or a "
                "loader that can be read again and again."
            )

    def _clean(self, item: Any) -> Batch:
        inputs, labels, names = as_batch(item, self.name, loaded=True)
        if names != tuple(sorted(self.names)):
            raise SlimlineError(f"Batches of the {self.name} data have inputs of different names: make them alike.")
        if specs_of(inputs) != self.source_specs:
            raise SlimlineError(
                f"A batch of the {self.name} data has samples of {specs_text(specs_of(inputs))} and the first had "
                f"{specs_text(self.source_specs)}: make them alike."
            )
        if (labels is not None) != self.labelled:
            raise SlimlineError(
                f"Some batches of the {self.name} data have labels and some have none: make them alike."
            )
        return ordered(inputs, self.order), self.clean(labels)


def reading(source: Iterable[Any], where: str) -> Iterator[Any]:
    """The items of the user's loader; what it raises is worded."""
    try:
        yield from source
    except SlimlineError:
        raise
    except Exception as e:
        raise SlimlineError(f"The loader of the {where} data {raised(e)} while it was read.") from e


def specs_text(specs: tuple[Spec, ...]) -> str:
    """Shapes and dtypes for people."""
    return " and ".join(f"{shape} {dtype}" for shape, dtype in specs)


def first(split: Split | Stream, samples: int, size: int = 64) -> list[Inputs]:
    """Inputs of the first `samples` of a split, `size` at a time."""
    batches: list[Inputs] = []
    remaining = samples
    for inputs, _ in split.batches(size):
        batches.append(tuple(x[:remaining] for x in inputs))
        remaining -= len(batches[-1][0])
        if remaining <= 0:
            break
    return batches


def cast(inputs: Inputs, dtypes: tuple[str, ...]) -> Inputs:
    """Inputs in the dtypes the model takes; as they are where `dtypes` is empty."""
    return tuple(a.astype(d, copy=False) for a, d in zip(inputs, dtypes, strict=True)) if dtypes else inputs


def augmented(augment: Augment, inputs: Inputs, rng: np.random.Generator, names: tuple[str, ...] = ()) -> Inputs:
    """What the user's function makes of a batch, checked to be a batch alike; it is given copies, which it may change:
    a dict where the inputs have names.

    Raises
    ------
    SlimlineError : whatever the function raises or returns that is no batch of these shapes with finite numbers.
    """
    name = str(getattr(augment, "__name__", type(augment).__name__))
    name = "augment" if name in ("<lambda>", "augment") else f"augment ({name})"
    one = len(inputs) == 1 and not names
    several = f"a dict of {', '.join(names)}" if names else f"a tuple of {len(inputs)} arrays"
    kind_text = "an array" if one else several
    shapes = " and ".join(str(a.shape) for a in inputs)
    try:
        after = augment(named(tuple(a.copy() for a in inputs), names), rng)
    except SlimlineError:
        raise
    except Exception as e:
        raise SlimlineError(f"{name} {raised(e)} on {kind_text} {shapes}.") from e
    if one and not (isinstance(after, tuple | list) and len(after) == 1 and is_array(after[0])):
        after = (after,)
    if names and isinstance(after, dict):
        after = tuple(after.get(name) for name in names)
    elif names:
        after = (after,)  # which is no dict
    if not isinstance(after, tuple | list) or len(after) != len(inputs) or not all(is_array(a) for a in after):
        kind = type(after[0] if one or names else after).__name__
        raise SlimlineError(f"{name} returned a {kind} for {kind_text} {shapes}: return {kind_text} of the same shape.")
    arrays = tuple(as_array(a, f"What {name} returned", exact=True) for a in after)
    if [a.shape for a in arrays] != [a.shape for a in inputs]:
        got = " and ".join(str(a.shape) for a in arrays)
        raise SlimlineError(f"{name} returned shape {got} for {kind_text} {shapes}: return the same shape.")
    for array, before in zip(arrays, inputs, strict=True):
        if array.dtype.kind == "f" and before.dtype.kind in "iub" and not np.array_equal(array, np.trunc(array)):
            raise SlimlineError(f"{name} returned {array.dtype} fractions for {before.dtype}: return integers.")
        if not finite(array):
            raise SlimlineError(f"{name} returned NaN or infinite numbers: return finite ones.")
    return tuple(a.astype(b.dtype, copy=False) for a, b in zip(arrays, inputs, strict=True))


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
            yield tuple(a[i : i + size] for a in inputs), rows(labels, slice(i, i + size))
        waiting = [(tuple(a[whole:] for a in inputs), rows(labels, slice(whole, None)))]
        held -= whole
    if held:
        yield concatenate(waiting)


def concatenate(batches: list[Batch]) -> Batch:
    """One batch of several."""
    try:
        inputs = tuple(np.concatenate(parts) for parts in zip(*(b[0] for b in batches), strict=True))
        if len({b[1] is None for b in batches}) > 1:
            raise SlimlineError("Some batches of the data have labels and some have none: make them alike.")
        labels = joined([b[1] for b in batches])
    except ValueError as e:
        raise SlimlineError("The batches of the data differ in shape: give samples of one shape.") from e
    return inputs, labels


def seeded(source: Iterable[Any], seed: int) -> Iterator[Any]:
    """Iterate over `source` with the global random generators seeded, and give them back between items."""
    adapters = imported()
    state: Any = None
    iterator: Iterator[Any] | None = None
    while True:
        with _generators(adapters, seed, state) as read_state:
            iterator = iter(source) if iterator is None else iterator
            try:
                item = next(iterator)
            except StopIteration:
                return
            state = read_state()
        yield item


@contextmanager
def _generators(adapters: Sequence[Adapter], seed: int, state: Any) -> Iterator[Callable[[], Any]]:
    def read() -> Any:
        return random.getstate(), np.random.get_state(), [adapter.random_state() for adapter in adapters]

    def write(to: Any) -> None:
        random.setstate(to[0])
        np.random.set_state(to[1])
        for adapter, saved in zip(adapters, to[2], strict=True):
            adapter.set_random_state(saved)

    outside = read()
    if state is None:
        random.seed(seed)
        np.random.seed(seed)
        for adapter in adapters:
            adapter.seed(seed)
    else:
        write(state)
    try:
        yield read
    finally:
        write(outside)
