"""The Triton kernels of conv2d on torch tensors: which calls they take, how they are tiled, and their launches.

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
from perfkit.kernels._launch import Launch, power_of_2
from perfkit.kernels._triton import Compilation
from perfkit.kernels.conv2d.problem import DEAD, Problem

Configuration = Sequence[tuple[str, int]]

MOST_TAPS = 576
"""Longer sums cost more in these kernels than the pass through memory that they save costs cuDNN: an estimate from half
of cuDNN's arithmetic rate, and an H100's arithmetic and bandwidth."""

FEW_CHANNELS = 16
"""With fewer input channels in a group, taps and channels are summed as one index: a product sums 16 at least."""

PROGRAMS = 264
"""About so many sum the weight's gradient: two for each processor of an H100, on any device, for the same bits."""


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
    flat = _flat(problem)
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
        "input_block_m": 32,
        "input_block_n": power_of_2(inputs, 16, 32),
        "input_block_k": power_of_2(outputs, 16, deep),
        "input_num_warps": 4,
    }


def _half(problem: Problem, width: int) -> dict[str, int]:
    inputs, outputs = problem.inputs // problem.groups, problem.outputs // problem.groups
    flat = _flat(problem)
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
        "input_block_m": 64,
        "input_block_n": power_of_2(inputs, 16, 64),
        "input_block_k": power_of_2(outputs, 16, 64),
        "input_num_warps": 8 if uneven else 4,
    }


