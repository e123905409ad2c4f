"""How the CPU kernel is built, what it takes, and what it is told of a problem; imports no framework."""

from __future__ import annotations

from pathlib import Path

from perfkit.kernels import _native
from perfkit.kernels.conv2d.problem import Problem
from perfkit.measure.environment import has

DTYPES = ("float32", "bfloat16")
SOURCE = Path(__file__).with_name("cpu_kernel.cpp")
FLAGS = ("-ffp-contract=fast",)
"""Products and sums may round once: there is no reference in other operations to be equal to bit for bit."""

MOST_TAPS = {
    ("torch", False, "float32"): (288, 144),
    ("torch", False, "bfloat16"): (288, 72),
    ("torch", True, "float32"): (72, 36),
    ("torch", True, "bfloat16"): (36, 27),
    ("jax", True, "float32"): (144, 144),
    ("jax", True, "bfloat16"): (144, 144),
}
"""Products summed for one output up to which it was measured to be faster than the framework's layers, in inference and
training, by framework, channels last and dtype. Timed with 3x3 kernels and a 2x2 pool on a Zen 5 core, with AVX-512 and
without AMX."""

BY_CHANNELS = {"float32": (1152, "avx512f"), "bfloat16": (4608, "avx512_bf16")}
"""The same of lanes of channels (`cpu_channels.hpp`) against XLA, with a pool or without, and the instructions that it
wants: 1.0 to 8 times as fast in float32, 1.2 to 12 in bfloat16, in inference on a Zen 5 core."""


def refusal(problem: Problem) -> str | None:
    """Why the kernel cannot take `problem`; None where it can."""
    if problem.dtype not in DTYPES:
        return f"it takes {' and '.join(DTYPES)}, and the arrays are {problem.dtype}"
    return _native.missing()


def slower(problem: Problem) -> str | None:
    """Why the framework's layers are expected to be faster; None where they are not."""
    if problem.framework == "jax" and _by_channels(problem):
        most = BY_CHANNELS[problem.dtype][0]
        return _too_many(problem, most) if problem.taps > most else None
    if problem.pool == 1:
        return "without a pool it saves no pass through memory, and the library's convolution is faster"
    if problem.framework == "torch" and problem.dtype == "bfloat16" and has("bf16"):
        return "this CPU has ARM's bfloat16 instructions, which the library multiplies with and the kernel does not"
    most = MOST_TAPS[problem.framework, problem.channels_last, problem.dtype][problem.needs_grad]
    return _too_many(problem, most) if problem.taps > most else None


def slower_backward(problem: Problem) -> bool:
    """Whether the framework's gradients are expected to be faster, of what the kernel's forward pass saved."""
    return problem.pool == 1 or problem.taps > MOST_TAPS[problem.framework, problem.channels_last, problem.dtype][1]


def _too_many(problem: Problem, most: int) -> str:
    return f"{problem.taps} products for each output: above {most} the library's convolution is faster"


def _by_channels(problem: Problem) -> bool:
    """Whether the forward pass has channels for lanes, and few that are empty: the rule of `by_channels` in C++."""
    outputs = problem.outputs // problem.groups
    filled = 4 * outputs >= 3 * 16 * -(-outputs // 16)
    return problem.channels_last and filled and has(BY_CHANNELS[problem.dtype][1])


def shape(problem: Problem) -> list[int]:
    """The fields of `PerfkitConv2d`, in order, for x dense in the problem's layout and dense weights, OIHW or HWIO."""
    inputs, height, width, outputs = problem.inputs, problem.height, problem.width, problem.outputs
    kernel, of_group = problem.kernel_height * problem.kernel_width, problem.inputs // problem.groups
    x_strides = (1, width * inputs, inputs) if problem.channels_last else (height * width, width, 1)
    if problem.framework == "torch":
        weight_strides = problem.taps, kernel, problem.kernel_width, 1
    else:
        weight_strides = 1, outputs, problem.kernel_width * of_group * outputs, of_group * outputs
    return [
        *(problem.batch, inputs, height, width, outputs, problem.kernel_height, problem.kernel_width),
        *(*problem.stride, problem.padding[0], problem.padding[2], *problem.dilation, problem.groups, problem.pool),
        *(*problem.out_size, problem.activation == "relu", problem.dtype == "bfloat16", problem.channels_last),
        *(inputs * height * width, *x_strides, *weight_strides),
    ]
