"""torch's profiler, without what it and its library tell the caller unasked."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from perfkit.backends.torch_stderr import without_lines


@contextmanager
def profiled(*lines: str, **options: Any) -> Iterator[torch.profiler.profile]:
    """`torch.profiler.profile(**options)`; lines of the native library with any of `lines` in them are dropped, too."""
    with without_lines("USDT:", *lines), ExitStack() as stack:
        with warnings.catch_warnings():
            # torch 2.11, at its first use: events of earlier cycles are gone, of which there are none
            warnings.filterwarnings("ignore", ".*Profiler clears events", UserWarning)
            profile = stack.enter_context(torch.profiler.profile(**options))
        yield profile
