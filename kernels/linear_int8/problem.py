"""One call of `linear_int8`, without its numbers. Letters: M rows, K inputs, N outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from perfkit._errors import InvalidInputError

FLOATS = ("float32", "bfloat16", "float16")
ACTIVATIONS = (None, "relu")

MOST_INPUTS = (2**31 - 1) // (128 * 128)
"""So many products of bytes are sure to fit into int32."""


@dataclass(frozen=True)
class Problem:
    """A call of `linear_int8`.

    Args:
        framework: "torch" or "jax".
        device: "cpu", "cuda" or "tpu".
        dtype: of x: "int8", or a float one that is quantized.
        rows, inputs, outputs: M, of all dimensions but the last, K and N.
        scale: "one" for all of an int8 x, or "row"; a float x gets one for each row.
        bias: there is one.
        activation: None or "relu".
        out_dtype: of y.
        needs_grad: never.
    """

    framework: str
    device: str
    dtype: str
    rows: int
    inputs: int
    outputs: int
    scale: str = "row"
    bias: bool = True
    activation: str | None = None
    out_dtype: str = "float32"
    needs_grad: bool = False

    @property
    def bucket(self) -> str:
        """Rows rounded up to a power of two; what the weight is made for as it is."""
        parts = [f"M{1 << (max(self.rows, 1) - 1).bit_length()}", f"K{self.inputs}", f"N{self.outputs}", self.scale]
        return "-".join([*parts, "bias" if self.bias else "plain", self.activation or "linear", self.out_dtype])


def problem(
    framework: str,
    device: str,
    *,
    shapes: dict[str, Sequence[int]],
    dtypes: dict[str, str],
    activation: str | None,
    out_dtype: str,
) -> Problem:
    """Check what was given against each other.

    Args:
        shapes, dtypes: of "x", "weight" and "weight_scale", and of "bias" and "x_scale" where they are there.

    Raises:
        InvalidInputError: ranks, sizes, dtypes or options that do not go together.
    """
    if activation not in ACTIVATIONS:
        raise InvalidInputError(f"activation is {activation!r}: expected None or 'relu'")
    if out_dtype not in FLOATS:
        raise InvalidInputError(f"out_dtype is {out_dtype}: expected {', '.join(FLOATS)}")
    x, weight = shapes["x"], shapes["weight"]
    if len(x) < 1 or len(weight) != 2 or x[-1] != weight[1] or min(weight) < 1:
        raise InvalidInputError(f"x has shape {list(x)} and weight {list(weight)}: expected (..., K) and (N, K)")
    if weight[1] > MOST_INPUTS:
        raise InvalidInputError(f"{weight[1]} inputs could overflow int32: at most {MOST_INPUTS}")
    if dtypes["weight"] != "int8" or dtypes["x"] not in ("int8", *FLOATS):
        raise InvalidInputError(
            f"x is {dtypes['x']} and weight {dtypes['weight']}: expected int8 or {', '.join(FLOATS)}, and int8"
        )
    for name in ("weight_scale", "bias"):
        if name in shapes and tuple(shapes[name]) != (weight[0],):
            raise InvalidInputError(f"{name} has shape {list(shapes[name])}: expected [{weight[0]}], one per output")
    for name in ("weight_scale", "x_scale"):
        if name in dtypes and dtypes[name] != "float32":
            raise InvalidInputError(f"{name} is {dtypes[name]}: expected float32")
    if dtypes.get("bias", "float32") not in (*FLOATS, "float64"):
        raise InvalidInputError(f"bias is {dtypes['bias']}: expected a float dtype")
    if ("x_scale" in shapes) != (dtypes["x"] == "int8"):
        told = "needs x_scale" if dtypes["x"] == "int8" else "is quantized here: it takes no x_scale"
        raise InvalidInputError(f"x is {dtypes['x']} and {told}")
    one = "x_scale" in shapes and math.prod(shapes["x_scale"]) == 1
    if "x_scale" in shapes and not one and tuple(shapes["x_scale"]) not in (tuple(x[:-1]), (*x[:-1], 1)):
        raise InvalidInputError(f"x_scale has shape {list(shapes['x_scale'])}: expected one number or {list(x[:-1])}")
    return Problem(
        framework,
        device,
        dtypes["x"],
        math.prod(x[:-1]),
        weight[1],
        weight[0],
        "one" if one else "row",
        "bias" in shapes,
        activation,
        out_dtype,
    )
