"""What going on with a run would import and unpickle, and whether the user has said so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slimline.recipe.named_code import as_names, names, refuse
from slimline.run.directory import Run
from slimline.run.sources import ModelSource, named_by


def code_of(run: Run) -> list[str]:
    """The functions that the recipes of a run name: the one it is about, and the one that the user gave."""
    return names([*run.recipe.steps, *run.wish.steps])


def home_of(run: Run) -> str | None:
    """The folder in which the user started the run; None for a run of somebody else, who does not choose it."""
    first: Mapping[str, Any] = next(iter((run.created.get("sources") or {}).values()), {})
    return str(first["folder"]) if run.own and "folder" in first else None


def permit(run: Run, supplied: Mapping[str, Any], allow_code: str | Sequence[str], allow_pickle: bool) -> None:
    """Refuse to go on with a run that would import or unpickle what neither this call nor its maker has allowed.

    Parameters
    ----------
    supplied : by what they are, the objects with which the user goes on, or None: those are not loaded.
    allow_code, allow_pickle : the user's word in this call.

    Raises
    ------
    SlimlineError : names all of it at once; nothing was imported.
    """
    sources = run.created.get("sources") or {}
    read = [named_by(sources, what) for what in sources if supplied.get(what) is None]
    own = run.own
    trusted = {*as_names(allow_code), *(names(run.begun.steps) if own else ())}
    code = [name for name in code_of(run) if name not in trusted]
    pickles = []
    if not own:
        code = [*(s.name for s in read if ":" in s.name and s.name not in trusted), *code]
        if not allow_pickle:
            pickles = [s.name for s in read if isinstance(s, ModelSource) and s.allow_pickle and ":" not in s.name]
    why = (
        "names other code than it was started with" if own else "was edited, or was not started by you on this machine"
    )
    refuse(list(dict.fromkeys(code)), f"{run.path} {why}, and going on with it", list(dict.fromkeys(pickles)))
