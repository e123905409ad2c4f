"""`max_batch_size`: the largest batch that fits into memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from perfkit import backends
from perfkit._batch import axis_of, even_rows, other_dim
from perfkit._chain import Chain, chain_of, check
from perfkit._errors import InvalidInputError, UnsupportedError
from perfkit._quantity import Quantity
from perfkit._variant import apply
from perfkit._workload import Inputs, Workload, check_mode

SHARE_OF_FREE = 0.8
MOST = 2**20


@dataclass(frozen=True)
class MaxBatch:
    """The largest batch that fits.

    Args:
        batch_size: rows; 0 where not even the smallest fits.
        needs_bytes: what it needs: the model, the optimizer's state, and the tensor peak of one call or step.
        limit_bytes: what it had to stay within; None where only the device's own memory was the limit.
        tried: (batch, bytes) of every batch that was run, in that order.
        stopped: why the search went no further.
    """

    batch_size: int
    needs_bytes: float
    limit_bytes: float | None
    tried: tuple[tuple[int, float], ...]
    stopped: str

    def __str__(self) -> str:
        within = "" if self.limit_bytes is None else f" of {self.limit_bytes / 1e6:.4g} MB"
        curve = ", ".join(f"{batch}: {size / 1e6:.3g} MB" for batch, size in sorted(self.tried))
        return f"batch {self.batch_size} fits, {self.needs_bytes / 1e6:.4g} MB{within}; {self.stopped}\ntried {curve}"


def max_batch_size(
    model: Any,
    *,
    example_inputs: Any,
    params: Any = None,
    mode: str = "training",
    loss: Callable[[Any, Any], Any] | None = None,
    targets: Any = None,
    optimizer: Any = None,
    recipe: Any = None,
    limit_bytes: float | None = None,
    batch_dim: int = 0,
    multiple_of: int | None = None,
    most: int = MOST,
    seed: int = 0,
    progress: Callable[[str], Any] | None = None,
) -> MaxBatch:
    """The largest batch that `model` can be run or trained on, by doubling and then closing in on it.

    On a CPU nothing is driven out of memory: a batch is run only where the ones before it say that it fits. On other
    devices an out-of-memory error is an answer too, after which the cache is emptied.

    Args:
        model, example_inputs, params, mode, loss, targets, optimizer, recipe, seed: as for `optimize`. Batches are made
            of the example's rows, repeated.
        limit_bytes: what model, optimizer state and tensor peak may take together. By default 80 % of what is free on
            a CPU, and all that there is elsewhere.
        batch_dim: the dimension of the first input that holds the batch.
        multiple_of: try multiples of this alone; by default of the micro-batches that the recipe cuts a batch into.
        most: the largest batch to try.
        progress: called with a line of text as the work goes on.

    Raises:
        InvalidInputError: something passed cannot be used.
        UnsupportedError: the recipe cannot work on this model, or memory cannot be measured here.

    Example:
        >>> found = perfkit.max_batch_size(model, example_inputs=(x,), mode="inference", limit_bytes=2e9)
        >>> found.batch_size
    """
    check_mode(mode, loss, targets, optimizer, example_inputs)
    chain = chain_of(recipe or ())
    if multiple_of is None:
        multiple_of = math.lcm(*(getattr(step, "micro_batches", None) or 1 for step in chain))
    if multiple_of < 1 or most < multiple_of:
        raise InvalidInputError(f"multiple_of={multiple_of!r}, most={most!r}: expected 1 <= multiple_of <= most")
    backend = backends.of(model, example_inputs)
    companions = {"loss": loss, "targets": targets, "optimizer": optimizer}
    with backend.preserved():
        work = backend.bind(model, params, example_inputs, mode=mode, seed=seed, **companions)
        on_cpu = work.device == "cpu"
        limit = _free() if limit_bytes is None and on_cpu else limit_bytes
        tell = progress or str

        def needs(count: int) -> float | None:
            rows = count * multiple_of
            tell(f"trying a batch of {rows}")
            return _needs(_sized(work, rows, batch_dim), chain)

        return _search(needs, limit, careful=on_cpu, unit=multiple_of, most=most // multiple_of)


def _search(needs: Callable[[int], float | None], limit: float | None, careful: bool, unit: int, most: int) -> MaxBatch:
    """The largest count that fits.

    Args:
        needs: bytes that a count takes; None where the device ran out of memory.
        careful: do not try what the line through the last two counts puts above the limit.
        unit: rows of one count.
    """
    tried: list[tuple[int, float]] = []
    fits, too_many, why = 0, most + 1, f"no larger one than {most * unit} was to be tried"

    def refused(count: int) -> str:
        """Why a count does not fit; empty where it does."""
        if limit is not None and careful and len(tried) > 1 and (expected := _line(tried, count)) > limit:
            return f"{count * unit} would need {expected / 1e6:.4g} MB"
        found = needs(count)
        if found is None:
            return f"the device ran out of memory at {count * unit}"
        tried.append((count, found))
        return f"{count * unit} needs {found / 1e6:.4g} MB" if limit is not None and found > limit else ""

    count, by_line = 1, False
    while fits + 1 < too_many:
        reason = refused(count)
        if reason:
            too_many, why = count, reason
        else:
            fits = count
        if too_many > most:
            count = min(2 * fits, most)
        else:  # memory grows nearly evenly, and the line ends it at once; where it does not, halving ends it
            by_line = not by_line
            count = _between(tried, limit if by_line else None, fits, too_many)
        if count <= fits:
            break
    size = next((bytes_ for count, bytes_ in tried if count == fits), 0.0)
    rows = tuple((count * unit, bytes_) for count, bytes_ in tried)
    return MaxBatch(fits * unit, size, limit, rows, why)


def _between(tried: list[tuple[int, float]], limit: float | None, fits: int, too_many: int) -> int:
    """The next count to try: where the line through the two largest counts meets the limit, else the middle."""
    if limit is not None and len(tried) > 1:
        (x, a), (y, b) = sorted(tried)[-2:]
        if b > a:
            return min(max(int(y + (limit - b) * (y - x) / (b - a)), fits + 1), too_many - 1)
    return (fits + too_many) // 2


def _line(tried: list[tuple[int, float]], count: int) -> float:
    """Bytes of a count by the line through the two largest that were tried."""
    (x, a), (y, b) = sorted(tried)[-2:]
    return b + (b - a) / (y - x) * (count - y)


def _sized(work: Workload, rows: int, batch_dim: int) -> Workload:
    """The workload on `rows` rows, of its example's repeated."""
    backend, inputs, training = work.backend, work.inputs, work.training
    if reason := other_dim(work.samples, batch_dim):
        raise InvalidInputError(reason)
    given = list(backend.leaves(() if training is None else training.targets))
    there = even_rows(backend.leaves((inputs.args, dict(inputs.kwargs))), batch_dim, 1, given)
    targets = [tuple(leaf.shape) for leaf in given]
    if any(targets) and all(axis_of(shape, there, batch_dim) is None for shape in targets):
        raise InvalidInputError(
            f"dimension {batch_dim} of the first input has {there} entries, and no target has that many, of shapes "
            f"{', '.join(map(str, targets))}: set batch_dim= to the batch's dimension"
        )

    def taken(leaf: Any) -> Any:
        dim = axis_of(tuple(leaf.shape), there, batch_dim)
        return leaf if dim is None else backend.rows(leaf, [at % there for at in range(rows)], dim)

    args, kwargs = backend.mapped(taken, (inputs.args, dict(inputs.kwargs)))
    if training is not None:
        training = replace(training, targets=backend.mapped(taken, training.targets))
    return backend.copy(work.replace(inputs=Inputs(args, kwargs), training=training))


