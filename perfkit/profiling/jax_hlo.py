"""A compiled XLA program as its compiler left it: what stands where, what is fused, what is read and written."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from perfkit.backends.jax_training import OPTIMIZER
from perfkit.profiling._wire import Message
from perfkit.profiling.jax_hlo_read import Computation, Instruction, computations

NO_WORK = frozenset({"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"})
CONTROL = frozenset({"while", "call", "conditional", "async-start", "async-done", "async-update"})
"""Operations that run others, which have their own times."""

_PICKS = frozenset({"dynamic-slice", "gather"})


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
        for computation, instructions in computations(message):
            self.computations[computation.id] = computation
            self.instructions |= instructions
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

    def shapes(self, item: Instruction, inner: Iterable[Instruction] = ()) -> str:
        """Of the inputs, for reading; of a fusion with a product in it, of the product's.

        Args:
            inner: what of a fusion is asked for.
        """
        product = max(inner, key=lambda each: each.product_flops, default=item)
        operands = [self.instructions[operand] for operand in (product if product.product_flops else item).operands]
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
