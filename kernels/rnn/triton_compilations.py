"""The recurrent op's Triton kernels at the configurations that are shipped, for `python -m bench.aot`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from perfkit.kernels._triton import Compilation
from perfkit.kernels.rnn.problem import Problem
from perfkit.kernels.rnn.triton_backward import backward_span
from perfkit.kernels.rnn.triton_configuration import Configuration, Device, Tiles, configure
from perfkit.kernels.rnn.triton_forward import forward_span

DEVICES = {
    "sm_80": Device(108, 166912),
    "sm_90": Device(132, 232448),
    "sm_100": Device(148, 232448),
    "gfx942": Device(304, 65536, exact_float32=True),
}
"""A100, H100, B200 and MI300X."""

TYPES = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
COUNTS = dict.fromkeys(("first_tile", "tiles", "first", "last", "steps", "batch"), "i32") | {"rows": "i64"}
PLACES = {"lengths": "*i32", "starts": "*i64", "counters": "*i32"}
STRIDES = ("inputs_row", "y_step", "y_row", "d_step", "d_row")


def compilations() -> Iterator[Compilation]:
    """Each kernel at each configuration once, with the targets that it is for."""
    found: dict[str, dict[str, Any]] = {}
    for problem, tf32 in PROBLEMS:
        for target, device in DEVICES.items():
            chosen = configure(problem, device, tf32)
            both = [_forward(problem, chosen, tf32)]
            both += [_backward(problem, chosen, tf32)] if problem.needs_grad else []
            for about in both:
                about["tensor_cores"] = problem.dtype != "float32" or tf32 or device.exact_float32
                about["name"] += "" if about["tensor_cores"] else ", no tensor cores"
                key = repr(sorted(about.items(), key=str))
                found.setdefault(key, about | {"targets": {}})["targets"][target] = None
    for about in found.values():
        yield Compilation(**about | {"targets": tuple(about["targets"])})


def _problem(
    mode: str, hidden: int, dtype: str = "bfloat16", layers: int = 1, needs_grad: bool = True, **more: Any
) -> Problem:
    sizes = {"steps": 512, "batch": 64, "inputs": 128, "hidden": hidden, "layers": layers}
    return Problem(framework="torch", device="cuda", dtype=dtype, mode=mode, **sizes, needs_grad=needs_grad, **more)


PROBLEMS = (
    *((_problem("LSTM", hidden), False) for hidden in (50, 64, 128, 256, 512, 768, 1024, 2048)),
    (_problem("LSTM", 512, "float16", needs_grad=False), False),
    *((_problem("LSTM", 256, "float32"), tf32) for tf32 in (False, True)),
    *((_problem("LSTM", 256, dtype, 6), False) for dtype in ("float32", "bfloat16")),
    (_problem("LSTM", 512, "bfloat16", 3), False),
    (_problem("LSTM", 512, directions=2, ragged="packed"), False),
    (_problem("LSTM", 50, ragged="lengths"), False),
    *((_problem("GRU", hidden), False) for hidden in (64, 512, 1024)),
    (_problem("GRU", 256, layers=2), False),
    *((_problem("RNN_TANH", hidden), False) for hidden in (64, 512)),
    (_problem("RNN_RELU", 256, layers=2), False),
)
"""What is compiled, and whether float32 may be rounded to TF32."""


def _forward(problem: Problem, chosen: Configuration, tf32: bool) -> dict[str, Any]:
    wavefront, each = bool(chosen.wavefront), TYPES[problem.dtype]
    types = dict.fromkeys(("inputs", "y", "inner", "h0", "w_hh", "w_ih"), each)
    types |= dict.fromkeys(("gates", "cells", "state", "bias", "bias_hn"), "*fp32")
    absent = set() if wavefront else {"inner", "w_ih", "bias"}
    absent |= set() if problem.mode == "GRU" else {"bias_hn"}
    absent |= {"state"} if problem.mode.startswith("RNN") else set()
    absent |= {"gates"} if not problem.needs_grad else set()
    absent |= {"cells"} if not problem.needs_grad or problem.mode != "LSTM" else set()
    jobs = problem.layers if wavefront else problem.directions
    constants = {"JOBS": jobs, "WAVEFRONT": wavefront}
    return _described("forward", problem, chosen.forward, tf32, forward_span, types, absent, constants, wavefront)


def _backward(problem: Problem, chosen: Configuration, tf32: bool) -> dict[str, Any]:
    types = dict.fromkeys(("d_y", "y", "d_gates", "h0", "w_hh"), TYPES[problem.dtype])
    types |= dict.fromkeys(("gates", "cells", "d_h", "d_c", "c0"), "*fp32")
    absent = set() if problem.mode == "LSTM" else {"cells", "d_c", "c0"}
    absent |= set() if problem.mode == "GRU" else {"y", "h0"}
    return _described("backward", problem, chosen.backward, tf32, backward_span, types, absent, {}, False)


def _described(
    name: str,
    problem: Problem,
    tiles: Tiles,
    tf32: bool,
    kernel: Any,
    types: dict[str, str],
    absent: set[str],
    constants: dict[str, Any],
    wavefront: bool,
) -> dict[str, Any]:
    """The fields of a `Compilation`, but for `tensor_cores` and `targets`."""
    waits = wavefront or tiles.block_h < problem.hidden
    absent |= {"counters"} if not waits else set()
    absent |= {"lengths", "starts"} if problem.ragged == "no" else {"starts"} if problem.ragged == "lengths" else set()
    types |= PLACES | COUNTS | dict.fromkeys(STRIDES, "i32")
    signature = {
        argument: types[argument] for argument in kernel.arg_names if argument in types and argument not in absent
    }
    sizes = f"H={problem.hidden}" + (f" layers={problem.layers}" if wavefront else "")
    ragged = "" if problem.ragged == "no" else f" {problem.ragged}"
    kind = f"{problem.dtype}{' tf32' if tf32 else ''}"
    blocks = (
        f"{tiles.block_h}x{tiles.block_b}x{tiles.block_k}{'' if tiles.resident else ' streamed'} {tiles.warps} warps"
    )
    return {
        "name": f"rnn {name} {problem.mode} {sizes}{ragged} {kind} {blocks}",
        "kernel": kernel,
        "signature": signature,
        "constants": dict.fromkeys(sorted(absent)) | constants | tiles.constants(problem, waits, tf32),
        # strides are sums and products of H
        "divisible": tuple(
            argument for argument, kind in signature.items()
            if kind.startswith("*") or (argument in STRIDES and problem.hidden % 16 == 0)
        ),
        "options": tiles.options(problem.mode, name == "backward"),  # AMD's compiler leaves out what is not its own
    }  # fmt: skip
