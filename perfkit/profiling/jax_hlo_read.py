"""What an XLA program's serialized form holds: instructions, and the functions that they stand in.

Source: openxla/xla, xla/service/hlo.proto and xla/xla_data.proto, for the numbers of the fields.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from perfkit.profiling._wire import Message

_DTYPES = {
    1: ("bool", 8), 2: ("int8", 8), 3: ("int16", 16), 4: ("int32", 32), 5: ("int64", 64), 6: ("uint8", 8),
    7: ("uint16", 16), 8: ("uint32", 32), 9: ("uint64", 64), 10: ("float16", 16), 11: ("float32", 32),
    12: ("float64", 64), 15: ("complex64", 64), 16: ("bfloat16", 16), 18: ("complex128", 128),
    19: ("float8_e5m2", 8), 20: ("float8_e4m3fn", 8), 21: ("int4", 4), 22: ("uint4", 4),
    23: ("float8_e4m3b11fnuz", 8), 24: ("float8_e5m2fnuz", 8), 25: ("float8_e4m3fnuz", 8), 26: ("int2", 2),
    27: ("uint2", 2), 28: ("float8_e4m3", 8), 29: ("float8_e3m4", 8), 30: ("int1", 1), 31: ("uint1", 1),
    32: ("float4_e2m1fn", 4), 33: ("float8_e8m0fnu", 8),
}  # fmt: skip


@dataclass(frozen=True)
class Array:
    """Type of one array."""

    dtype: str
    dims: tuple[int, ...]
    bits: int

    @property
    def bytes(self) -> float:
        return math.prod(self.dims) * self.bits / 8

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.dims)}"


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Args:
        arrays: its result; several where it is a tuple.
        op_name: the path of the JAX operation it came from; "" where the compiler made it.
        target: of a custom call.
        product_flops: of a dot or a convolution, as the compiler counts them, zero taps included; of a custom call, as
            of a matrix product of its arrays' sizes; else 0.
    """

    id: int
    name: str
    opcode: str
    arrays: tuple[Array, ...]
    op_name: str
    operands: tuple[int, ...]
    called: tuple[int, ...]
    number: int
    target: str
    product_flops: float = 0.0

    @property
    def bytes(self) -> float:
        return sum(array.bytes for array in self.arrays)


@dataclass(frozen=True)
class Computation:
    """A function of the program; its instructions in the order in which they are scheduled."""

    id: int
    name: str
    instructions: tuple[int, ...]
    root: int


def computations(message: Message) -> Iterator[tuple[Computation, dict[int, Instruction]]]:
    """The functions of a HloModuleProto with their instructions."""
    orders = _orders(message)
    for each in message.messages(3):
        raw = {item.integer(35): item for item in each.messages(2)}
        near = {key: _instruction(item) for key, item in raw.items()}
        found = {key: replace(item, product_flops=_product_flops(item, raw[key], near)) for key, item in near.items()}
        here = each.integer(5)
        yield Computation(here, each.text(1), tuple(orders.get(here, found)), each.integer(6)), found


def _orders(message: Message) -> dict[int, list[int]]:
    """The schedule: instructions by computation."""
    found: dict[int, list[int]] = {}
    for schedule in message.messages(7):
        for entry in schedule.messages(1):
            sequences = entry.messages(2)
            found[entry.integer(1)] = sequences[0].integers(1) if sequences else []
    return found


def _instruction(message: Message) -> Instruction:
    metadata = message.messages(7)
    return Instruction(
        id=message.integer(35),
        name=message.text(1),
        opcode=message.text(2),
        arrays=tuple(array for shape in message.messages(3) for array in _arrays(shape)),
        op_name=metadata[0].text(2) if metadata else "",
        operands=tuple(message.integers(36)),
        called=tuple(message.integers(38)),
        number=message.integer(9),
        target=message.text(28),
    )


def _arrays(shape: Message) -> Iterator[Array]:
    for inner in shape.messages(4):
        yield from _arrays(inner)
    if named := _DTYPES.get(shape.integer(2)):
        yield Array(named[0], tuple(shape.integers(3)), named[1])


def _product_flops(item: Instruction, message: Message, near: dict[int, Instruction]) -> float:
    if item.opcode not in ("dot", "convolution", "custom-call") or len(item.operands) < 2:
        return 0.0
    given = [array for operand in item.operands[:2] for array in near[operand].arrays]
    if len(given) != 2 or not item.arrays:
        return 0.0
    left, right = given
    out = math.prod(item.arrays[0].dims)
    if item.opcode == "dot":
        return 2.0 * out * math.prod(left.dims[axis] for axis in message.messages(30)[0].integers(1))
    if item.opcode == "convolution":
        return 2.0 * out * math.prod(right.dims) / max(right.dims[message.messages(16)[0].integer(4)], 1)
    return 2.0 * math.sqrt(math.prod(left.dims) * math.prod(right.dims) * out)  # (m k)(k n)(m n) = (m k n) squared
