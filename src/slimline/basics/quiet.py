"""What libraries print, held back."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator

_descriptors = threading.Lock()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back what the C++ libraries write to standard error, and the converter's Python warnings."""
    absl = logging.getLogger("absl")
    level = absl.level
    with _descriptors, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sys.stderr.flush()
        absl.setLevel(logging.ERROR)
        saved = os.dup(2)
        sink = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(sink, 2)
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            os.close(sink)
            absl.setLevel(level)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """`quiet`, and nothing that Python code logs below the level of critical, prints or shows as a progress bar."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with quiet(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
