"""`steps`: a profiler that stays on in real training loops, in torch and JAX."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from perfkit import backends
from perfkit._errors import InvalidInputError
from perfkit.parallel import world as worlds
from perfkit.parallel.environment import launched
from perfkit.parallel.world import ALONE, World
from perfkit.profiling._step_data import MergedSteps, Steps, StepTime
from perfkit.profiling._step_report import Log, merged, report

T = TypeVar("T")


def steps(path: str | Path | None = None, *, warmup: int = 3, every: int = 10) -> StepProfiler:
    """A context around a training loop: what each step takes of waiting for data, computing, waiting for the device.

    Every step costs some microseconds. Every `every`-th one is watched: the device is brought to rest before and after
    it, so that computing on the host and waiting for the device are told apart, and memory is read.

    In several processes (torchrun, `perfkit launch`, `jax.distributed`) each writes its own file, `steps.rank0.json`,
    and rank 0 one of all, if they are in a process group when the loop ends.

    Args:
        path: file for the report, JSON; None writes none.
        warmup: steps that do not count.
        every: how often a step is watched.

    Raises:
        InvalidInputError: a number is too small, or there is no folder to write to; before the loop.

    Example:
        >>> with perfkit.profiling.steps("steps.json") as profiler:
        ...     for inputs, targets in profiler.batches(loader):
        ...         loss = train_step(inputs, targets)
        ...         profiler.step(loss)
        >>> print(profiler.report)
    """
    for name, value, least in (("warmup", warmup, 0), ("every", every, 1)):
        if not isinstance(value, int) or value < least:
            raise InvalidInputError(f"{name}={value!r}: expected a whole number of at least {least}")
    file = None if path is None else Path(path)
    if file is not None and not file.absolute().parent.is_dir():
        raise InvalidInputError(f"path={str(path)!r}: there is no folder {file.absolute().parent}")
    return StepProfiler(file, warmup, every)


class StepProfiler:
    """What `steps` returns; `report` is there after the loop, and on rank 0 of several processes `merged`."""

    def __init__(self, path: Path | None, warmup: int, every: int):
        self.path, self.warmup, self.every = path, warmup, every
        self.report: Steps | None = None
        self.merged: MergedSteps | None = None
        self._log = Log()
        self._index = 0
        self._data_s = 0.0
        self._items: int | None = None

    def __enter__(self) -> StepProfiler:
        self._stack = ExitStack()
        self._frameworks = [backends.backend(name) for name in backends.FRAMEWORKS if _in_use(name)]
        self._compiles: list[Callable[[], Any]] = [
            self._stack.enter_context(framework.watching_compiles()) for framework in self._frameworks
        ]
        self._compiled = 0
        self._last = self._counting_since = time.perf_counter()
        return self

    def batches(self, loader: Iterable[T]) -> Iterator[T]:
        """The batches of `loader`; what it takes to get one is the step's `data_ms`."""
        self._log.batches = True
        source = iter(loader)
        while True:
            before = time.perf_counter()
            try:
                batch = next(source)
            except StopIteration:
                return
            got = time.perf_counter()
            self._data_s, self._items = got - before, _rows(batch)
            if self._watched:
                self._rest(None)
            self._last = time.perf_counter()
            self._spend(self._last - got)
            yield batch

    def step(self, outputs: Any = None, items: int | None = None) -> None:
        """Call it where a step ends.

        Args:
            outputs: what the step made last, such as the loss: what JAX is waited for with. Without it, all its arrays.
            items: how many the step was of; by default the length that all arrays in its batch have.
        """
        done = time.perf_counter()
        sync_ms = None
        if self._watched:
            self._rest(outputs)
            sync_ms = (time.perf_counter() - done) * 1e3
        if self._index >= self.warmup:
            given = items if items is not None else self._items
            row = StepTime(self._index, self._data_s * 1e3, (done - self._last) * 1e3, sync_ms, given)
            self._log.steps.append(row)
            if sync_ms is not None:
                self._log.memory.append((self._index, _resident_bytes(), _device_bytes()))
        self._index += 1
        self._data_s, self._items = 0.0, None
        self._last = time.perf_counter()
        if self._index == self.warmup:
            self._compiled = self._compilations()
            self._counting_since, self._log.watching_s = self._last, 0.0
        self._log.seconds = self._last - self._counting_since
        self._spend(self._last - done)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        compilations = self._compilations()
        self._stack.close()
        if self._index > self.warmup:
            self._log.recompiles = compilations - self._compiled
        outcome = "complete" if kind is None else "failed" if issubclass(kind, Exception) else "interrupted"
        world = self._world()
        about = launched()
        rank, processes = (world.rank, world.size) if about is None else (about.rank, about.size)
        self.report = report(
            self._log,
            rank=rank,
            processes=processes,
            warmup=self.warmup,
            every=self.every,
            outcome=outcome,
            explanation="" if kind is None else f"the loop ended at step {self._index}: {kind.__name__}: {error}",
        )
        if self.path is not None:
            own = self.path if processes == 1 else self.path.with_suffix(f".rank{rank}{self.path.suffix}")
            self.report.to_json(own)
        # Others may not come to where they are gathered if this one raised, or they did.
        if kind is None and world.size > 1:
            ranks = world.gather(self.report)
            if world.leads:
                self.merged = merged(ranks)
                if self.path is not None:
                    self.merged.to_json(self.path)

    @property
    def _watched(self) -> bool:
        return self._index % self.every == 0

    def _rest(self, outputs: Any) -> None:
        """Wait until every device has done what it was given."""
        for framework in self._frameworks:
            if framework.name == "jax" and outputs is None:
                outputs = sys.modules["jax"].live_arrays()
            framework.synchronize(outputs)

    def _spend(self, seconds: float) -> None:
        if self._index >= self.warmup:
            self._log.watching_s += seconds

    def _compilations(self) -> int:
        return sum(told().graphs for told in self._compiles)

    def _world(self) -> World:
        """The process group that is there; none is joined for the report's sake."""
        torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
        if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
            return worlds.of("torch")
        if jax is not None and jax.process_count() > 1:
            return worlds.of("jax")
        return ALONE


def _in_use(framework: str) -> bool:
    """Whether it is loaded, with all that its adapter needs."""
    return framework in sys.modules and all(map(find_spec, backends.REQUIRED[framework]))


def _rows(batch: Any) -> int | None:
    """The length that all arrays in a batch have; None where they differ, as where time comes first in some."""
    shapes = (getattr(leaf, "shape", None) for leaf in backends.leaves_in(batch))
    lengths = {int(shape[0]) for shape in shapes if shape}
    return lengths.pop() if len(lengths) == 1 else None


def _resident_bytes() -> float | None:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return float(pages * os.sysconf("SC_PAGE_SIZE"))


def _device_bytes() -> float | None:
    """What the frameworks hold on cards; None where they have none. Of JAX on a processor: all live arrays."""
    held: list[float] = []
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        held.append(float(torch.cuda.memory_allocated()))
    if jax is not None:
        held.append(float(sum(array.nbytes for array in jax.live_arrays())))
    return sum(held) if held else None
