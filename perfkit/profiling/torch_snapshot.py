"""The allocations of a step as pytorch.org/memory_viz reads them.

On CUDA the allocator writes them itself, with stack traces and segments. On the processor the same format is filled
from what torch's profiler told: a frame is the operation, its file the module.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from perfkit._errors import InvalidInputError
from perfkit._workload import Workload
from perfkit.backends.adapter import Finished
from perfkit.profiling.torch_trace import BEFORE, Block, Trace, traced

MOST_ENTRIES = 200_000


def write(work: Workload, finished: Finished, path: Path) -> None:
    """Write one step's allocations to `path`, a pickle.

    Raises:
        InvalidInputError: the file cannot be written.
    """
    try:
        if work.device == "cuda":
            _write_cuda(work, finished, path)
        else:
            path.write_bytes(pickle.dumps(snapshot(traced(work, finished, steps=2))))
    except OSError as error:
        raise InvalidInputError(f"snapshot={str(path)!r} cannot be written: {error}") from error


def snapshot(trace: Trace) -> dict[str, Any]:
    """The last step of a trace in the format of `torch.cuda.memory._snapshot`."""
    start, end = trace.steps[-1]
    entries = []
    for block in trace.blocks:
        if block.freed_ns is not None and block.freed_ns <= start:
            continue
        if block.born_ns <= end:
            entries.append((max(block.born_ns, start), _entry("alloc", block, max(block.born_ns, start))))
        if block.freed_ns is not None and block.freed_ns <= end:
            entries += [
                (block.freed_ns, _entry(f"free_{what}", block, block.freed_ns)) for what in ("requested", "completed")
            ]
    entries.sort(key=lambda entry: entry[0])
    return {
        "segments": [],
        "device_traces": [[entry for _, entry in entries]],
        "allocator_settings": {},
        "external_annotations": [],
    }


def _entry(action: str, block: Block, at_ns: int) -> dict[str, Any]:
    made = "held before the step" if block.born_ns == BEFORE else block.op or block.phase
    frame = {"name": f"{made} [{block.category}] {block.shape}".strip(), "filename": block.module or "model", "line": 0}
    return {
        "action": action,
        "addr": block.address,
        "size": block.bytes,
        "stream": 0,
        "time_us": at_ns // 1000,
        "frames": [frame],
    }


def _write_cuda(work: Workload, finished: Finished, path: Path) -> None:
    call = work.backend.caller(work, finished)
    with finished.keeping_state():
        call()
        torch.cuda.memory._record_memory_history(max_entries=MOST_ENTRIES)
        try:
            call()
            torch.cuda.memory._dump_snapshot(str(path))
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)
