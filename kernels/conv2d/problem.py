"""One call of the convolution, without its numbers: sizes worked out and checked once, for every implementation.

Letters: N images, I input channels, O output channels, G groups, P the pool's side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from perfkit._errors import InvalidInputError

DTYPES = ("float32", "bfloat16", "float16", "float64")
ACTIVATIONS = (None, "relu")

DEAD = 255
"""The code, in what is saved for the backward pass, of a pooled output that ReLU cut to zero: it has no gradient."""

LARGEST_POOL = 15
"""Of a larger pool, places in the window do not fit into the codes below `DEAD`."""


@dataclass(frozen=True)
class Problem:
    """A call of `conv2d`.

    Args:
        framework: "torch" or "jax".
        device: "cpu", "cuda" or "tpu".
        dtype: of x, weight and bias.
        batch, inputs, height, width: N, I and the size of the images.
        outputs, kernel_height, kernel_width: O and the size of the kernel.
        stride, dilation: (vertical, horizontal).
        padding: (top, bottom, left, right), zeros.
        groups: G; I and O are multiples of it.
        bias: there is one.
        activation: None or "relu".
        pool: P, the side and stride of the max-pool; 1 for none.
        channels_last: x and y lie in memory as NHWC, not NCHW. Always so in JAX.
        needs_grad: a backward pass may follow.
    """

    framework: str
    device: str
    dtype: str
    batch: int
    inputs: int
    height: int
    width: int
    outputs: int
    kernel_height: int
    kernel_width: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    bias: bool = True
    activation: str | None = None
    pool: int = 1
    channels_last: bool = False
    needs_grad: bool = False

    @property
    def conv_size(self) -> tuple[int, int]:
        """Height and width of what the convolution makes, before the pool."""
        top, bottom, left, right = self.padding
        return (
            _length(self.height + top + bottom, self.kernel_height, self.stride[0], self.dilation[0]),
            _length(self.width + left + right, self.kernel_width, self.stride[1], self.dilation[1]),
        )

    @property
    def out_size(self) -> tuple[int, int]:
        """Height and width of y: the pool cuts off what does not fill a window."""
        height, width = self.conv_size
        return height // self.pool, width // self.pool

    @property
    def taps(self) -> int:
        """Products summed for one output of the convolution: input channels of a group times the kernel's size."""
        return self.inputs // self.groups * self.kernel_height * self.kernel_width

    @property
    def saves_argmax(self) -> bool:
        """The backward pass needs to know which places won, and which were cut."""
        return self.needs_grad and (self.pool > 1 or self.activation == "relu")

    @property
    def bucket(self) -> str:
        """The batch rounded up to a power of two; what the weights are made for, and the image, as they are."""
        kernel = f"{self.kernel_height}x{self.kernel_width}"
        parts = [f"N{1 << (self.batch - 1).bit_length()}", f"I{self.inputs}", f"{self.height}x{self.width}"]
        parts += [f"O{self.outputs}", f"K{kernel}", "S{}x{}".format(*self.stride), "P{}.{}.{}.{}".format(*self.padding)]
        parts += ["D{}x{}".format(*self.dilation), f"G{self.groups}", self.activation or "linear", f"pool{self.pool}"]
        parts += ["nhwc" if self.channels_last else "nchw", "train" if self.needs_grad else "infer"]
        return "-".join(parts)


@dataclass(frozen=True)
class Options:
    """What a call of `conv2d` says beside its arrays, in the form of `Problem`'s fields; "same" awaits sizes."""

    stride: tuple[int, int]
    padding: tuple[int, int, int, int] | str
    dilation: tuple[int, int]
    groups: int
    activation: str | None
    pool: int


def options(stride: Any, padding: Any, dilation: Any, groups: Any, activation: Any, pool: Any) -> Options:
    """Check what does not depend on sizes.

    Raises:
        InvalidInputError: an option that is none of those in `conv2d`'s docstring.
    """
    if activation not in ACTIVATIONS:
        raise InvalidInputError(f"activation is {activation!r}: expected None or 'relu'")
    if pool is not None and (not _is_integer(pool) or pool < 1):
        raise InvalidInputError(f"pool is {pool!r}: expected None, or the side of a square window, 1 or more")
    if not _is_integer(groups) or groups < 1:
        raise InvalidInputError(f"groups is {groups!r}: expected an integer, 1 or more")
    stride, dilation = _pair("stride", stride), _pair("dilation", dilation)
    return Options(stride, _padding(padding), dilation, int(groups), activation, 1 if pool is None else int(pool))


