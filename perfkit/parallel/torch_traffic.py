"""What a torch process sends to others in one step, told by torch's profiler."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from perfkit._report import Quantity
from perfkit.backends import Traffic
from perfkit.backends.torch_stderr import without_lines

SENT = {
    "allreduce_": lambda given, ranks: 2 * given * (ranks - 1) / ranks,
    "allreduce_coalesced_": lambda given, ranks: 2 * given * (ranks - 1) / ranks,
    "_allgather_base_": lambda given, ranks: given * (ranks - 1),
    "allgather_": lambda given, ranks: given * (ranks - 1),
    "_reduce_scatter_base_": lambda given, ranks: given * (ranks - 1) / ranks,
    "reduce_scatter_": lambda given, ranks: given * (ranks - 1) / ranks,
    "alltoall_base_": lambda given, ranks: given * (ranks - 1) / ranks,
    "broadcast_": lambda given, ranks: given,
    "send": lambda given, ranks: given,
}
"""Bytes that leave one rank for a collective operation on `given` bytes each, by the ring or tree that libraries use."""
