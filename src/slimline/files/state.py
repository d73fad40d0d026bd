"""Where slimline keeps what it remembers about this user on this machine, outside every run and project."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "SLIMLINE_STATE"


def state_folder() -> Path | None:
    """``$SLIMLINE_STATE``, ``$XDG_STATE_HOME/slimline`` or ``~/.local/state/slimline``, which need not exist yet.

    None where ``$SLIMLINE_STATE`` is empty or there is no home. A path that is not absolute is ignored: it would depend
    on the folder in which slimline is called, which may be a stranger's.
    """
    own, shared = os.environ.get(VARIABLE), Path(os.environ.get("XDG_STATE_HOME", ""))
    if own == "":
        return None
    if own is not None and Path(own).is_absolute():
        return Path(own)
    if shared.is_absolute():
        return shared / "slimline"
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home / ".local/state/slimline" if home.is_absolute() else None
