"""The near end of a measuring process: starts it, asks it, and says clearly when it has died."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from slimline.basics.errors import SlimlineError
from slimline.runtimes.base import runtime_for


@dataclass(frozen=True)
class Timing:
    """Samples, in seconds of one run, less the seconds in which another process had the core.

    `waited` is what was taken off each; None where that is not known (more than one thread, or not Linux).
    """

    seconds: list[float]
    waited: list[float] | None


@dataclass(frozen=True)
class Artifact:
    """What one target loads.

    Attributes
    ----------
    path : the file or folder.
    target : name of the runtime.
    """

    path: Path
    target: str

    @classmethod
    def of(cls, artifact: Path | Artifact) -> Artifact:
        """A path is for the runtime that loads files with its suffix."""
        if isinstance(artifact, Artifact):
            return artifact
        if not artifact.exists():
            raise SlimlineError(f"There is no artifact at {artifact}: check the path.")
        return cls(artifact, runtime_for(artifact).name)


class Worker:
    """One artifact, loaded by its runtime in a process of its own; a context manager.

    Parameters
    ----------
    artifact : to load; a path is for the runtime that loads files with its suffix.
    threads : that the runtime may compute with.

    Raises
    ------
    SlimlineError
        If the artifact cannot be loaded, or the process dies, now or at any request.
    """

    def __init__(self, artifact: Path | Artifact, threads: int = 1) -> None:
        if threads < 1:
            raise SlimlineError(f"threads must be at least 1, not {threads}.")
        self.artifact = Artifact.of(artifact)
        if not self.artifact.path.exists():
            raise SlimlineError(f"There is no artifact at {self.artifact.path}: check the path.")
        words = [str(self.artifact.path), self.artifact.target, str(threads)]
        self._folder = tempfile.TemporaryDirectory(prefix="slimline-worker-")
        self.folder = Path(self._folder.name)
        self._errors = self.folder / "stderr.txt"
        with self._errors.open("wb") as stderr:
            self._process = subprocess.Popen(
                # -P: a file in the current folder must not stand in for a package.
                [sys.executable, "-P", "-m", "slimline.measure.worker", *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout
        try:
            self._receive()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def time(self, inputs: Sequence[Path], repeats: int = 1, samples: int = 1, warm: int = 0) -> Timing:
        """Time runs on the batch in the files `inputs`: `samples` of them, each the mean of `repeats`."""
        files = [str(f) for f in inputs]
        reply = self._ask(do="time", inputs=files, repeats=repeats, samples=samples, warm=warm)
        return Timing(reply["seconds"], reply["waited"])

    @cached_property
    def output_names(self) -> tuple[str, ...]:
        """Of the artifact's outputs, as it has them; empty where the runtime does not tell."""
        return tuple(self._ask(do="names")["names"])

    def outputs(
        self, inputs: tuple[np.ndarray, ...], batch: int, needed: Collection[int] | None = None
    ) -> tuple[np.ndarray | None, ...]:
        """All outputs ``(n, …)`` for inputs ``(n, …)``, run `batch` rows at a time; None for one that is not among the
        `needed` positions, or that has not a row per sample."""
        files = [str(f) for f in save(self.folder, inputs)]
        positions = None if needed is None else sorted(needed)
        reply = self._ask(do="outputs", inputs=files, batch=batch, needed=positions, folder=str(self.folder))
        return tuple(None if file is None else np.load(file, allow_pickle=False) for file in reply["outputs"])

    def memory(self) -> tuple[int | None, int | None]:
        """Peak resident bytes so far, and resident bytes before the artifact was loaded; None where unknown."""
        reply = self._ask(do="memory")
        return reply["peak_bytes"], reply["baseline_bytes"]

    def close(self) -> None:
        """End the process and remove its files."""
        self._replies.close()
        with suppress(BrokenPipeError):  # it died with a request unread; whoever asked has been told
            self._requests.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()

    def _ask(self, **request: Any) -> dict[str, Any]:
        try:
            self._requests.write(json.dumps(request) + "\n")
            self._requests.flush()
        except BrokenPipeError as error:
            raise self._death() from error
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        line = self._replies.readline()
        if not line:
            raise self._death()
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise SlimlineError(reply["error"])
        return reply

    def _death(self) -> SlimlineError:
        code = self._process.wait()
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        return SlimlineError(f"The process that runs {self.artifact.path} died ({how}): {_gist(self._errors)}")


def _gist(stderr: Path) -> str:
    """The line of a process's last words that tells most: of an exception its first, else the last of all."""
    _, traceback, after = stderr.read_text(errors="replace").rpartition("Traceback (most recent call last):\n")
    lines = [line for line in after.splitlines() if line.strip()]
    if traceback:
        lines = [line for line in lines if not line.startswith(" ")][:1] or lines
    return lines[-1].strip() if lines else "it said nothing."


def save(folder: Path, inputs: tuple[np.ndarray, ...]) -> list[Path]:
    """Write each of `inputs` to a fresh ``.npy`` file in `folder`; a name is never used again with other content."""
    folder = Path(tempfile.mkdtemp(dir=folder))
    files = [folder / f"{i}.npy" for i in range(len(inputs))]
    for file, array in zip(files, inputs, strict=True):
        np.save(file, array, allow_pickle=False)
    return files


def tile(inputs: tuple[np.ndarray, ...], batch: int) -> tuple[np.ndarray, ...]:
    """The first `batch` rows, the rows repeated where there are fewer."""
    if not inputs or not len(inputs[0]):
        raise SlimlineError("There are no input rows to measure with: give at least one.")
    return tuple(np.ascontiguousarray(x[np.arange(batch) % len(x)]) for x in inputs)
