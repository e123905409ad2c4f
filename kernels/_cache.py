"""Where kernels keep what they build and measure on this machine."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """`name` in `$PERFKIT_CACHE`, or else in the user's cache folder. Not made."""
    root = os.environ.get("PERFKIT_CACHE")
    return (Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "perfkit") / name