def problem(
    given: Options,
    *,
    framework: str,
    device: str,
    dtypes: dict[str, str],
    image: Sequence[int],
    kernel: Sequence[int],
    bias: Sequence[int] | None,
    channels_last: bool,
    needs_grad: bool,
) -> Problem:
    """Check what was given against each other, and work out the rest.

    Args:
        dtypes: of "x", "weight" and "bias", where there is one.
        image: x's shape as (N, I, height, width).
        kernel: weight's shape as (O, I / groups, height, width).
        bias: its shape, None where there is none.

    Raises:
        InvalidInputError: ranks, sizes or dtypes that do not go together, or an empty output.
    """
    check_ranks(framework, len(image), len(kernel))
    if len(set(dtypes.values())) > 1 or dtypes["x"] not in DTYPES:
        told = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise InvalidInputError(f"dtypes are {told}: expected one of {', '.join(DTYPES)} for all of them")
    (batch, inputs, height, width), (outputs, of_group, kernel_height, kernel_width) = image, kernel
    if 0 in image or 0 in kernel:
        raise InvalidInputError(f"x has shape {list(image)} and weight {list(kernel)}: expected no empty dimension")
    if of_group * given.groups != inputs or outputs % given.groups:
        raise InvalidInputError(
            f"x has {inputs} channels, and weight takes {of_group} to {outputs} in groups={given.groups}: expected "
            f"{of_group} x {given.groups} = {of_group * given.groups} channels, and outputs a multiple of groups"
        )
    if bias is not None and tuple(bias) != (outputs,):
        raise InvalidInputError(f"bias has shape {list(bias)}: expected [{outputs}], one number per output channel")
    made = Problem(
        framework,
        device,
        dtypes["x"],
        batch,
        inputs,
        height,
        width,
        outputs,
        kernel_height,
        kernel_width,
        given.stride,
        resolved(given, (height, width), (kernel_height, kernel_width)),
        given.dilation,
        given.groups,
        bias is not None,
        given.activation,
        given.pool,
        channels_last,
        needs_grad,
    )
    if min(made.out_size) < 1:
        raise InvalidInputError(
            f"an image of {height}x{width} with padding {made.padding} leaves nothing of a {kernel_height}x"
            f"{kernel_width} kernel (dilation {made.dilation}, stride {made.stride}) and pool {made.pool}: the "
            f"convolution makes {made.conv_size[0]}x{made.conv_size[1]}"
        )
    return made


def check_ranks(framework: str, image: int, kernel: int) -> None:
    """x and weight have four dimensions."""
    if image != 4 or kernel != 4:
        layouts = ("(N, C, H, W)", "(O, I, H, W)") if framework == "torch" else ("(N, H, W, C)", "(H, W, I, O)")
        raise InvalidInputError(
            f"x has {image} dimensions and weight {kernel}: expected {layouts[0]} and {layouts[1]}; give a single "
            "image a batch of one"
        )


def resolved(given: Options, image: tuple[int, int], kernel: tuple[int, int]) -> tuple[int, int, int, int]:
    """The padding in numbers. "same" makes ceil(size / stride) outputs, the odd zero behind: torch's rule and XLA's."""
    if isinstance(given.padding, tuple):
        return given.padding
    sides: list[int] = []
    for size, length, stride, dilation in zip(image, kernel, given.stride, given.dilation, strict=True):
        wanted = -(-size // stride)
        total = max((wanted - 1) * stride + (length - 1) * dilation + 1 - size, 0)
        sides += [total // 2, total - total // 2]
    return sides[0], sides[1], sides[2], sides[3]


def _length(padded: int, kernel: int, stride: int, dilation: int) -> int:
    return (padded - (kernel - 1) * dilation - 1) // stride + 1


def _is_integer(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


def _pair(name: str, value: Any, least: int = 1) -> tuple[int, int]:
    pair = (value, value) if _is_integer(value) else tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(pair) != 2 or not all(_is_integer(part) and part >= least for part in pair):
        raise InvalidInputError(f"{name} is {value!r}: expected an integer or a pair of them, {least} or more")
    return int(pair[0]), int(pair[1])


def _padding(value: Any) -> tuple[int, int, int, int] | str:
    if isinstance(value, str):
        if value.lower() not in ("same", "valid"):
            raise InvalidInputError(f"padding is {value!r}: expected 'same', 'valid' or numbers")
        return "same" if value.lower() == "same" else (0, 0, 0, 0)
    sides = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if len(sides) == 2 and any(isinstance(side, (tuple, list)) for side in sides):
        vertical, horizontal = (_pair("padding", side, 0) for side in sides)
        return *vertical, *horizontal
    vertical, horizontal = _pair("padding", value, 0)
    return vertical, vertical, horizontal, horizontal
