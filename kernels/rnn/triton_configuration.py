"""Tile sizes of the Triton kernels of the recurrent op: what is taken, what a tuner may try. Imports no framework."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from perfkit._errors import InvalidInputError, nearest
from perfkit.kernels.rnn.problem import GATES, Problem

FLOAT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SINGLE = 128
"""Up to how many hidden units one program may have all of them."""


@dataclass(frozen=True)
class Device:
    """What of a GPU decides on tile sizes.

    Args:
        processors: how many programs run at once at least.
        shared_bytes: shared memory of one program at most.
        exact_float32: tensor cores multiply float32 without rounding it first.
    """

    processors: int = 132
    shared_bytes: int = 232448
    exact_float32: bool = False


class Tiles(NamedTuple):
    """Sizes of one kernel; see `Configuration`."""

    block_h: int
    block_b: int
    block_k: int
    resident: int
    warps: int

    def constants(self, problem: Problem, counted: bool, tf32: bool, widen: bool = False) -> dict[str, Any]:
        """What is constant while a kernel is compiled; see `forward_span`."""
        return {
            "MODE": problem.mode,
            "H": problem.hidden,
            "BLOCK_H": self.block_h,
            "BLOCK_B": self.block_b,
            "BLOCK_K": self.block_k,
            "RESIDENT": bool(self.resident),
            "PERSISTENT": counted,
            "AHEAD": self.ahead(problem),
            "PRECISION": "tf32" if tf32 else "ieee",
            "WIDEN": widen,
        }

    def ahead(self, problem: Problem) -> int:
        """How many blocks of W and h are on their way, the one in use among them, where W is read in each step."""
        rows = self.block_h * (4 if GATES[problem.mode] > 1 else 1)
        block_bytes = (rows + self.block_b) * self.block_k * FLOAT_BYTES[problem.dtype]
        # more rows leave too few registers for the sums, and three larger blocks are more than AMD's memory on chip
        return 3 if rows <= 128 and block_bytes <= 20480 else 1

    def options(self, mode: str, backward: bool, amd: bool = False) -> dict[str, int]:
        """Triton's."""
        # more stages would have loads of h run ahead of the wait that they are for
        found = {"num_warps": self.warps, "num_stages": 1}
        resident = backward and self.resident
        if amd or (resident and mode == "LSTM"):
            return found
        # NVIDIA's assembler spills a few to have room for a second program, which never comes. Of all that there are
        # it makes other use in a backward pass with W there: an LSTM's then spills, and is left to it.
        return found | {"maxnreg": min(168 if resident else 255, 2**16 // (32 * self.warps))}

    def alone(self, hidden: int) -> bool:
        """One program has all hidden units, and what they exchange never leaves it."""
        return bool(self.resident) and self.block_h == self.block_k >= hidden


@dataclass(frozen=True)
class Configuration:
    """How both kernels run; what a tuner measures and keeps, as (name, integer) pairs.

    Args:
        block_h, block_b, block_k: hidden units and batch rows of a program, and columns of W in one product.
        resident: W stays in shared memory.
        warps: of a program.
        back_h, back_b, back_k, back_resident, back_warps: the same of the backward pass.
        wavefront: all layers at once, each a step behind the one below; one direction only.
        persistent: one launch for all steps, where its programs fit on the device at once; else one for each step.
    """

    block_h: int
    block_b: int
    block_k: int
    resident: int
    warps: int
    back_h: int
    back_b: int
    back_k: int
    back_resident: int
    back_warps: int
    wavefront: int = 0
    persistent: int = 1

    @property
    def forward(self) -> Tiles:
        return Tiles(self.block_h, self.block_b, self.block_k, self.resident, self.warps)

    @property
    def backward(self) -> Tiles:
        return Tiles(self.back_h, self.back_b, self.back_k, self.back_resident, self.back_warps)

    @property
    def pairs(self) -> tuple[tuple[str, int], ...]:
        """As `_autotune` keeps it."""
        return tuple(sorted(asdict(self).items()))


def configure(
    problem: Problem, device: Device, tf32: bool = False, given: Mapping[str, int] | None = None
) -> Configuration:
    """What to run `problem` with, `given` values before those of the rules here.

    The rules: up to 128 hidden units one program has them all, and never waits for others. Above, a program has 16
    units, whose 64 rows of W_hh fill an instruction of the tensor cores, and more units where there are not enough
    processors to hold all programs at once. W_hh stays in shared memory where it fits. float32 without tensor cores
    reads it again in each step, in small blocks, as its products go through registers. A program has 16 rows of the
    batch, or in half precision 32 where so more rows run at once. Layers run as a wavefront where both their matrices
    fit and that makes fewer steps.

    Raises:
        InvalidInputError: a given name or value that is none.
    """
    forward, wavefront = _tiles(problem, device, tf32, 1, False), False
    if problem.layers > 1 and problem.directions == 1:
        both = _tiles(problem, device, tf32, 2, False)
        fewer = _steps_in_turn(problem, device, both, True) < _steps_in_turn(problem, device, forward, False)
        if fewer and _fits(problem, device, both, 2, False):
            forward, wavefront = both, True
    chosen = Configuration(*forward, *_tiles(problem, device, tf32, 1, True), int(wavefront))
    return _checked(problem, chosen, given or {})


def candidates(problem: Problem, device: Device, tf32: bool = False) -> Iterator[tuple[tuple[str, int], ...]]:
    """The configurations that a tuner may try, the one of `configure` first. Some may not compile on every device."""
    first = configure(problem, device, tf32)
    layers = 2 if first.wavefront else 1
    tried = [first]
    tried += [replace(first, block_b=rows, back_b=rows) for rows in (8, 16, 32)]
    tried += [replace(first, warps=warps, back_warps=warps) for warps in (4, 8)]
    for units in (16, 32, 64):
        many = replace(first, block_h=units, back_h=units)
        fit = _fits(problem, device, many.forward, layers, False) and _fits(problem, device, many.backward, 1, True)
        tried += [many] if fit and units < padded(problem.hidden) else []
    columns = (64, 256) if first.resident else (16, 32)
    tried += [replace(first, block_k=count) for count in columns if count <= padded(problem.hidden)]
    tried += [replace(first, wavefront=0)] if first.wavefront else []
    yield from dict.fromkeys(chosen.pairs for chosen in tried)


def padded(size: int) -> int:
    """The power of two that tensor cores take such a size as: 16 at least."""
    return max(16, 1 << (size - 1).bit_length())


def shared_bytes(problem: Problem, tiles: Tiles, matrices: int, backward: bool) -> int:
    """About what a program needs of shared memory: W, a block of h, and gates on their way between threads."""
    block_h, block_b, block_k = tiles[:3]
    each, size = 4 if GATES[problem.mode] > 1 else 1, FLOAT_BYTES[problem.dtype]
    columns = -(-problem.hidden // block_k) * block_k
    gates = GATES[problem.mode] if backward else each
    weights = matrices * gates * block_h * columns * size if tiles.resident else gates * block_h * block_k * size
    return weights + block_k * block_b * size + each * block_h * block_b * 4


def _fits(problem: Problem, device: Device, tiles: Tiles, matrices: int, backward: bool) -> bool:
    """All programs that wait for each other run at once, and have what they need of shared memory."""
    parts = -(-problem.hidden // tiles.block_h)
    jobs = problem.layers if matrices > 1 else problem.directions
    enough = parts * jobs <= device.processors or (parts == 1 and matrices == 1)
    # AMD's compiler keeps W of the backward pass in registers, and has room for about half as much there
    limit = device.shared_bytes // 2 if device.exact_float32 and backward else device.shared_bytes
    return enough and shared_bytes(problem, tiles, matrices, backward) <= limit


def _tiles(problem: Problem, device: Device, tf32: bool, matrices: int, backward: bool) -> Tiles:
    """Tile sizes of one pass, of programs that hold one matrix, or in a wavefront two."""
    units, size = problem.hidden, padded(problem.hidden)
    plain = GATES[problem.mode] == 1 and not backward  # one row of W for each unit
    if problem.dtype == "float32" and not tf32 and not device.exact_float32:
        wide = backward or plain  # one row of W for each unit: a longer block has room
        heights = (64,) if plain else (16, 32, 64)
        streamed = [Tiles(block_h, 16, 32 if wide or block_h == 16 else 16, 0, 8) for block_h in heights]
        return next((tiles for tiles in streamed if _fits(problem, device, tiles, matrices, backward)), streamed[0])
    if units <= SINGLE:
        alone = Tiles(size, 16, size, 1, max(4, size // (16 if backward else 8)))
        if _fits(problem, device, alone, matrices, backward):
            return alone
    # the backward pass has four products at once; the forward one takes the fewest columns past H
    columns = (64,) if backward else (128, 64) if units > 512 else (256, 128, 64)
    block_k = min(columns, key=lambda k: (-(-units // k) * k, -k))
    sizes = (64, 128) if plain and units >= 64 else (16, 32, 64, 128)
    for block_h in sizes:
        tiles = Tiles(block_h, 16, min(block_k, size), 1, 8 if backward or block_h > 32 or units > 512 else 4)
        if _fits(problem, device, tiles, matrices, backward):
            return _in_fewer_rounds(problem, device, tiles, backward) if matrices == 1 else tiles
    columns = (32,) if backward else (128, 64, 32)
    streamed = [Tiles(block_h, 16, block_k, 0, 8) for block_k in columns for block_h in sizes]
    return next((tiles for tiles in streamed if _fits(problem, device, tiles, matrices, backward)), streamed[0])


def _in_fewer_rounds(problem: Problem, device: Device, tiles: Tiles, backward: bool) -> Tiles:
    """With more rows in a program, where so all rows run at once that else come after the others."""
    more, jobs = tiles._replace(block_b=32, warps=8), problem.directions
    fewer = _rounds(problem, device, more, jobs) < _rounds(problem, device, tiles, jobs)
    fits = problem.dtype != "float32" and _fits(problem, device, more, 1, backward)
    return more if fewer and fits else tiles


def _rounds(problem: Problem, device: Device, tiles: Tiles, jobs: int) -> int:
    """How often the device is filled with programs that go through all steps."""
    parts, blocks = -(-problem.hidden // tiles.block_h), -(-problem.batch // tiles.block_b)
    return -(-blocks // max(1, device.processors // (parts * jobs)))


def _steps_in_turn(problem: Problem, device: Device, tiles: Tiles, wavefront: bool) -> int:
    """How many steps of the forward pass come after each other."""
    rounds = _rounds(problem, device, tiles, problem.layers if wavefront else problem.directions)
    return rounds * (problem.steps + problem.layers - 1 if wavefront else problem.steps * problem.layers)


def _checked(problem: Problem, chosen: Configuration, given: Mapping[str, int]) -> Configuration:
    known = asdict(chosen)
    for name, value in given.items():
        if name not in known:
            raise InvalidInputError(f"the Triton kernel has no tile size {name!r}: {nearest(name, known)}")
        power = name not in ("wavefront", "persistent", "resident", "back_resident")
        if value < 0 or (power and (value < 1 or value & (value - 1))):
            raise InvalidInputError(f"{name} is {value}: expected {'a power of two' if power else '0 or 1'}")
    chosen = replace(chosen, **given)
    if chosen.wavefront and (problem.directions == 2 or problem.layers == 1):
        raise InvalidInputError(f"a wavefront is of several layers of one direction, not of {problem.layers} layers of "
                                f"{problem.directions}: leave `wavefront` out")  # fmt: skip
    return chosen
