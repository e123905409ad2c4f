"""`profile`: the passes over one model, each by itself, and what is kept of them when one ends early."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import perfkit
from perfkit import backends
from perfkit._chain import Chain, chain_of, check
from perfkit._errors import DoesNotRunError, InvalidInputError, PerfkitError, UnsupportedError, first_line
from perfkit._measurement import compile_seconds
from perfkit._quantity import Latency, Quantity
from perfkit._recipe import ParallelRecipe, Recipe
from perfkit._variant import Variant, apply, ready
from perfkit._workload import Workload, calibrated, check_mode
from perfkit.backends.adapter import Backend
from perfkit.measure.calls import alone, first_call
from perfkit.measure.environment import environment
from perfkit.profiling import advice, ceilings, energy, telemetry
from perfkit.profiling._basics import Basics, unprofiled
from perfkit.profiling._profile import Profile
from perfkit.profiling.utilization import utilized

BUDGET_S = 6.0


def profile(
    model: Any,
    *,
    example_inputs: Any,
    params: Any = None,
    mode: str = "inference",
    loss: Callable[[Any, Any], Any] | None = None,
    targets: Any = None,
    optimizer: Any = None,
    recipe: str | Recipe | Chain | list | None = None,
    calibration: Iterable | None = None,
    budget_s: float = BUDGET_S,
    seed: int = 0,
    snapshot: str | Path | None = None,
    progress: Callable[[str], Any] | None = None,
) -> Profile:
    """Where the time, the memory and the energy of a model go, and what addresses it.

    Everything happens on a copy: the model passed in, its optimizer and all random state stay as they are. A step is
    timed before any profiler is attached; then operations, memory and energy are collected, each in a pass of its own.

    A model that raises or runs out of memory ends the profile early and raises nothing: what was collected until then
    is returned, with `outcome="failed"` and why. What interrupts it (KeyboardInterrupt, SystemExit) is raised again and
    carries what was collected as its `.profile`, whose outcome is "interrupted".

    Args:
        model, example_inputs, params, mode, loss, targets, optimizer, calibration: as for `optimize`.
        recipe: profile what this chain makes of the model, to lay it beside a profile of the model as it is.
        budget_s: seconds for timing steps; the other passes take a few steps each.
        seed: for every run of the model.
        snapshot: file for the allocations of a step: of torch for pytorch.org/memory_viz, of JAX for `go tool pprof`.
        progress: called with a line of text as the work goes on.

    Raises:
        InvalidInputError: something passed cannot be used; nothing was done yet.
        UnsupportedError: the recipe cannot work on this model or machine.

    Example:
        >>> profile = perfkit.profile(model, example_inputs=(x,))
        >>> print(profile)
        >>> profile.to_html("profile.html")
    """
    chain = _chain(recipe)
    check_mode(mode, loss, targets, optimizer, example_inputs)
    _check(example_inputs, budget_s, progress)
    backend = backends.of(model, example_inputs)
    kept = _Kept(_empty(model, backend, mode), progress or str)
    settings = {"mode": mode, "loss": loss, "targets": targets, "optimizer": optimizer, "seed": seed}
    try:
        with backend.preserved():
            kept.doing("running the model for the first time")
            work = calibrated(backend.bind(model, params, example_inputs, **settings), calibration)
            kept.keep(model=backend.model_name(work), device=work.device, inputs=backend.describe(work.inputs))
            _collect(_applied(chain, work, kept), kept, budget_s, snapshot)
    except DoesNotRunError as error:
        kept.ended("failed", error)
    except PerfkitError:
        raise
    except Exception as error:
        kept.ended("failed", error)
    except BaseException as error:
        kept.ended("interrupted", error)
        error.profile = kept.profile  # type: ignore[attr-defined]
        raise
    return kept.profile


class _Kept:
    """What was collected so far, and what is being done."""

    def __init__(self, profile: Profile, progress: Callable[[str], Any]):
        self.profile = profile
        self._progress = progress
        self._doing = ""

    def doing(self, what: str) -> None:
        self._doing = what
        self._progress(what)

    def keep(self, **parts: Any) -> None:
        self.profile = dataclasses.replace(self.profile, **parts)

    def note(self, line: str) -> None:
        self.keep(notes=(*self.profile.notes, line))

    def ended(self, outcome: str, error: BaseException) -> None:
        told = "interrupted" if outcome == "interrupted" else f"{type(error).__name__}: {first_line(error)}"
        if any(map(_ran_out, (error, error.__cause__))):
            told = f"out of memory ({told})"
        self.keep(outcome=outcome, explanation=f"while {self._doing}: {told}")


_NO_MEMORY = ("not enough memory", "allocate memory", "RESOURCE_EXHAUSTED")
"""What messages say of memory where the error is no class of its own."""


def _ran_out(error: BaseException | None) -> bool:
    named = isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__
    return named or any(told in str(error) for told in _NO_MEMORY)


def _collect(work: Workload, kept: _Kept, budget_s: float, snapshot: str | Path | None) -> None:
    """Every pass in turn; what each finds is kept before the next begins."""
    backend, framework = work.backend, work.framework
    finished = backend.finish(work)
    call = backend.caller(work, finished)
    time_room, memory_room = (import_module(f"perfkit.profiling.{framework}_{name}") for name in ("time", "memory"))
    # Each pass begins with the state that the caller's model and optimizer are in: that of some optimizers cannot be
    # copied once it is there.
    with finished.keeping_state(), backend.watching_compiles() as log:
        backend.seed(work.seed)
        seconds = _first_call(call, lambda error: time_room.by_operation(finished, error))
        first = Variant(work, finished, call, Quantity(seconds, "s"), log())
        kept.doing("timing its steps")
        step = alone(call, budget_s=budget_s)
        basics = Basics(step, first.first_call_s, compile_seconds(first, step), log().graphs - first.log.graphs)
        basics = dataclasses.replace(basics, as_one=_as_one(work, kept, budget_s / 4))
    kept.keep(time=unprofiled(basics, "the run ended before the operations were profiled"))
    with telemetry.watching(work.device) as watched:  # not while steps are timed: looking takes time
        kept.doing("profiling its operations")
        with finished.keeping_state():
            kept.keep(time=time_room.collected(work, finished, basics, kept.note))
        kept.doing("following its memory")
        with finished.keeping_state():
            kept.keep(memory=memory_room.collected(work, finished))
        if snapshot is not None:
            kept.doing("writing its allocations")
            memory_room.snapshot(work, finished, Path(snapshot))
        kept.doing("measuring what this machine reaches at best")
        found = ceilings.above(kept.profile.time.ops, framework, work.device)
        kept.keep(ceilings=found, time=utilized(kept.profile.time, found))
        kept.doing("measuring its energy")
        with finished.keeping_state():
            kept.keep(energy=energy.measured(call, work.device))
        kept.keep(devices=watched.states())
    kept.keep(findings=advice.findings(kept.profile))
    kept.keep(outcome="complete", explanation="")


def _as_one(work: Workload, kept: _Kept, budget_s: float) -> Latency | None:
    """Steps as the one program that the framework's plain compiler makes quickly; None where it makes none."""
    baseline = work.backend.compiled_baseline(work)
    if baseline is None:
        return None
    kept.doing("timing it as one compiled program")
    try:
        return alone(ready(baseline, "the framework's plain compiler").call, budget_s=budget_s)
    except UnsupportedError:  # where a value is read in Python: the time's notes say so
        return None


