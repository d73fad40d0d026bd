"""A fresh process that loads one artifact and answers requests.

``python -m slimline.measure.worker ARTIFACT TARGET THREADS``

Requests and replies are lines of JSON on stdin and stdout; arrays travel as ``.npy`` files, never as pickles.
The first line out says that the artifact is loaded; an ``{"error": sentence}`` is the last line out. At the end
of stdin the worker leaves, so none outlives the process that started it. The other end is
`slimline.measure.process.Worker`.

=========== ==================================================== =================================
``do``      further keys                                         reply
=========== ==================================================== =================================
``time``    ``inputs`` (files of one batch), ``repeats`` runs a  ``seconds``: of one run, and
            sample, ``samples``, ``warm`` untimed runs before    ``waited``: taken off; a sample each
``names``                                                        ``names`` of the outputs
``outputs`` ``inputs`` (files), ``batch`` rows a run,            ``outputs``: files ``(n, …)``, null
            ``needed`` (positions, null for all), ``folder``     for one that is not needed, or that
                                                                 has not a row per sample
``memory``                                                       ``peak_bytes``, ``baseline_bytes``
=========== ==================================================== =================================
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from slimline.basics.errors import SlimlineError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from slimline.runtimes.base import Session

# numpy and the runtime are imported in `main`, after this many threads have been fixed for their libraries.
_THREAD_SETTINGS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "TF_NUM_INTRAOP_THREADS",
    "TF_NUM_INTEROP_THREADS",
)

_LONGEST_LOOK = 5e-4  # seconds to read a line of /proc; it takes some 5 µs
_LOOKS = 5  # tries to time a run without being interrupted while looking


def _resident_bytes(field: str) -> int | None:
    """``VmHWM`` (peak) or ``VmRSS`` (now) of this process; None where the system has no /proc."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


class _Clock:
    """Times a call, less the time in which the system had given this thread's core to another process.

    Linux counts that wait exactly (the second figure of schedstat). It is taken off only where the artifact runs on one
    thread: with more, one may wait for another of the same artifact. Elsewhere `waits` is False and nothing is.
    """

    def __init__(self, threads: int) -> None:
        book = Path("/proc/self/schedstat")
        self.waits = threads == 1 and book.exists()
        self._book = os.open(book, os.O_RDONLY) if self.waits else -1

    def _waited(self) -> float:
        return int(os.pread(self._book, 64, 0).split()[1]) * 1e-9 if self.waits else 0.0

    def time(self, run: Callable[[], None]) -> tuple[float, float]:
        """Seconds that `run` took, and seconds of waiting taken off."""
        for looks_left in reversed(range(_LOOKS)):
            opened, waited = perf_counter(), self._waited()
            start = perf_counter()
            run()
            end = perf_counter()
            waited = self._waited() - waited
            # Interrupted while reading the book, there is no telling which side the wait was on.
            if max(start - opened, perf_counter() - end) < _LONGEST_LOOK or not looks_left:
                break
        return end - start - waited, waited


class _Server:
    """The loaded artifact and the inputs it was last asked about."""

    def __init__(self, session: Session, clock: _Clock, baseline: int | None) -> None:
        self.session = session
        self.clock = clock
        self.baseline = baseline
        self.files: tuple[str, ...] = ()
        self.inputs: tuple[np.ndarray, ...] = ()

    def _load(self, files: list[str]) -> tuple[np.ndarray, ...]:
        import numpy as np

        if tuple(files) != self.files:
            self.files, self.inputs = tuple(files), tuple(np.load(f, allow_pickle=False) for f in files)
        return self.inputs

    def time(self, inputs: list[str], repeats: int, samples: int, warm: int) -> dict[str, Any]:
        batch = self._load(inputs)
        run = self.session.outputs

        def runs() -> None:
            for _ in range(repeats):
                run(batch)

        gc.disable()
        for _ in range(warm):
            run(batch)
        timed = [self.clock.time(runs) for _ in range(samples)]
        gc.enable()
        waited = [w / repeats for _, w in timed] if self.clock.waits else None
        return {"seconds": [s / repeats for s, _ in timed], "waited": waited}

    def names(self) -> dict[str, Any]:
        return {"names": list(getattr(self.session, "output_names", ()))}

    def outputs(self, inputs: list[str], batch: int, needed: list[int] | None, folder: str) -> dict[str, Any]:
        import numpy as np

        rows = self._load(inputs)
        held: list[list[np.ndarray]] = []
        for start in range(0, len(rows[0]), batch):
            part = tuple(x[start : start + batch] for x in rows)
            answers = self.session.outputs(part)
            held = held or [[] for _ in answers]
            for index, (output, pieces) in enumerate(zip(answers, held, strict=True)):
                if (needed is None or index in needed) and output.ndim and len(output) == len(part[0]):
                    pieces.append(output)
        runs = -(-len(rows[0]) // batch)
        files: list[str | None] = []
        for index, pieces in enumerate(held):
            files.append(f"{folder}/output{index}.npy" if len(pieces) == runs else None)
            if files[-1] is not None:
                np.save(files[-1], np.concatenate(pieces), allow_pickle=False)
        return {"outputs": files}

    def memory(self) -> dict[str, Any]:
        return {"peak_bytes": _resident_bytes("VmHWM"), "baseline_bytes": self.baseline}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        verbs: dict[str, Callable[..., dict[str, Any]]] = {
            "time": self.time,
            "names": self.names,
            "outputs": self.outputs,
            "memory": self.memory,
        }
        return verbs[request.pop("do")](**request)


def main(artifact: str, target: str, threads: str) -> int:
    """Serve until stdin ends."""
    # Native libraries print to descriptor 1: it becomes stderr, and the replies keep a copy of their own.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    os.environ.update(dict.fromkeys(_THREAD_SETTINGS, threads))
    try:
        from slimline.runtimes.base import runtime

        baseline = _resident_bytes("VmRSS")
        server = _Server(runtime(target).load(Path(artifact), int(threads)), _Clock(int(threads)), baseline)
        print("{}", file=replies)
        for line in sys.stdin:
            print(json.dumps(server.answer(json.loads(line))), file=replies)
    except SlimlineError as error:
        print(json.dumps({"error": str(error)}), file=replies)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
