"""What Inductor makes integer kernels of on CPU: a layer that rounds, multiplies and rounds again.

Up to torch 2.13 it knows these patterns itself; torch 2.14 left them to torchao, which teaches them to Inductor when
its own quantizer is imported.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from importlib.util import find_spec

import torch

from perfkit.backends.torch_stderr import without_lines


def known() -> Iterator[str]:
    """From now on what is compiled in this process gets integer kernels; or why it does not, to tell the caller."""
    if torch.__version__ < "2.14":  # compared as versions, not as text
        return
    if find_spec("torchao") is None:
        yield "integer kernels need torchao since torch 2.14, and it is not installed: pip install 'perfkit[torch]'"
        return
    with without_lines("Failed to load"):
        # The patterns alone: importing the quantizer also changes how everything else is compiled.
        passes = importlib.import_module("torchao.quantization.pt2e.inductor_passes.x86")
    passes._register_quantization_weight_pack_pass()
