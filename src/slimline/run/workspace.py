"""The folder of a run for unfinished work: parts of stages, and checkpoints that survive a kill."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

from slimline.files.atomic import atomic_write, below, is_plain
from slimline.run.layout import DURATIONS, WORK


class Workspace:
    """Unfinished work of the run in `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def part(self, name: str) -> Path:
        """A new, empty folder for the files of stage `name`."""
        folder = below(self.root, WORK, f"{name}.part")
        folder.mkdir(parents=True)
        return folder

    def folder(self, name: str) -> Path:
        """A folder that may be there already."""
        folder = below(self.root, WORK, name)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def write(self, name: str, data: bytes) -> Path:
        """Write the file `name` of the run, whole or not at all."""
        return atomic_write(below(self.root, name), data, below(self.root, WORK, f"{name}.part"))

    def sweep(self, stages: Collection[str], whole: bool = False, keep: str | None = None) -> None:
        """Remove what `stages` have left, all but the folder `keep`; where they are the `whole` run, files too."""
        work = below(self.root, WORK)
        if not work.is_dir():
            return
        for entry in list(work.iterdir()):
            if entry.is_symlink() or entry.name == keep:
                continue
            if entry.name.removesuffix(".part") in stages or entry.name.rpartition("@")[0] in stages:
                shutil.rmtree(entry)
            elif whole and (entry.suffix == ".part" or entry.name == Path(DURATIONS).name) and is_plain(entry):
                entry.unlink()
        with contextlib.suppress(OSError):
            work.rmdir()  # only where nothing else is in it

    def take_back(self, files: Iterable[str]) -> None:
        """Remove the files of a stage that could not be noted, and the folders that they leave empty."""
        with contextlib.suppress(OSError):
            for name in files:
                (self.root / name).unlink(missing_ok=True)
            for folder in sorted({(self.root / name).parent for name in files}, reverse=True):
                if folder.is_dir():
                    folder.rmdir()
