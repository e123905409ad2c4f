"""What the Triton kernels share: how one is described to the ahead-of-time compiler, and where they can run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any


@dataclass(frozen=True)
class Compilation:
    """One kernel at one configuration, for `python -m bench.aot`; a `triton_kernel` lists its own in `compilations()`.

    Args:
        name: kernel and configuration, for people: "rnn forward LSTM H=512 block_b=16 bfloat16".
        kernel: the `triton.jit` function.
        signature: Triton's type of each argument that is no constant: "*bf16", "*fp32", "i32".
        constants: the `constexpr` arguments.
        divisible: arguments that are multiples of 16 (pointers to tensors are, and padded sizes).
        options: `num_warps`, `num_stages`, ...
        tensor_cores: it must contain tensor-core instructions.
        targets: the architectures that it is shipped for, of "sm_80", "sm_90", "sm_100", "gfx942".
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    divisible: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    tensor_cores: bool = False
    targets: tuple[str, ...] = ("sm_80", "sm_90", "sm_100", "gfx942")


def missing() -> str | None:
    """Why no Triton kernel can run in this environment; None where they can."""
    if find_spec("triton") is None:
        return "Triton is not installed: pip install 'perfkit[triton]'"
    return None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: `TRITON_INTERPRET=1` was set before their import."""
    import triton

    return bool(triton.knobs.runtime.interpret)
