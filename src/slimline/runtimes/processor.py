"""What integer kernels bear on the processor that slimline runs on."""

from __future__ import annotations

import platform
from contextlib import suppress
from functools import cache
from pathlib import Path


@cache
def saturates() -> bool:
    """Whether this processor multiplies uint8 by int8 in pairs that overflow: x86 that does not say it has VNNI."""
    if platform.machine().lower() not in ("x86_64", "amd64", "i686", "x86"):
        return False
    with suppress(OSError):
        flags = set(Path("/proc/cpuinfo").read_text("ascii", "replace").split())
        return not flags & {"avx512_vnni", "avx_vnni"}
    return True
