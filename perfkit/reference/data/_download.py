"""Fetching a published file once, whole and verified, or not at all."""

import contextlib
import hashlib
import http.client
import os
import tempfile
import urllib.request
from pathlib import Path
from typing import BinaryIO

from perfkit.reference._checks import corrupt, unreachable


def cache_folder(name: str) -> Path:
    """Where a data set is kept when no folder is named: `perfkit/name` in `$XDG_CACHE_HOME` or `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "perfkit" / name


def fetch(url: str, path: Path, *, md5: str, progress: bool = False) -> None:
    """Fetch `url` into `path`.

    The bytes go to a folder of their own beside `path` and are moved into place when their checksum is right, so that
    neither an interrupted nor a forged download can ever be taken for the file.

    Args:
        url: http, https or file address.
        path: the file to make or replace; its folder is made if needed.
        md5: the published checksum, 32 hexadecimal digits. It guards against damage, not against an attacker.
        progress: draw a progress bar on standard error.

    Raises:
        ConnectionError: The address could not be read.
        ValueError: The checksum is wrong.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.md5(usedforsecurity=False)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        partial = Path(folder) / path.name
        with partial.open("wb") as out:
            try:
                with (
                    urllib.request.urlopen(url, timeout=30) as response,
                    _shown(response, path.name, progress) as blocks,
                ):
                    while block := blocks.read(1 << 20):
                        digest.update(block)
                        out.write(block)
            except (OSError, http.client.HTTPException) as error:
                raise unreachable(url, error) from error
        if digest.hexdigest() != md5:
            raise corrupt(
                path,
                given=f"what {url} sent has md5 {digest.hexdigest()}",
                expected=md5,
                remedy="nothing was kept; try again, or name another mirror with source=",
            )
        partial.replace(path)


def _shown(response: BinaryIO, label: str, progress: bool) -> contextlib.AbstractContextManager[BinaryIO]:
    """The response itself, or the response with a progress bar around it."""
    if not progress:
        return contextlib.nullcontext(response)
    import rich.console
    import rich.progress

    size = getattr(response, "headers", {}).get("Content-Length")
    return rich.progress.wrap_file(
        response, total=int(size) if size else None, description=label, console=rich.console.Console(stderr=True)
    )