def candidates(problem: Problem) -> list[Configuration]:
    """Configurations worth timing, the rule's first: each changes one of the passes."""
    rule, half = configure(problem), problem.dtype != "float32"
    changes: list[dict[str, int]] = [
        {},
        {"block_n": max(rule["block_n"] // 2, 16)},
        {"block_k": max(rule["block_k"] // 2, 16)},
        {"num_stages": rule["num_stages"] + 1},
        {"num_warps": 2 * rule["num_warps"]},
        *([{"block_m": rule["block_m"] // 2}, {"block_m": 2 * rule["block_m"], "num_warps": 8}] if half else []),
    ]
    if problem.needs_grad:
        changes += [
            {"weight_num_warps": 4 if half else 2},
            {"weight_block_k": 32, "weight_num_stages": 3},
            {"input_num_stages": 3},
            *([{"input_block_m": 128, "input_num_warps": 8}] if half else []),
        ]
    return list(dict.fromkeys(tuple(sorted((rule | change).items())) for change in changes))


def forward(
    problem: Problem, x: Tensor, weight: Tensor, bias: Tensor | None, configuration: Configuration = ()
) -> tuple[Tensor, Tensor | None]:
    """y and argmax; see the package's head."""
    y = _empty(problem, x, problem.outputs, problem.out_size, x.dtype)
    argmax = _empty(problem, x, problem.outputs, problem.out_size, torch.uint8) if problem.saves_argmax else None
    _forward(problem, _pixels(problem, x), _rows(problem, weight), bias, y, argmax, configuration).run()
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
    d_x = d_weight = d_bias = None
    d_y, argmax = _pixels(problem, d_y), argmax if argmax is None else _pixels(problem, argmax)
    if wanted[0]:
        d_x = _empty(problem, x, problem.inputs, (problem.height, problem.width), x.dtype)
        _input(problem, d_y, argmax, _rows(problem, weight), d_x, configuration).run()
    if wanted[1] or (wanted[2] and problem.bias):
        weights, biases = _partial(problem, x, wanted[2], configuration)
        _weight(problem, _pixels(problem, x), d_y, argmax, weights, biases, configuration).run()
        if wanted[1]:
            d_weight = _columns(problem, weights.sum(0)).to(weight.dtype)
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
    dtype = getattr(torch, problem.dtype)
    x = torch.empty(0, dtype=dtype, device="meta")
    weight, bias = x, torch.empty(problem.outputs, dtype=dtype, device="meta")
    x = _empty(problem, x, problem.inputs, (problem.height, problem.width), dtype)
    y = _empty(problem, x, problem.outputs, problem.out_size, dtype)
    argmax = _empty(problem, x, problem.outputs, problem.out_size, torch.uint8)
    cores = problem.dtype != "float32" or precision == "tf32"
    targets = ("sm_80", "sm_90", "sm_100") if precision == "tf32" else None
    read_x, d_y, saved = (_pixels(problem, image) for image in (x, y, argmax))
    launches = {
        "forward": _forward(problem, read_x, weight, bias, y, argmax, (), precision),
        "inference": _forward(problem, read_x, weight, bias, y, None, (), precision),
        "weight gradient": _weight(problem, read_x, d_y, saved, *_partial(problem, x, True, ()), (), precision),
        "input gradient": _input(problem, d_y, saved, weight, x, (), precision),
    }
    for part, launch in launches.items():
        yield launch.compilation(f"conv2d {part} {name}", tensor_cores=cores, targets=targets)


def _forward(problem, x, weight, bias, y, argmax, configuration, precision=None):
    from perfkit.kernels.conv2d.triton_forward import conv_pool

    chosen = configure(problem) | dict(configuration)
    outputs, (height, width) = problem.outputs // problem.groups, problem.out_size
    positions = problem.batch * height * width
    return Launch(
        conv_pool,
        _tiles(positions, chosen["block_m"]) * _tiles(outputs, chosen["block_n"]) * problem.groups,
        {"x": x, "weight": weight, "bias": bias, "y": y, "argmax": argmax, **_sizes(problem, x, y)},
        {
            **_constants(problem, precision),
            "RELU": problem.activation == "relu",
            "DEAD": DEAD,
            "WIDTH": chosen["width"],
            **_blocks(chosen),
        },
        _options(chosen),
    )


def _weight(problem, x, d_y, argmax, d_weight, d_bias, configuration, precision=None):
    from perfkit.kernels.conv2d.triton_backward import conv_pool_weight

    chosen = configure(problem) | dict(configuration)
    slabs, slab = _slabs(problem, chosen)
    return Launch(
        conv_pool_weight,
        slabs * _weight_tiles(problem, chosen),
        {
            "x": x,
            "d_y": d_y,
            "argmax": argmax,
            "d_weight": d_weight,
            "d_bias": d_bias,
            **_sizes(problem, x, d_y),
            "slab": slab,
        },
        {**_constants(problem, precision), **_blocks(chosen, "weight_")},
        _options(chosen, "weight_"),
    )


def _input(problem, d_y, argmax, weight, d_x, configuration, precision=None):
    from perfkit.kernels.conv2d.triton_backward import conv_pool_input

    chosen = configure(problem) | dict(configuration)
    stride_h, stride_w = problem.stride
    positions = problem.batch * _tiles(problem.height, stride_h) * _tiles(problem.width, stride_w)
    tiles = _tiles(problem.inputs // problem.groups, chosen["input_block_n"])
    return Launch(
        conv_pool_input,
        _tiles(positions, chosen["input_block_m"]) * stride_h * stride_w * problem.groups * tiles,
        {"d_y": d_y, "argmax": argmax, "weight": weight, "d_x": d_x, **_sizes(problem, d_x, d_y)},
        {**_constants(problem, precision), **_blocks(chosen, "input_")},
        _options(chosen, "input_"),
    )


def _sizes(problem: Problem, x: Tensor, y: Tensor) -> dict[str, int]:
    """The kernels' integers: sizes, and strides of tensors like x and like y."""
    names = ("image", "channel", "row", "column")
    return {
        "batch": problem.batch,
        "out_channels": problem.outputs // problem.groups,
        "groups": problem.groups,
        "height": problem.height,
        "width": problem.width,
        "pooled_height": problem.out_size[0],
        "pooled_width": problem.out_size[1],
        **{f"x_{name}": stride for name, stride in zip(names, x.stride(), strict=True)},
        **{f"y_{name}": stride for name, stride in zip(names, y.stride(), strict=True)},
    }


def _constants(problem: Problem, precision: str | None) -> dict[str, int | str]:
    return {
        "CHANNELS": problem.inputs // problem.groups,
        "KERNEL_H": problem.kernel_height,
        "KERNEL_W": problem.kernel_width,
        "STRIDE_H": problem.stride[0],
        "STRIDE_W": problem.stride[1],
        "PADDING_H": problem.padding[0],
        "PADDING_W": problem.padding[2],
        "DILATION_H": problem.dilation[0],
        "DILATION_W": problem.dilation[1],
        "POOL": problem.pool,
        "FLAT": _flat(problem),
        "PRECISION": precision or _precision(problem),
    }


def _blocks(chosen: dict[str, int], part: str = "") -> dict[str, int]:
    return {f"BLOCK_{letter}": chosen[f"{part}block_{letter.lower()}"] for letter in "MNK"}


def _options(chosen: dict[str, int], part: str = "") -> dict[str, int]:
    return {name: chosen[f"{part}{name}"] for name in ("num_warps", "num_stages")}


def _precision(problem: Problem) -> str:
    if problem.dtype != "float32" or problem.device != "cuda" or torch.version.hip:
        return "ieee"
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


def _flat(problem: Problem) -> bool:
    return problem.inputs // problem.groups < FEW_CHANNELS


def _rows(problem: Problem, weight: Tensor) -> Tensor:
    """The weight as the kernels read it: each output channel's numbers, channels last unless there are few."""
    return (weight if _flat(problem) else weight.permute(0, 2, 3, 1)).contiguous()


def _pixels(problem: Problem, image: Tensor) -> Tensor:
    """x, or what is like y, as the kernels read it: channels last unless there are few, to load several at once."""
    return image if _flat(problem) else image.contiguous(memory_format=torch.channels_last)


def _columns(problem: Problem, rows: Tensor) -> Tensor:
    """The inverse of `_rows`: (O, I, H, W), contiguous."""
    kernel, inputs = (problem.kernel_height, problem.kernel_width), problem.inputs // problem.groups
    if _flat(problem):
        return rows.view(problem.outputs, inputs, *kernel)
    return rows.view(problem.outputs, *kernel, inputs).permute(0, 3, 1, 2).contiguous()


def _partial(
    problem: Problem, x: Tensor, with_bias: bool, configuration: Configuration
) -> tuple[Tensor, Tensor | None]:
    """Room for each slab's sums: of weight, and of bias where there is one."""
    slabs, _ = _slabs(problem, configure(problem) | dict(configuration))
    weights = x.new_empty((slabs, problem.outputs, problem.taps), dtype=torch.float32)
    return weights, x.new_empty((slabs, problem.outputs), dtype=torch.float32) if with_bias and problem.bias else None


def _slabs(problem: Problem, chosen: dict[str, int]) -> tuple[int, int]:
    """How many programs share a tile of the weight's gradient, and how many places before the pool each sums over."""
    places = problem.batch * problem.out_size[0] * problem.out_size[1] * problem.pool**2
    step = chosen["weight_block_k"]
    count = max(1, min(PROGRAMS // _weight_tiles(problem, chosen), places // (8 * step)))
    slab = _tiles(_tiles(places, count), step) * step
    return _tiles(places, slab), slab


def _weight_tiles(problem: Problem, chosen: dict[str, int]) -> int:
    """Tiles of the weight's gradient, of all groups."""
    inputs, block = problem.inputs // problem.groups, chosen["weight_block_n"]
    columns = _tiles(problem.taps, block) if _flat(problem) else problem.taps // inputs * _tiles(inputs, block)
    return _tiles(problem.outputs // problem.groups, chosen["weight_block_m"]) * columns * problem.groups


def _empty(problem: Problem, like: Tensor, channels: int, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    layout = torch.channels_last if problem.channels_last else torch.contiguous_format
    shape = (problem.batch, channels, *size)
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=layout)


def _tiles(size: int, block: int) -> int:
    return -(-size // block)
