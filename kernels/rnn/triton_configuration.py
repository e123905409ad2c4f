"""Tile sizes of the Triton kernels of the recurrent op: what is taken, what a tuner may try. Imports no framework."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

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

    The rules: up to 128 hidden units one program has them all, and its rows of the batch never wait for others. Above,
    a program has 16 units, whose 64 rows of W_hh fill a tensor core's instruction; more where there are not enough
    processors to hold all programs at once. W_hh stays in shared memory where it fits. float32 without tensor cores
    reads it again in each step, in small blocks, as its products go through registers. Several layers run as a
    wavefront where both their matrices fit.

    Raises:
        InvalidInputError: a given name or value that is none.
    """
    units = problem.hidden
    cores = problem.dtype != "float32" or tf32 or device.exact_float32
    wavefront = problem.layers > 1 and problem.directions == 1
    forward = _tiles(problem, device, cores, wavefront and units > SINGLE // 2, False)
    if wavefront and not _fits(problem, device, forward, 2, False):
        wavefront, forward = False, _tiles(problem, device, cores, False, False)
    backward = _tiles(problem, device, cores, False, True)
    chosen = Configuration(*forward, *backward, int(wavefront))
    return _checked(problem, chosen, given or {})


def candidates(problem: Problem, device: Device, tf32: bool = False) -> Iterator[tuple[tuple[str, int], ...]]:
    """The configurations that a tuner may try, the one of `configure` first."""
    first = configure(problem, device, tf32)
    yield first.pairs
    for block_b in (8, 16, 32):
        for warps in (4, 8):
            tried = replace(first, block_b=block_b, warps=warps, back_b=block_b, back_warps=warps)
            if tried != first:
                yield tried.pairs
    for block_h in (16, 32, 64):
        tried = replace(first, block_h=block_h, back_h=block_h, block_k=min(first.block_k, 256))
        layers = 2 if tried.wavefront else 1
        fit = _fits(problem, device, tried.forward, layers, False)
        fit = fit and _fits(problem, device, tried.backward, 1, True)
        if tried != first and fit and block_h <= padded(problem.hidden):
            yield tried.pairs
    if first.wavefront:
        yield replace(first, wavefront=0).pairs


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
    parts = -(-problem.hidden // tiles[0])
    jobs = problem.layers if matrices > 1 else problem.directions
    enough = parts * jobs <= device.processors or (parts == 1 and matrices == 1)
    return enough and shared_bytes(problem, tiles, matrices, backward) <= device.shared_bytes


def _tiles(problem: Problem, device: Device, cores: bool, spread: bool, backward: bool) -> Tiles:
    """Tile sizes of one pass. `spread`: on several programs, whatever the size."""
    units, matrices = problem.hidden, 2 if spread else 1
    plain = GATES[problem.mode] == 1
    if not cores:
        return Tiles(16 if not plain or backward else 64, 16, 16, 0, 4)
    if units <= SINGLE and not spread:
        size = padded(units)
        alone = Tiles(size, 16, size, 1, 4 if size <= 32 else size // 8)
        if _fits(problem, device, alone, 1, backward):
            return alone
    block_k = min((256, 128, 64), key=lambda k: (-(-units // k) * k, -k))
    block_k = min(block_k, padded(units))
    for block_h in (16, 32, 64, 128):
        if plain and not backward and block_h < 64 and units >= 64:
            continue
        tiles = Tiles(block_h, 16, block_k, 1, 8 if block_h > 32 or units > 512 else 4)
        if _fits(problem, device, tiles, matrices, backward):
            return tiles
    for block_h in (16, 32, 64, 128):
        tiles = Tiles(block_h, 16, 64, 0, 4)
        if -(-units // block_h) * problem.directions <= device.processors:
            return tiles
    return Tiles(16, 16, 64, 0, 4)


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
