"""What is run once for all of pytest's workers: each of them would make a module's fixtures for itself."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def shared_folder(name: str) -> Path:
    """A folder of this run of the tests, the same for all workers."""
    folder = Path(os.environ["PERFKIT_CACHE"]).parent / "shared" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def once(name: str, make: Callable[[], Any]) -> Any:
    """What `make` returns, which can be written as JSON: one worker calls it, the others wait and read."""
    folder = shared_folder(name)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        told = folder / "told.json"
        if not told.exists():
            told.write_text(json.dumps(make()))
        return json.loads(told.read_text())
