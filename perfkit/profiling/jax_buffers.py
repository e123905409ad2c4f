"""What memory a compiled XLA program holds, when and for what: its buffer assignment, along its schedule.

Source: openxla/xla, xla/service/hlo.proto (BufferAssignmentProto), for the numbers of the fields.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from perfkit.profiling._wire import Message
from perfkit.profiling.jax_hlo import CONTROL, Program
from perfkit.profiling.jax_hlo_read import Instruction


@dataclass(frozen=True)
class Buffer:
    """A piece of memory with one value in it.

    Args:
        maker: the instruction that writes it.
        argument: name of the program's argument that it holds, "state[0]['fc']['kernel'].value"; "" where it is none.
        output: position in the program's result; None where it is in none.
        offset: where in the arena of temporaries it lies.
        first, last: where in the schedule it is written and last needed.
        at_peak: whether it is held when the temporaries take most.
    """

    bytes: float
    maker: Instruction
    argument: str = ""
    output: int | None = None
    offset: int = 0
    first: int = 0
    last: int = 0
    at_peak: bool = True


@dataclass(frozen=True)
class Buffers:
    """All of a program.

    Args:
        arguments: held before it runs; a donated one is an output as well.
        outputs: of memory of its own, which may hold other values before.
        temporaries: of one arena, which is as large as XLA planned it for the whole run.
        arena: its bytes.
        order: instructions, as they are scheduled; those of a loop's body once.
    """

    arguments: tuple[Buffer, ...]
    outputs: tuple[Buffer, ...]
    temporaries: tuple[Buffer, ...]
    arena: float
    order: tuple[int, ...]

    def living(self, position: int) -> Iterator[tuple[Buffer, float]]:
        """The temporaries at a place in the schedule, with their bytes; what shares its memory counts once."""
        taken = 0
        for buffer in sorted(self.temporaries, key=lambda buffer: (buffer.offset, -buffer.bytes)):
            if buffer.first <= position <= buffer.last:
                end = buffer.offset + int(buffer.bytes)
                if end > taken:
                    yield buffer, float(end - max(taken, buffer.offset))
                    taken = end


@dataclass
class _Value:
    """A value, and the instructions that it is the value of."""

    bytes: float
    maker: Instruction
    at: list[int] = field(default_factory=list)


def buffers(program: Program, assignment: bytes) -> Buffers:
    """Of a program and its `serialized_buffer_assignment_proto`."""
    message = Message(assignment)
    values = _values(program, message)
    order = tuple(_order(program, program.entry))
    position = {key: index for index, key in enumerate(order)}
    peaks = {each.integer(1): set(each.integers(2)) for each in message.messages(5)}
    results = _results(program)
    arguments, outputs, temporaries = [], [], []
    arena = 0.0
    for allocation in message.messages(3):
        size = float(allocation.integer(2))
        assigned = [each for each in allocation.messages(9) if each.integer(1) in values]
        known = [values[each.integer(1)] for each in assigned]
        if allocation.integer(3) or allocation.integer(12) or not known:
            continue  # of single threads; constants
        if allocation.integer(5):
            maker = next((value.maker for value in known if value.maker.opcode == "parameter"), known[0].maker)
            arguments.append(Buffer(size, maker, argument=maker.op_name))
        elif allocation.integer(7):
            kept = [value for value in known if (value.maker.id, value.bytes) in results] or known
            outputs.append(Buffer(size, kept[-1].maker, output=results.get((kept[-1].maker.id, kept[-1].bytes))))
        else:
            arena += size
            peak = peaks.get(allocation.integer(1))
            for each, value in zip(assigned, known, strict=True):
                lives = _life(program, value, position)
                held = peak is None or each.integer(1) in peak
                temporaries.append(
                    Buffer(value.bytes, value.maker, "", None, int(arena - size) + each.integer(2), *lives, held)
                )
    return Buffers(tuple(arguments), tuple(outputs), tuple(temporaries), arena, order)


def _values(program: Program, message: Message) -> dict[int, _Value]:
    found: dict[int, _Value] = {}
    for each in message.messages(1):
        if maker := program.instructions.get(each.messages(3)[0].integer(4)):
            found[each.integer(1)] = _Value(float(each.integer(2)), maker)
    for alias in message.messages(2):
        if value := found.get(alias.integer(1)):
            value.at.append(alias.messages(2)[0].integer(4))
    return found


def _results(program: Program) -> dict[tuple[int, float], int]:
    """Positions in the program's result, by the instruction that makes them and their bytes."""
    root = program.instructions[program.computations[program.entry].root]
    found: dict[tuple[int, float], int] = {}
    for index, operand in enumerate(root.operands if root.opcode == "tuple" else (root.id,)):
        item = program.instructions[operand]
        size = item.bytes
        while item.opcode in ("bitcast", "get-tuple-element"):
            item = program.instructions[item.operands[0]]
        found.setdefault((item.id, size), index)
    return found


def _life(program: Program, value: _Value, position: dict[int, int]) -> tuple[int, int]:
    """First and last place in the schedule at which a value is there."""
    first = last = position.get(value.maker.id, 0)
    for key in (value.maker.id, *value.at):
        last = max(last, position.get(key, 0), *(position.get(user, 0) for user in program.users.get(key, ())))
    return first, last


def _order(program: Program, computation: int) -> Iterator[int]:
    for key in program.computations[computation].instructions:
        item = program.instructions[key]
        if item.opcode in CONTROL:
            for called in item.called:
                yield from _order(program, called)
        yield key
