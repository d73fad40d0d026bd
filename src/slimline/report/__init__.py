"""The report of a run as one HTML file that opens offline.

The names load when they are first used: the command line's console lies here too, and must start quickly.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimline.report.page import html, render

__all__ = ["html", "render"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("slimline.report.page"), name)
