"""What XLA ran in a step, by operation and module: times from a trace, the rest from the compiled program."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from perfkit.profiling._time_data import Op
from perfkit.profiling.jax_hlo import CONTROL, NO_WORK, Program
from perfkit.profiling.jax_hlo_read import Instruction
from perfkit.profiling.jax_scopes import Place
from perfkit.profiling.jax_shares import Shares, by_place
from perfkit.profiling.jax_trace import Event, Host, Trace

_RANKS = {"compile": 2, "dispatch": 3}
"""What the host does that counts where XLA runs nothing; what stands first counts where both go on."""

_JAX_NAMES = {"dot": "dot_general", "convolution": "conv_general_dilated"}
_PLAIN = frozenset(
    [
        "broadcast_in_dim",
        "reshape",
        "transpose",
        "convert_element_type",
        "squeeze",
        "copy",
        "broadcast",
        "convert",
        "bitcast",
        "closed_call",
        "scan",
        "while",
        "body",
        "cond",
        "checkpoint",
    ]
)
"""Left out of the names of fusions, where they hold anything else."""

_MOST_NAMES = 3
_NOTHING = [0.0] * 4

Key = tuple[str, str, str, str, str]
"""Name, kind, module, phase and shapes: what is told apart."""


@dataclass(frozen=True)
class Row:
    """Something that ran, or a part of it, at one place in the model.

    Args:
        name: "dot_general", "conv_general_dilated + add + max".
        kind: "op" or "kernel".
        share: of the time of the instruction that it is a part of.
        product_flops: as the compiler counts them: what the mathematics' are shared out by.
    """

    name: str
    kind: str
    module: str
    phase: str
    shapes: str = ""
    moved_bytes: float = 0.0
    product_flops: float = 0.0
    share: float = 1.0


class Reader:
    """Tells what an event of a trace is.

    Args:
        programs: by their number in the trace.
        place: reads where an operation stands off its name.
        shares: of instructions that hold whole layers, by name: their places' shares of the time.
        device: whether the events are of a device's kernels.
        alone: whether each program is one operation.
    """

    def __init__(
        self,
        programs: dict[int, Program],
        place: Callable[[str], Place],
        shares: dict[str, Shares] | None = None,
        *,
        device: bool = False,
        alone: bool = False,
    ):
        self.programs, self.place, self.device, self.alone = programs, place, device, alone
        self.shares = shares or {}
        self._known: dict[tuple[int, str], list[Row]] = {}

    def instruction(self, event: Event) -> Instruction | None:
        program = self.programs.get(event.program)
        return program.named.get(event.name) if program else None

    def controls(self, event: Event) -> bool:
        """Whether it runs other operations, which are events too."""
        item = self.instruction(event)
        return item is not None and item.opcode in CONTROL

    def rows(self, event: Event) -> list[Row]:
        key = event.program, event.name
        if key not in self._known:
            self._known[key] = list(self._read(event))
        rows = self._known[key]
        return [_at(row, event) for row in rows] if event.module or event.phase else rows

    def row(self, item: Host) -> Row:
        """What the host does for a program, before or while it runs."""
        return Row(item.kind, "op", item.module, item.phase or self.place("").phase)

    def _read(self, event: Event) -> Iterator[Row]:
        kind = "kernel" if self.device else "op"
        item = self.instruction(event)
        if item is None:
            at = self.place("")
            yield Row(event.name, kind, at.module, at.phase)
            return
        program = self.programs[event.program]
        moved = program.moved_bytes(item)
        shares = self.shares.get(item.name)
        if shares is None:
            at = self.place(program.op_name(item))
            inner = [each for each in program.inside(item) if each.opcode not in NO_WORK]
            inner = inner or list(program.inside(item))
            flops = sum(each.product_flops for each in inner)
            name = self._name(inner)
            if not any("/" in each.op_name or each.product_flops for each in inner):  # the compiler's own
                name = program.name.removeprefix("jit_") if self.alone else f"{at.primitive or 'XLA'} ({name})"
            yield Row(name, kind, at.module, at.phase, program.shapes(item, inner), moved, flops)
            return
        for at, group in by_place(program, item, self.place).items():
            if share := shares.get(at, 0.0):
                flops = sum(each.product_flops for each in group)
                shapes = program.shapes(item, group)
                yield Row(self._name(group), kind, at.module, at.phase, shapes, moved * share, flops, share)

    def _name(self, inner: list[Instruction]) -> str:
        """What they are called in JAX: products first, and those left out that only lay things out anew."""
        ordered = sorted(inner, key=lambda each: not each.product_flops)
        names = list(dict.fromkeys(self._own_name(each) for each in ordered))
        names = [name for name in names if name not in _PLAIN] or names
        more = " + …" if len(names) > _MOST_NAMES else ""
        return " + ".join(names[:_MOST_NAMES]) + more

    def _own_name(self, item: Instruction) -> str:
        if item.opcode in _JAX_NAMES:
            return _JAX_NAMES[item.opcode]
        if item.opcode in ("copy", *CONTROL) or "/" not in item.op_name:
            return item.opcode
        name = self.place(item.op_name).primitive
        return item.target if name in ("", "ffi_call") and item.target else name or item.opcode


def swept(
    events: Iterable[Event], host: Iterable[Host], controls: Callable[[Event], bool], until: tuple[float, float]
) -> Iterator[tuple[Event | Host, float]]:
    """Each moment of a step given to what runs in it, so that the times add up to the time that something ran.

    What runs at once has equal parts of it. What runs others has only what they leave, and so have the
    host's compiling and dispatching.

    Args:
        until: beginning and end of the step.
    """
    start, end = until
    items: list[tuple[int, Event | Host]] = [(int(controls(event)), event) for event in events]
    items += [(_RANKS[item.kind], item) for item in host if item.kind in _RANKS]
    edges: list[tuple[float, int, int]] = []
    for index, (_, item) in enumerate(items):
        first, last = max(item.start_ms, start), min(item.end_ms, end)
        if last > first:
            edges += [(first, 1, index), (last, 0, index)]
    edges.sort()
    running: tuple[set[int], ...] = (set(), set(), set(), set())
    given: dict[int, float] = {}
    before = start
    for at, begins, index in edges:
        owners = next((group for group in running if group), ())
        for owner in owners:
            given[owner] = given.get(owner, 0.0) + (at - before) / len(owners)
        before = at
        group = running[items[index][0]]
        group.add(index) if begins else group.discard(index)
    for index, (_, item) in enumerate(items):
        if start <= item.start_ms < end:
            yield item, given.get(index, 0.0)


def ops(
    steps: Iterable[Iterable[tuple[Event | Host, float]]], reader: Reader, flops: dict[tuple[str, str], float]
) -> tuple[Op, ...]:
    """The operations of a step, longest first.

    Times are medians over the steps, so that one in which the machine did something else does not count; of what is not
    in most of them, means.

    Args:
        steps: of each, what ran and its time.
        flops: of the mathematics, by module and phase.
    """
    each = [_summed(timed, reader) for timed in steps]
    keys = {key: None for sums in each for key in sums}
    typical = {key: [_typical([sums.get(key, _NOTHING)[at] for sums in each]) for at in range(4)] for key in keys}
    own = _shared(flops, {key: values[3] for key, values in typical.items()})
    made = [Op(*key[:4], calls, ms, own[key], moved, key[4]) for key, (calls, ms, moved, _) in typical.items()]
    return tuple(sorted(made, key=lambda op: -op.self_ms))


def _summed(timed: Iterable[tuple[Event | Host, float]], reader: Reader) -> dict[Key, list[float]]:
    """Of one step: how often, how long, bytes moved and the compiler's count of operations."""
    sums: dict[Key, list[float]] = {}
    for item, ms in timed:
        rows = [reader.row(item)] if isinstance(item, Host) else reader.rows(item)
        for row in rows:
            found = sums.setdefault((row.name, row.kind, row.module, row.phase, row.shapes), [0.0] * 4)
            for at, value in enumerate((1.0, ms * row.share, row.moved_bytes, row.product_flops)):
                found[at] += value
    return sums


