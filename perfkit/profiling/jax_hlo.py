"""A compiled XLA program as its compiler left it: instructions, their order, and what they are fused of.

Source: openxla/xla, xla/service/hlo.proto and xla/xla_data.proto, for the numbers of the fields.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from perfkit.backends.jax_training import OPTIMIZER
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

NO_WORK = frozenset({"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"})
CONTROL = frozenset({"while", "call", "conditional", "async-start", "async-done", "async-update"})
"""Operations that run others, which have their own times."""

_PICKS = frozenset({"dynamic-slice", "gather"})


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


class Program:
    """A compiled program.

    Args:
        serialized: a HloModuleProto.
    """

    def __init__(self, serialized: bytes):
        message = Message(serialized)
        self.name, self.id, self.entry = message.text(1), message.integer(5), message.integer(6)
        self.instructions: dict[int, Instruction] = {}
        self.computations: dict[int, Computation] = {}
        orders = _orders(message)
        for computation in message.messages(3):
            raw = {each.integer(35): each for each in computation.messages(2)}
            near = {key: _instruction(each) for key, each in raw.items()}
            for key, item in near.items():
                self.instructions[key] = replace(item, product_flops=_product_flops(item, raw[key], near))
            here = computation.integer(5)
            order = tuple(orders.get(here, near))
            self.computations[here] = Computation(here, computation.text(1), order, computation.integer(6))
        self.named = {item.name: item for item in self.instructions.values()}
        self._found: dict[int, str] = {}
        self.users: dict[int, list[int]] = {}
        for item in self.instructions.values():
            for operand in item.operands:
                self.users.setdefault(operand, []).append(item.id)

    def inside(self, item: Instruction) -> Iterator[Instruction]:
        """What a fusion is made of, in order; of anything else, itself."""
        if item.opcode != "fusion":
            yield item
            return
        for called in item.called:
            for inner in self.computations[called].instructions:
                yield from self.inside(self.instructions[inner])

    def op_name(self, item: Instruction) -> str:
        """Its own name, or that of what it is made of.

        Where the compiler gave it none: of who uses its result first, since most of these prepare something. Only what
        an optimizer uses is a gradient, which belongs to what it was made from.
        """
        if own := self._own_name(item):
            return own
        after = self._near(item, self.users.get(item.id, ()), downward=True)
        if after and OPTIMIZER not in after:
            return after
        return self._near(item, item.operands, downward=False) or after

    def name_products(self, wanted: dict[str, float]) -> None:
        """Give products that the compiler left without a name the names of those that are missing.

        Args:
            wanted: names of products that no instruction has, with their operations.
        """
        nameless = [item for item in self.instructions.values() if item.product_flops and "/" not in item.op_name]
        nameless = [item for item in nameless if item.opcode != "custom-call"]
        for name, flops in sorted(wanted.items(), key=lambda each: -each[1]):
            if nameless:
                item = min(nameless, key=lambda item: abs(math.log(item.product_flops / flops)))
                nameless.remove(item)
                for inner in (item, *self._around(item)):
                    self._found[inner.id] = name

    def _around(self, item: Instruction) -> list[Instruction]:
        """The fusion that it is a part of."""
        within = [key for key, computation in self.computations.items() if item.id in computation.instructions]
        return [each for each in self.instructions.values() if each.opcode == "fusion" and within[0] in each.called]

    def moved_bytes(self, item: Instruction) -> float:
        """Inputs and outputs, each once; of an array that is only picked from or written into, that part."""
        if item.opcode in NO_WORK or item.opcode in CONTROL:
            return 0.0
        if item.opcode == "fusion":
            inner = self.computations[item.called[0]]
            return self._read(inner) + self._written(self.instructions[inner.root])
        written = self._written(item)
        if item.opcode in _PICKS:
            return 2 * written
        if item.opcode == "dynamic-update-slice":
            return 2 * written
        return written + sum(self.instructions[operand].bytes for operand in dict.fromkeys(item.operands))

    def shapes(self, item: Instruction) -> str:
        """Of the inputs, for reading."""
        operands = [self.instructions[operand] for operand in item.operands]
        found = [str(array) for operand in operands if operand.opcode != "constant" for array in operand.arrays]
        return ", ".join(found[:4]) + (", …" if len(found) > 4 else "")

    def _read(self, inner: Computation) -> float:
        total = 0.0
        for item in map(self.instructions.__getitem__, inner.instructions):
            if item.opcode != "parameter":
                continue
            users = [self.instructions[user] for user in self._through(item)]
            if users and all(user.opcode in _PICKS for user in users):
                total += sum(user.bytes for user in users)
            elif not any(user.opcode == "dynamic-update-slice" and user.operands[0] == item.id for user in users):
                total += item.bytes
        return total

    def _through(self, item: Instruction) -> list[int]:
        """Users, behind bitcasts where there are any."""
        found = []
        for user in self.users.get(item.id, ()):
            inner = self.instructions[user]
            found += self._through(inner) if inner.opcode == "bitcast" else [user]
        return found

    def _written(self, item: Instruction) -> float:
        if item.opcode == "dynamic-update-slice":
            return self.instructions[item.operands[1]].bytes
        if item.opcode in ("tuple", "bitcast"):
            return sum(self._written(self.instructions[operand]) for operand in item.operands)
        return item.bytes

    def _own_name(self, item: Instruction) -> str:
        if item.opcode in ("parameter", "constant"):
            return ""
        if item.id in self._found:
            return self._found[item.id]
        if "/" in item.op_name:
            return item.op_name
        names = [inner.op_name for inner in self.inside(item) if inner.opcode not in NO_WORK and "/" in inner.op_name]
        return names[-1] if names else ""

    def _near(self, item: Instruction, first: Iterable[int], downward: bool) -> str:
        """The name of the nearest instruction that has one, among users or among operands."""
        seen, waiting = {item.id}, deque(first)
        while waiting:
            nearby = self.instructions[waiting.popleft()]
            if nearby.id not in seen:
                seen.add(nearby.id)
                if name := self._own_name(nearby):
                    return name
                waiting += self.users.get(nearby.id, ()) if downward else nearby.operands
        return ""


def program(executable: Any) -> Program:
    """Of a loaded executable, or of `Compiled.runtime_executable()`."""
    return Program(executable.hlo_modules()[0].as_serialized_hlo_module_proto())


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
