"""What teachers answer, on disk: a sample that they have seen before is not computed again.

A sample is known by its bytes, as the teacher sees it: without augmentation every epoch but the first reads what it
needs, and of augmented samples, which the seed, the epoch and the batch decide, so does every later training of the
same seed. Each teacher has a folder of its own, named by all that decides its answers. In it are arrays
``(samples, bytes)`` of bytes, each file named by its own SHA-256: 16 bytes that stand for the sample, and the numbers
of all outputs behind each other. Files are mapped, never changed, and appear whole; one that is damaged is removed.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from slimline.basics.errors import SlimlineError
from slimline.basics.plugins import installed
from slimline.files.array_files import npy
from slimline.files.atomic import atomic_write, below, is_plain, sha256, writing
from slimline.files.strictjson import Malformed
from slimline.frameworks.base import Array, framework
from slimline.frameworks.device import wish
from slimline.methods.outputs import Output
from slimline.model import Model
from slimline.recipe.training import Training

Answers = list[tuple[Array, ...]]
"""Of each teacher its outputs as losses compare them, each ``(batch, …)``."""

_KEY = 16
_PART_BYTES = 2**26
_NAME = re.compile(r"[0-9a-f]{64}\.npy")

log = logging.getLogger(__name__)


class TeacherCache:
    """The answers of teachers, kept below a folder.

    Parameters
    ----------
    folder : made when missing.
    step : which trains with them; its precision decides what they answer.
    outputs : what their outputs mean.
    """

    def __init__(self, folder: Path, teachers: Sequence[Model], step: Training, outputs: Sequence[Output]) -> None:
        types = [np.dtype("float32" if output.floating else output.dtype) for output in outputs]
        layout = [(dtype, output.shape[1:]) for dtype, output in zip(types, outputs, strict=True)]
        self._stores = [_Store(below(folder, identity(teacher, step, outputs)), layout) for teacher in teachers]

    def answers(self, inputs: tuple[Array, ...], ask: Callable[[tuple[Array, ...]], Answers]) -> Answers:
        """Of a batch, from disk where all of it is there, else by `ask`, which is told the batch."""
        keys = _keys(inputs)
        known = [store.read(keys) for store in self._stores]
        asked: Answers = ask(inputs) if None in known else [()] * len(known)
        for store, each, answer in zip(self._stores, known, asked, strict=True):
            if each is None:
                store.add(keys, answer)
        return [answer if each is None else each for each, answer in zip(known, asked, strict=True)]

    def flush(self) -> None:
        """Write what is not on disk yet."""
        for store in self._stores:
            store.flush()


def identity(teacher: Model, step: Training, outputs: Sequence[Output]) -> str:
    """All that decides what a teacher answers to a sample, as SHA-256 in hex."""
    adapter = teacher.adapter
    with tempfile.TemporaryDirectory(prefix="slimline-") as temporary:
        path = Path(temporary) / f"teacher{adapter.suffix}"
        adapter.save(teacher.native, path, teacher.example, {})
        whole = sha256(path)
    facts = {
        "format": 2,
        "teacher": whole,
        "inputs": [(list(x.shape[1:]), str(x.dtype)) for x in teacher.example],
        "outputs": [(output.kind, list(output.shape[1:]), output.dtype) for output in outputs],
        "precision": step.precision,
        "device": adapter.device(wish()),
        "byteorder": sys.byteorder,
        "packages": installed(framework(teacher.framework).packages),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _keys(inputs: tuple[Array, ...]) -> Array:
    """``(batch, 16)`` bytes that stand for each sample."""
    columns = [np.ascontiguousarray(x).reshape(len(x), -1) for x in inputs]
    digests = []
    for row in range(len(inputs[0])):
        digest = hashlib.blake2b(digest_size=_KEY)
        for column in columns:
            digest.update(column[row].tobytes())
        digests.append(digest.digest())
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, _KEY)


class _Store:
    """The answers of one teacher; `layout` is the type and shape of each output of a sample."""

    def __init__(self, folder: Path, layout: Sequence[tuple[np.dtype, tuple[int, ...]]]) -> None:
        self._folder, self._layout = folder, layout
        sizes = [dtype.itemsize * math.prod(shape) for dtype, shape in layout]
        self._ends = np.cumsum([_KEY, *sizes])
        self._parts: list[Array] = []
        self._new: list[Array] = []
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.iterdir()):
            if _NAME.fullmatch(path.name) and (part := self._open(path)) is not None:
                self._parts.append(part)
        self._index()

    def read(self, keys: Array) -> tuple[Array, ...] | None:
        """The outputs for the samples of these keys, None where not all are there."""
        looked = _whole(keys)
        places = np.searchsorted(self._sorted, looked)
        if not len(self._sorted) or (self._sorted[np.minimum(places, len(self._sorted) - 1)] != looked).any():
            return None
        numbers = self._order[places]
        parts = np.searchsorted(self._starts, numbers, "right") - 1
        rows = np.stack([self._parts[p][n - self._starts[p]] for p, n in zip(parts, numbers, strict=True)])
        return tuple(
            np.ascontiguousarray(rows[:, start:end]).view(dtype).reshape(-1, *shape)
            for (dtype, shape), start, end in zip(self._layout, self._ends, self._ends[1:], strict=False)
        )

    def add(self, keys: Array, answers: Sequence[Array]) -> None:
        """Keep the answers to samples of these keys.

        Raises
        ------
        SlimlineError : they are of another shape or type than was described.
        """
        columns = [keys]
        for answer, (dtype, shape) in zip(answers, self._layout, strict=True):
            if answer.dtype != dtype or answer.shape != (len(keys), *shape):
                raise SlimlineError(
                    f"The teacher answers {answer.dtype} {answer.shape} to {len(keys)} samples, and cache holds "
                    f"{dtype} {shape} of each: leave cache out."
                )
            columns.append(np.ascontiguousarray(answer).reshape(len(keys), -1).view(np.uint8))
        self._new.append(np.concatenate(columns, axis=1))
        if sum(part.nbytes for part in self._new) >= _PART_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is not on disk yet."""
        if not self._new:
            return
        content = io.BytesIO()
        np.save(content, np.concatenate(self._new), allow_pickle=False)
        data, self._new = content.getvalue(), []
        path = atomic_write(self._folder / f"{hashlib.sha256(data).hexdigest()}.npy", data)
        part = self._open(path)
        if part is not None:
            self._parts.append(part)
        self._index()

    def _open(self, path: Path) -> Array | None:
        """The rows of a file, mapped; None of one that is not as it was written, which is removed."""
        if not is_plain(path):
            raise SlimlineError(f"{path} is no regular file: remove it, or choose another cache.")
        try:
            if sha256(path) != path.stem:
                raise Malformed("holds other bytes than were written")
            rows = npy(path)
            if rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != self._ends[-1]:
                raise Malformed("holds no answers of this teacher")
        except Malformed as reason:
            log.warning("%s %s: it is removed, and its samples are computed anew.", path, reason)
            with writing(path):
                path.unlink(missing_ok=True)
            return None
        return rows

    def _index(self) -> None:
        """Where which sample is: the keys in their order, and the number of each among all rows."""
        keys = np.concatenate([np.empty((0, _KEY), np.uint8), *(part[:, :_KEY] for part in self._parts)])
        self._starts = np.cumsum([0, *(len(part) for part in self._parts)])
        whole = _whole(keys)
        self._order = np.argsort(whole, kind="stable")
        self._sorted = whole[self._order]


def _whole(keys: Array) -> Array:
    """Keys ``(n, 16)`` as ``(n,)`` that can be compared."""
    return np.ascontiguousarray(keys).view(f"S{_KEY}").reshape(-1)
