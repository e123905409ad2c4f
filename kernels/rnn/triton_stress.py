"""What only a GPU can show: programs that wait for each other within a launch compute what launches in turn compute."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from perfkit.kernels.rnn import triton_kernel
from perfkit.kernels.rnn.problem import SAVED, Problem
from perfkit.kernels.rnn.triton_launch import device_of

UNITS = 16
"""Hidden units, and batch rows, of a program."""


class Stress(NamedTuple):
    """What was seen of one kind of launch.

    Args:
        kind: "LSTM", "GRU" or "LSTM wavefront".
        programs: that ran at once and waited for each other.
        steps, repeats: how often they did: once for each step in each run, forward and backward.
        equal: every output and gradient was that of one launch for each step, bit for bit, in every run.
    """

    kind: str
    programs: int
    steps: int
    repeats: int
    equal: bool


def barrier_stress(
    device: torch.device | str, steps: int = 5000, repeats: int = 3, processors: int | None = None
) -> list[Stress]:
    """Run grids of as many programs as the device has processors, over many steps, again and again.

    Args:
        device: a GPU; or a CPU in Triton's interpreter, which shows that this function runs and nothing else.
        steps: T. Memory grows with it: about 2 GB for 5000 on 132 processors.
        repeats: runs of each kind.
        processors: as many programs, if not one for each of the device's.

    Returns:
        One `Stress` for each kind. A program that waits for ever hangs here: call it in a process that can be ended.
    """
    processors = processors or device_of(torch.empty(0, device=device)).processors
    found = []
    for kind, mode, layers in (("LSTM", "LSTM", 1), ("GRU", "GRU", 1), ("LSTM wavefront", "LSTM", 3)):
        parts = _parts(processors, layers)
        tiles = max(1, processors // (parts * layers))
        problem = Problem("torch", torch.device(device).type, "bfloat16", mode, steps, UNITS * tiles, 16, UNITS * parts,
                          layers, needs_grad=True)  # fmt: skip
        arguments = _arguments(problem, device)
        expected = _run(problem, arguments, persistent=0)
        runs = (_run(problem, arguments, persistent=1) for _ in range(repeats))
        equal = all(torch.equal(mine, true) for run in runs for mine, true in zip(run, expected, strict=True))
        finite = all(bool(tensor.isfinite().all()) for tensor in expected)
        found.append(Stress(kind, parts * layers * tiles, steps, repeats, equal and finite))
    return found


def _parts(processors: int, layers: int) -> int:
    """Of how many programs' hidden units a layer is: so that few processors are left over, and H is not too large."""
    return max(range(1, 41), key=lambda parts: (processors // (parts * layers) * parts, parts))


def _arguments(problem: Problem, device: torch.device | str) -> tuple:
    """The arguments of `forward` from x on, up to `batch_first`, and gradients of the outputs."""
    draw = torch.Generator(device).manual_seed(0)
    hidden, gates = problem.hidden, {"LSTM": 4, "GRU": 3}[problem.mode]

    def uniform(*shape: int) -> Tensor:
        bound = hidden**-0.5
        made = torch.empty(shape, dtype=torch.bfloat16, device=device)
        return made.uniform_(-bound, bound, generator=draw)

    inputs = [problem.inputs, *[hidden] * (problem.layers - 1)]
    weights = [(uniform(gates * hidden, size), uniform(gates * hidden, hidden)) for size in inputs]
    states = problem.layers, problem.batch, hidden
    x, d_y = uniform(problem.steps, problem.batch, problem.inputs), uniform(problem.steps, problem.batch, hidden)
    c0, d_cn = (uniform(*states), uniform(*states)) if problem.mode == "LSTM" else (None, None)
    return (x, None, uniform(*states), c0, weights, False), (d_y, uniform(*states), d_cn)


def _run(problem: Problem, arguments: tuple, persistent: int) -> list[Tensor]:
    """Every output and gradient."""
    given, seeds = arguments
    rows, stack = problem.steps * problem.batch, problem.layers
    x = given[0]
    saved = (
        x.new_empty((stack, rows, SAVED[problem.mode], problem.hidden)),
        x.new_empty((stack, rows, problem.hidden), dtype=torch.float32),
        x.new_empty((stack - 1, rows, problem.hidden)),
    )
    wavefront = int(stack > 1)
    chosen = {"persistent": persistent, "wavefront": wavefront, "block_h": UNITS, "back_h": UNITS, "block_b": UNITS}
    chosen |= {"back_b": UNITS, "block_k": 2 * UNITS, "back_k": 2 * UNITS}  # more than block_h: never alone
    outputs = triton_kernel.forward(problem, *given, *saved, chosen)
    *of_inputs, of_weights = triton_kernel.backward(problem, *given, outputs[0], *saved, *seeds, chosen)
    found = [*outputs, *of_inputs, *(gradient for direction in of_weights for gradient in direction)]
    return [tensor for tensor in found if tensor is not None]
