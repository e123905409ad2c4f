"""Kernels for the hot convolution and recurrent paths: one folder an op, loaded at first use.

    from perfkit.kernels.conv2d import conv2d
    from perfkit.kernels.linear_int8 import linear_int8
    from perfkit.kernels.rnn import gru, lstm, rnn

Each takes torch tensors and JAX arrays, picks an implementation (`_op.py` says by which rule), and has a plain
`reference` that the others are tested against. `trace()` tells which one ran, and why the others did not.
"""

from importlib import import_module
from typing import Any

if __name__ != "perfkit.kernels":
    raise ImportError(f"import perfkit.kernels, not {__name__!r}: the repository root is on sys.path")

OPS = ("conv2d", "linear_int8", "rnn")

__all__ = ["OPS", "trace", *OPS]


def __getattr__(name: str) -> Any:
    if name in OPS:
        return import_module(f"perfkit.kernels.{name}")
    if name == "trace":
        return import_module("perfkit.kernels._op").trace
    raise AttributeError(f"module 'perfkit.kernels' has no attribute {name!r}")
