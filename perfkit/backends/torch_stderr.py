"""Keeping torch's native libraries from writing to the caller's stderr."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_lines(*parts: str) -> Iterator[None]:
    """Within it, what is written to file descriptor 2 is held back; after it, lines without any of `parts` appear.

    For lines that come from C++ and that no setting of the library turns off.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            held.seek(0)
            os.write(2, b"".join(line for line in held if not any(part.encode() in line for part in parts)))