def _needs(work: Workload, chain: Chain) -> float | None:
    """Bytes of a workload under a chain; None where the device ran out of memory.

    Raises:
        UnsupportedError: it is refused, or its memory cannot be measured.
    """
    backend = work.backend
    try:
        check(chain, work)
        if chain.recipes:
            work = apply(chain, work).works[-1]
        finished = backend.finish(work)
        with finished.keeping_state():
            backend.caller(work, finished)()
            peak = backend.tensor_peak(work, finished, anew=True)
            state = backend.optimizer_state(work, finished) if work.trains else Quantity(0.0, "B")
    except Exception as error:
        if not _out_of_memory(error):
            raise
    else:
        if peak.value is None:
            raise UnsupportedError(f"the memory of a batch cannot be measured here: {peak.unavailable}")
        return backend.size(work)[0] + peak.value + (state.value or 0.0)
    backend.forget()  # outside of the handler, which holds the frames that hold the tensors
    return None


def _out_of_memory(error: BaseException | None) -> bool:
    """Whether a device had no memory left: torch's error, XLA's, or one of perfkit's that tells of them."""
    while error is not None:
        if type(error).__name__ == "OutOfMemoryError" or "RESOURCE_EXHAUSTED" in str(error):
            return True
        error = error.__cause__
    return False


def _free(meminfo: str = "/proc/meminfo") -> float:
    """80 % of the memory that the machine could give.

    Raises:
        InvalidInputError: it does not tell.
    """
    try:
        lines = Path(meminfo).read_text().splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration) as error:
        raise InvalidInputError("this machine does not tell how much memory is free: pass limit_bytes=") from error
    return SHARE_OF_FREE * int(available.split()[1]) * 1024
