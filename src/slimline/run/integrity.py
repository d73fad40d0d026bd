"""Whether the files of a run are as it left them, by the hashes that its journal holds."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimline.basics.errors import SlimlineError
from slimline.files.atomic import atomic_write, below, is_plain, sha256
from slimline.recipe.recipe import Recipe
from slimline.run.history import History
from slimline.run.journal import Finished
from slimline.run.layout import JOURNAL, RECIPE, WORK

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Difference:
    """A file of a run that is not as the run left it: its path in the run, and what is wrong with it."""

    path: str
    what: str

    def __str__(self) -> str:
        return f"{self.path} {self.what}"


class Integrity:
    """The files in `root` against the hashes in its history."""

    def __init__(self, root: Path, history: History) -> None:
        self.root, self.history = root, history
        self._trusted: dict[str, tuple[Any, ...]] = {}

    @property
    def files(self) -> dict[str, str]:
        """SHA-256 of every file that the journal speaks of, by its path in the run."""
        stages = self.history.stages
        end = self.history.journal.finished()
        names = list(stages) if end is None else [n for n in end[0].stages if n in stages]
        of_stages = {f: h for name in names for f, h in stages[name].files.items()}
        return of_stages | ({} if end is None else end[0].files)

    def verify(self) -> list[Difference]:
        """What is not as the run left it, read from the files themselves; nothing where the run is finished and sound.

        This guards against accidents and edits, not against somebody who writes a new journal too.
        """
        journal = self.history.journal
        damage = [Difference(JOURNAL, f"is damaged in line {number}") for number in journal.damaged]
        end = journal.finished()
        if end is None:
            damage.append(Difference(JOURNAL, "does not say that the run was finished"))
            return [*damage, *self.differences(self.files)]
        if not end[1] and not damage:
            damage.append(Difference(JOURNAL, "was altered"))
        absent = [name for name in end[0].stages if name not in self.history.stages]
        damage += [Difference(JOURNAL, f"has no stage {name}") for name in absent]
        return [*damage, *self.differences(self.files)]

    def restore(self, recipe: Recipe) -> list[Difference]:
        """Make again what can be copied from elsewhere in the run; what is still not as the run left it.

        Parameters
        ----------
        recipe : what ``recipe.yaml`` is written from where it is missing.

        Raises
        ------
        SlimlineError : a ``recipe.yaml`` that was edited after the end, which is not overwritten.
        """
        expected = self.files
        differing = self.differences(expected)
        sound = {h: f for f, h in expected.items() if f not in {d.path for d in differing}}
        for difference in differing:
            if difference.path == RECIPE:
                if difference.what != "is missing":
                    raise SlimlineError(
                        f"{self.root / RECIPE} was edited after the run had ended: compress anew with it in another "
                        "directory, or delete it and resume to get back the one that the report speaks of."
                    )
                data = recipe.dump().encode()
            elif expected[difference.path] in sound:
                data = below(self.root, sound[expected[difference.path]]).read_bytes()
            else:
                continue
            path = below(self.root, difference.path)
            atomic_write(path, data, below(self.root, WORK, f"{path.name}.part"))
            log.warning("%s %s: made again from the copy that the run holds.", path, difference.what)
        return self.verify()

    def end(self, what: str, name: str = "") -> Finished:
        """The last line of a finished run all of whose files, among them `name`, are as it left them.

        Raises
        ------
        SlimlineError : the run is not finished, so that it has no `what` yet, or not as it was left.
        """
        end = self.history.journal.finished()
        if end is None or (name and name not in end[0].files):
            raise SlimlineError(f"{self.root} has no {what} yet: finish it with slimline resume {self.root}.")
        if differing := self.differences(end[0].files, remember=True):
            raise SlimlineError(
                f"{self.root} is not as the run left it: {'; '.join(map(str, differing))}; slimline resume {self.root} "
                "makes it again where it can."
            )
        return end[0]

    def differences(self, files: Mapping[str, str], remember: bool = False) -> list[Difference]:
        """Those of `files` whose hash is another; `remember` takes a file as read that has not been touched since."""
        differences = []
        for name, expected in files.items():
            try:
                path = below(self.root, name)
            except SlimlineError:
                differences.append(Difference(name, "is, or lies behind, a symbolic link"))
                continue
            if not is_plain(path):
                differences.append(Difference(name, "is no file" if os.path.lexists(path) else "is missing"))
                continue
            at = path.stat()
            seen = (at.st_ino, at.st_size, at.st_mtime_ns, at.st_ctime_ns, expected)
            if remember and self._trusted.get(name) == seen:
                continue
            if sha256(path) != expected:
                differences.append(Difference(name, "was altered"))
            elif remember:
                self._trusted[name] = seen
        return differences
