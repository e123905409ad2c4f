"""The Triton kernels of linear_int8 on torch tensors: tiles by rule, and their launches. Not yet measured on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from perfkit.kernels import _triton
from perfkit.kernels._launch import Launch, power_of_2
from perfkit.kernels._triton import Compilation
from perfkit.kernels.linear_int8.problem import Problem

Configuration = Sequence[tuple[str, int]]

PROCESSORS = 132
"""Of an H100: tiles shrink until there are about as many."""


def refusal(problem: Problem) -> str | None:
    """Why the kernels cannot take `problem`; None where they can."""
    if reason := _triton.missing():
        return reason
    if problem.rows * max(problem.inputs, problem.outputs) >= 2**40 or problem.rows >= 2**30:
        return "it counts rows in 32 bits: at most 2**30 of them"
    return None


def configure(problem: Problem) -> dict[str, int]:
    """Tile sizes by rule.

    128 x 128 sums in steps of 128 inputs with 8 warps where that fills the device, 64 x 64 where not, and as few rows
    as 16 for decoding, which reads weights and does little else: so it takes 256 inputs at a time, 4 deep. Where 16
    does not divide the inputs, loads are of single bytes, and tiles of 32 x 32 keep their addresses in registers.
    """
    rows = power_of_2(problem.rows, 16, 128)
    if problem.inputs % 16:
        block_k = power_of_2(problem.inputs, 32, 64)
        return _tiles(min(rows, 32), power_of_2(problem.outputs, 16, 32), block_k, 4, 2)
    if rows <= 32:
        return _tiles(rows, power_of_2(problem.outputs, 16, 32), power_of_2(problem.inputs, 32, 256), 4, 4)
    large = -(-problem.rows // 128) * -(-problem.outputs // 128) >= PROCESSORS
    if large:
        return _tiles(128, 128, power_of_2(problem.inputs, 32, 128), 8, 3)
    return _tiles(64, power_of_2(problem.outputs, 16, 64), power_of_2(problem.inputs, 32, 128), 4, 4)


def candidates(problem: Problem) -> list[Configuration]:
    """Configurations worth timing, the rule's first."""
    tiles = [configure(problem)]
    if problem.inputs % 16 == 0:
        block_k = power_of_2(problem.inputs, 32, 128)
        if problem.rows <= 32:
            rows = power_of_2(problem.rows, 16, 32)
            tiles += [
                _tiles(rows, 16, 2 * block_k, 4, 4),
                _tiles(rows, 64, block_k, 4, 4),
                _tiles(rows, 32, block_k, 2, 5),
            ]
        else:
            tiles += [_tiles(64, 64, block_k, 4, 4), _tiles(64, 128, block_k, 4, 3), _tiles(128, 64, block_k, 4, 3)]
            tiles += [_tiles(128, 128, block_k, 8, 3), _tiles(128, 128, block_k, 8, 4), _tiles(128, 256, block_k, 8, 3)]
    return list(dict.fromkeys(tuple(sorted(found.items())) for found in tiles))


def forward(
    problem: Problem,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    x_scale: Tensor | None,
    configuration: Configuration = (),
) -> Tensor:
    """(M, N) in out_dtype; see `reference.linear_int8` for the arguments."""
    x = x.contiguous()
    if x_scale is None:
        q, x_scale = torch.empty_like(x, dtype=torch.int8), x.new_empty(problem.rows, dtype=torch.float32)
        _quantization(problem, x, q, x_scale).run()
        x = q
    y = x.new_empty((problem.rows, problem.outputs), dtype=getattr(torch, problem.out_dtype))
    tensors = (x, x_scale.contiguous(), weight.contiguous(), weight_scale.contiguous(), bias, y)
    _product(problem, *tensors, configuration).run()
    return y


def compilations() -> list[Compilation]:
    """Every kernel as the rule tiles it, from decoding to large batches, and for sizes that 16 does not divide."""
    found = []
    for dtype in ("float32", "bfloat16", "float16"):
        problem = Problem("torch", "cuda", dtype, 64, 1024, 1024)
        x, scale = _meta((64, 1024), getattr(torch, dtype)), _meta((64,), torch.float32)
        launch = _quantization(problem, x, _meta((64, 1024), torch.int8), scale)
        found.append(launch.compilation(f"linear_int8 quantize {dtype}", tensor_cores=False))
    for rows, inputs, outputs, dtype in (
        (1, 4096, 4096, "bfloat16"),
        (32, 1024, 4096, "float16"),
        (64, 512, 512, "float32"),
        (512, 5408, 128, "float32"),
        (4096, 1024, 4096, "bfloat16"),
        (4096, 4096, 4096, "float32"),
        (64, 100, 10, "float32"),
        (4096, 1001, 999, "float32"),
    ):
        problem = Problem("torch", "cuda", "float32", rows, inputs, outputs, activation="relu", out_dtype=dtype)
        launch = _product(
            problem,
            _meta((rows, inputs), torch.int8),
            _meta((rows,), torch.float32),
            _meta((outputs, inputs), torch.int8),
            *[_meta((outputs,), torch.float32)] * 2,
            _meta((rows, outputs), getattr(torch, dtype)),
        )
        found.append(launch.compilation(f"linear_int8 {rows}x{inputs}x{outputs} {dtype}", tensor_cores=True))
    return found


def _quantization(problem: Problem, x: Tensor, q: Tensor, scale: Tensor):
    from perfkit.kernels.linear_int8.triton_product import quantize_rows

    return Launch(
        quantize_rows,
        problem.rows,
        {"x": x, "q": q, "scale": scale, "inputs": problem.inputs},
        {"BLOCK_K": power_of_2(problem.inputs, 128, 2048)},
        {"num_warps": 4, "num_stages": 1},
    )


def _product(problem, x, x_scale, weight, weight_scale, bias, y, configuration=()):
    from perfkit.kernels.linear_int8.triton_product import product

    chosen = configure(problem) | dict(configuration)
    tiles = -(-problem.rows // chosen["block_m"]) * -(-problem.outputs // chosen["block_n"])
    return Launch(
        product,
        tiles,
        {
            "x": x,
            "x_scale": x_scale,
            "weight": weight,
            "weight_scale": weight_scale,
            "bias": bias,
            "y": y,
            "rows": problem.rows,
            "outputs": problem.outputs,
            "inputs": problem.inputs,
        },
        {
            "ONE_SCALE": problem.scale == "one",
            "RELU": problem.activation == "relu",
            "BLOCK_M": chosen["block_m"],
            "BLOCK_N": chosen["block_n"],
            "BLOCK_K": chosen["block_k"],
            "GROUP_M": 8,
        },
        {"num_warps": chosen["num_warps"], "num_stages": chosen["num_stages"]},
    )


def _tiles(block_m: int, block_n: int, block_k: int, num_warps: int, num_stages: int) -> dict[str, int]:
    return {
        "block_m": block_m,
        "block_n": block_n,
        "block_k": block_k,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