def _first_call(call: Callable[[], Any], runs_otherwise: Callable[[Exception], bool]) -> float:
    """Seconds of the first call; of one that works, where it cannot be compiled and runs otherwise."""
    try:
        return first_call(call)[0]
    except Exception as error:
        if not runs_otherwise(error):
            raise
        return first_call(call)[0]


def _applied(chain: Chain, work: Workload, kept: _Kept) -> Workload:
    if not len(chain):
        return work
    kept.doing(f"applying {chain}")
    check(chain, work)
    applied = apply(chain, work)
    kept.note(f"profiled: what {chain} makes of the model")
    kept.doing("running the model for the first time")
    return applied.works[-1]


def _chain(recipe: str | Recipe | Chain | list | None) -> Chain:
    if recipe is None:
        return Chain(())
    if recipe == "auto":
        raise InvalidInputError("recipe='auto' searches: call optimize first, and profile with the recipe it reports")
    chain = chain_of(recipe)
    if spread := [str(part) for part in chain if isinstance(part, ParallelRecipe)]:
        raise UnsupportedError(
            f"{', '.join(spread)} spreads the model over several processes, and profile looks at one: "
            "use perfkit.profiling.steps around the training loop, under torchrun or perfkit launch"
        )
    return chain


def _check(example_inputs: Any, budget_s: Any, progress: Any) -> None:
    if example_inputs is None:
        raise InvalidInputError("example_inputs=None: a profile is of a run, so give what the model is called with")
    if not isinstance(budget_s, numbers.Real) or not float(budget_s) > 0:
        raise InvalidInputError(f"budget_s={budget_s!r}: expected a number above 0")
    if progress is not None and not callable(progress):
        raise InvalidInputError(f"progress={progress!r}: expected a function")


def _empty(model: Any, backend: Backend, mode: str) -> Profile:
    return Profile(
        model=getattr(model, "__name__", type(model).__name__),
        framework=backend.name,
        mode=mode,
        device="",
        inputs="",
        environment=environment(),
        outcome="failed",
        explanation="nothing was measured yet",
        time=None,
        memory=None,
        ceilings=None,
        energy=None,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        perfkit_version=perfkit.__version__,
    )
