"""The Triton kernels of conv2d on torch tensors: which calls they take, how they are tiled, and calls of them.

    refusal(problem), slower(problem) -> str | None
    forward(problem, x, weight, bias, configuration=()) -> y, argmax
    backward(problem, x, weight, argmax, d_y, wanted, configuration=()) -> d_x, d_weight, d_bias

See the package's head for the contract. float32 is multiplied as float32 on ordinary cores, or as TF32 on tensor cores
where `torch.backends.cudnn.conv.fp32_precision` allows that, as torch does by default. None of the rules and tiles
here is yet measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from perfkit.kernels import _triton
from perfkit.kernels._launch import power_of_2
from perfkit.kernels._triton import Compilation
from perfkit.kernels.conv2d import triton_launch as launch
from perfkit.kernels.conv2d.problem import Problem
from perfkit.kernels.conv2d.triton_launch import FEW_CHANNELS, PROGRAMS, is_flat

Configuration = Sequence[tuple[str, int]]

MOST_TAPS = 576
"""Longer sums cost more in these kernels than the pass through memory that they save costs cuDNN: an estimate from half
of cuDNN's arithmetic rate, and an H100's arithmetic and bandwidth."""


def refusal(problem: Problem) -> str | None:
    """Why the kernels cannot take `problem`; None where they can."""
    (height, width), image = problem.conv_size, problem.inputs * problem.height * problem.width
    if max(problem.batch * height * width, image, problem.batch * problem.height * problem.width) >= 2**30:
        return "it counts places in 32 bits: at most 2**30 of them, and numbers in an image"
    return _triton.missing()


def slower(problem: Problem) -> str | None:
    """Why cuDNN is expected to be faster; None where it is not."""
    if problem.pool == 1:
        return "without a pool it saves no pass through memory, and cuDNN's convolution is faster"
    if problem.taps > MOST_TAPS:
        return (
            f"{problem.taps} products for each output (at most {MOST_TAPS}): cuDNN's rate counts for more than memory"
        )
    if problem.outputs // problem.groups < FEW_CHANNELS // 2:
        return f"{problem.outputs // problem.groups} output channels in a group leave most of a tile of 16 empty"
    return None


def configure(problem: Problem) -> dict[str, int]:
    """Tile sizes by rule: the forward pass's, and with "weight_" and "input_" those of the gradients.

    Tiles of 128 x 64 sums in half precision, and for float32 of 32 x 32: from 64 rows on, Triton 3.7 rounds float32 to
    TF32 on sm_100 although told not to. "width" is how many of a window's places are rows of one product: 4 where the
    pool is even, else one at a time. Where that makes too few programs to fill a device, tiles hold half as many rows.
    """
    width = 1 if problem.pool % 2 else 4
    rows = 32 if problem.dtype == "float32" else 128 // (2 if width == 1 else 1)
    positions = problem.batch * problem.out_size[0] * problem.out_size[1]
    if positions * width // rows * problem.groups < PROGRAMS // 2:
        rows //= 2
    shared = {"width": width, "block_m": rows // width, "weight_num_stages": 2, "input_num_stages": 2}
    return shared | (_float32 if problem.dtype == "float32" else _half)(problem, width)


def _float32(problem: Problem, width: int) -> dict[str, int]:
    inputs, outputs = problem.inputs // problem.groups, problem.outputs // problem.groups
    flat = is_flat(problem)
    # shorter sums where more would take more registers than there are: sums kept over rounds, uneven addresses
    deep = 16 if not flat and (width == 1 or inputs % 16 or outputs % 16) else 32
    return {
        "block_n": power_of_2(outputs, 16, 32 if width > 1 else 16),
        "block_k": power_of_2(problem.taps if flat else inputs, 16, deep),
        "num_warps": 4,
        "num_stages": 2,
        "weight_block_m": power_of_2(outputs, 16, 32),
        "weight_block_n": power_of_2(problem.taps if flat else inputs, 16, 32),
        "weight_block_k": 32,
        "weight_num_warps": 4,
        "weight_programs": 4 * PROGRAMS,  # of 4 warps, a processor has room for 8
        "input_block_m": 32,
        "input_block_n": power_of_2(inputs, 16, 32),
        "input_block_k": power_of_2(outputs, 16, deep),
        "input_num_warps": 4,
    }


def _half(problem: Problem, width: int) -> dict[str, int]:
    inputs, outputs = problem.inputs // problem.groups, problem.outputs // problem.groups
    flat = is_flat(problem)
    # more warps, and so registers, for sums kept over rounds and for addresses that are not side by side
    wide = width == 1 or (problem.taps > 16 if flat else inputs % 16 or not problem.channels_last)
    uneven = not flat and (inputs % 16 or outputs % 16)
    return {
        "block_n": power_of_2(outputs, 16, 64 if width > 1 else 32),
        "block_k": power_of_2(problem.taps if flat else inputs, 16, 64),
        "num_warps": 8 if wide else 4,
        "num_stages": 2 if flat else 3,
        "weight_block_m": power_of_2(outputs, 16, 64),
        "weight_block_n": power_of_2(problem.taps if flat else inputs, 16, 64),
        "weight_block_k": 64,
        "weight_num_warps": 8,
        "weight_programs": PROGRAMS,
        "input_block_m": 64,
        "input_block_n": power_of_2(inputs, 16, 64),
        "input_block_k": power_of_2(outputs, 16, 64),
        "input_num_warps": 8 if uneven else 4,
    }


def candidates(problem: Problem) -> list[Configuration]:
    """Configurations worth timing, the rule's first: each changes one of the passes."""
    rule, half = configure(problem), problem.dtype != "float32"
    # where float32 may be rounded there is no fault to keep away from, and a program of few rows is mostly addresses
    rounded = not half and launch.precision_of(problem) == "tf32"
    changes: list[dict[str, int]] = [
        {},
        {"block_n": max(rule["block_n"] // 2, 16)},
        {"block_k": max(rule["block_k"] // 2, 16)},
        {"num_stages": rule["num_stages"] + 1},
        {"num_warps": 2 * rule["num_warps"]},
        *([{"block_m": rule["block_m"] // 2}, {"block_m": 2 * rule["block_m"], "num_warps": 8}] if half else []),
        *([{"block_m": 2 * rule["block_m"]}, {"block_m": 4 * rule["block_m"]}] if rounded else []),
    ]
    if problem.needs_grad:
        changes += [
            {"weight_num_warps": 4 if half else 2},
            {"weight_block_k": 32, "weight_num_stages": 3},
            {"weight_programs": PROGRAMS * (4 if half else 1)},
            {"input_num_stages": 3},
            *([{"input_block_m": 128, "input_num_warps": 8}] if half else []),
            *([{"input_block_m": 64}] if rounded else []),
        ]
    return list(dict.fromkeys(tuple(sorted((rule | change).items())) for change in changes))


def forward(
    problem: Problem, x: Tensor, weight: Tensor, bias: Tensor | None, configuration: Configuration = ()
) -> tuple[Tensor, Tensor | None]:
    """y and argmax; see the package's head."""
    chosen = configure(problem) | dict(configuration)
    y = launch.empty(problem, x, problem.outputs, problem.out_size, x.dtype)
    argmax = launch.empty(problem, x, problem.outputs, problem.out_size, torch.uint8) if problem.saves_argmax else None
    x, weight = launch.as_pixels(problem, x), launch.as_rows(problem, weight)
    launch.forward(problem, chosen, x, weight, bias, y, argmax).run()
    return y, argmax


def backward(
    problem: Problem,
    x: Tensor,
    weight: Tensor,
    argmax: Tensor | None,
    d_y: Tensor,
    wanted: Sequence[bool],
    configuration: Configuration = (),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias; see the package's head."""
    chosen = configure(problem) | dict(configuration)
    d_x = d_weight = d_bias = None
    d_y, argmax = launch.as_pixels(problem, d_y), argmax if argmax is None else launch.as_pixels(problem, argmax)
    if wanted[0]:
        d_x = launch.empty(problem, x, problem.inputs, (problem.height, problem.width), x.dtype)
        launch.input_gradient(problem, chosen, d_y, argmax, launch.as_rows(problem, weight), d_x).run()
    if wanted[1] or (wanted[2] and problem.bias):
        weights, biases = launch.partial_sums(problem, chosen, x, wanted[2])
        launch.weight_gradient(problem, chosen, launch.as_pixels(problem, x), d_y, argmax, weights, biases).run()
        if wanted[1]:
            d_weight = launch.from_rows(problem, weights.sum(0)).to(weight.dtype)
        if biases is not None:
            d_bias = biases.sum(0).to(weight.dtype)
    return d_x, d_weight, d_bias


def compilations() -> list[Compilation]:
    """Every kernel as the rule tiles it for typical convolutions, in each dtype, pool and layout."""
    found = []
    for dtype, inputs, outputs, pool, stride, channels_last in (
        ("float32", 1, 32, 2, 1, False),
        ("bfloat16", 1, 32, 2, 1, False),
        ("float16", 3, 64, 2, 1, True),
        ("float32", 32, 64, 2, 1, True),
        ("bfloat16", 32, 64, 2, 1, True),
        ("bfloat16", 64, 64, 2, 1, True),
        ("float16", 64, 128, 2, 1, False),
        ("bfloat16", 64, 64, 3, 2, True),
        ("float32", 3, 32, 2, 1, False),
        ("float16", 20, 50, 2, 1, False),
        ("float32", 32, 64, 3, 1, True),
        ("float32", 20, 50, 2, 1, False),
        ("float32", 20, 50, 3, 2, False),
    ):
        problem = Problem(
            *("torch", "cuda", dtype, 256, inputs, 56, 56, outputs, 3, 3),
            stride=(stride, stride),
            padding=(1, 1, 1, 1),
            activation="relu",
            pool=pool,
            channels_last=channels_last,
            needs_grad=True,
        )
        layout = "NHWC" if channels_last else "NCHW"
        name = f"{inputs}->{outputs} 3x3 stride={stride} pool={pool} {layout} {dtype}"
        for precision in ("ieee", "tf32") if dtype == "float32" else ("ieee",):
            found += _compiled(problem, f"{name} {precision}" if dtype == "float32" else name, precision)
    return found


def _compiled(problem: Problem, name: str, precision: str) -> Iterable[Compilation]:
    chosen, dtype = configure(problem), getattr(torch, problem.dtype)
    x = torch.empty(0, dtype=dtype, device="meta")
    weight, bias = x, torch.empty(problem.outputs, dtype=dtype, device="meta")
    x = launch.empty(problem, x, problem.inputs, (problem.height, problem.width), dtype)
    y = launch.empty(problem, x, problem.outputs, problem.out_size, dtype)
    argmax = launch.empty(problem, x, problem.outputs, problem.out_size, torch.uint8)
    cores = problem.dtype != "float32" or precision == "tf32"
    targets = ("sm_80", "sm_90", "sm_100") if precision == "tf32" else None
    read_x, d_y, saved = (launch.as_pixels(problem, image) for image in (x, y, argmax))
    sums = launch.partial_sums(problem, chosen, x, True)
    launches = {
        "forward": launch.forward(problem, chosen, read_x, weight, bias, y, argmax, precision),
        "inference": launch.forward(problem, chosen, read_x, weight, bias, y, None, precision),
        "weight gradient": launch.weight_gradient(problem, chosen, read_x, d_y, saved, *sums, precision),
        "input gradient": launch.input_gradient(problem, chosen, d_y, saved, weight, x, precision),
    }
    for part, prepared in launches.items():
        yield prepared.compilation(f"conv2d {part} {name}", tensor_cores=cores, targets=targets)
