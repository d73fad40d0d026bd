"""Where slimline keeps what it remembers about this user on this machine, outside every run and project."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "SLIMLINE_STATE_DIR"


def state_folder() -> Path | None:
    """``$SLIMLINE_STATE_DIR``, ``$XDG_STATE_HOME/slimline`` or ``~/.local/state/slimline``, which need not exist yet.

    None where there is no home, or the first is set to nothing. A path that is not absolute is ignored: it would
    depend on the folder in which slimline is called, which may be a stranger's.
    """
    if os.environ.get(VARIABLE) == "":
        return None
    own, shared = (Path(os.environ.get(name, "")) for name in (VARIABLE, "XDG_STATE_HOME"))
    if own.is_absolute():
        return own
    if shared.is_absolute():
        return shared / "slimline"
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home / ".local/state/slimline" if home.is_absolute() else None