def _typical(values: list[float]) -> float:
    return statistics.median(values) or statistics.fmean(values)


def union(intervals: Iterable[tuple[float, float]], until: tuple[float, float]) -> list[tuple[float, float]]:
    """What of a step is covered, as intervals that do not touch."""
    found: list[tuple[float, float]] = []
    for first, last in sorted((max(a, until[0]), min(b, until[1])) for a, b in intervals):
        if last <= first:
            continue
        if found and first <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], last)
        else:
            found.append((first, last))
    return found


def of_step(trace: Trace, until: tuple[float, float]) -> list[Event]:
    return [event for event in trace.events if event.end_ms > until[0] and event.start_ms < until[1]]


def _at(row: Row, event: Event) -> Row:
    return replace(row, module=row.module or event.module, phase=event.phase or row.phase)


def _shared(flops: dict[tuple[str, str], float], weights: dict[Key, float]) -> dict[Key, float]:
    """The mathematics' operations of each place, shared out among what computes products there.

    What is of a place in which nothing does goes to those products that are of no place with any.
    """
    by_place: dict[tuple[str, str], float] = {}
    for (_, _, module, phase, _), weight in weights.items():
        by_place[module, phase] = by_place.get((module, phase), 0.0) + weight
    left = sum(count for place, count in flops.items() if not by_place.get(place))
    strangers = sum(weight for place, weight in by_place.items() if not flops.get(place))
    found = {}
    for key, weight in weights.items():
        place = key[2], key[3]
        if count := flops.get(place):
            found[key] = count * weight / by_place[place] if weight else 0.0
        else:
            found[key] = left * weight / strangers if weight else 0.0
    return found
