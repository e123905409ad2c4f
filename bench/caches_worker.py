"""What one process of `python -m bench.caches` measures: a training step's time and page faults, before and after."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.memory_models import deep_cnn

WARM = 4
"""Training steps before the first that is timed."""

TURNS = 6
"""Of steps that are preceded by `torch.cuda.empty_cache()`, with steps that are not."""

SMALL_BLOCKS, SMALL_BYTES, KEPT_EVERY = 200_000, 1024, 1000


def main() -> None:
    """Print the figures of one case as a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=list(CASES))
    parser.add_argument("--framework", choices=("torch", "jax"), required=True)
    parser.add_argument("--steps", type=int, required=True, help="training steps that are timed")
    parser.add_argument("--batch-size", type=int, required=True, help="rows of a training step")
    options = parser.parse_args()
    print(json.dumps(CASES[options.case](options)))


def steps(options: argparse.Namespace) -> dict[str, Any]:
    """Time and page faults of a training step."""
    step = _step(options.framework, options.batch_size)
    counted = [_counted(step) for _ in range(options.steps)]
    return _medians(counted) | {"resident_bytes": _resident_bytes()}


def trim(options: argparse.Namespace) -> dict[str, Any]:
    """`malloc_trim` before every second step, against leaving it out before the others."""
    step = _step(options.framework, options.batch_size)
    plain, trimmed, given_back, trim_ms = [], [], [], []
    for _ in range(options.steps):
        plain.append(_counted(step))
        before = _resident_bytes()
        trim_ms.append(_counted(_trim)[0])
        given_back.append(before - _resident_bytes())
        trimmed.append(_counted(step))
        step()  # so that both kinds come after a step without it
    return {
        "without": _medians(plain),
        "with": _medians(trimmed),
        "given_back_bytes": statistics.median(given_back),
        "trim_ms": statistics.median(trim_ms),
        "resident_bytes": before,
    }


def small_blocks(options: argparse.Namespace) -> dict[str, Any]:
    """Resident memory while many small tensors are held, once all but a few are freed, and after `malloc_trim`."""
    import torch

    def filled() -> list[Any]:
        return [torch.ones(SMALL_BYTES // 4) for _ in range(SMALL_BLOCKS)]

    at_start, blocks = _resident_bytes(), filled()
    held = _resident_bytes() - at_start
    blocks = blocks[::KEPT_EVERY]
    gc.collect()
    freed = _resident_bytes() - at_start
    again_ms, again_faults = _counted(filled)
    trim_ms, _ = _counted(_trim)
    trimmed = _resident_bytes() - at_start
    after_ms, after_faults = _counted(filled)
    return {
        "blocks": SMALL_BLOCKS,
        "kept": len(blocks),
        "block_bytes": SMALL_BYTES,
        "held_bytes": held,
        "freed_bytes": freed,
        "trimmed_bytes": trimmed,
        "trim_ms": trim_ms,
        "again_ms": [again_ms, after_ms],
        "again_faults": [again_faults, after_faults],
    }


def clear_caches(options: argparse.Namespace) -> dict[str, Any]:
    """A training step before and after `jax.clear_caches()`, and how many programs are compiled anew."""
    import jax

    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    step = _step("jax", options.batch_size)
    plain = [_counted(step)[0] for _ in range(options.steps)]
    compiled.clear()
    before = _resident_bytes()
    jax.clear_caches()
    gc.collect()
    given_back = before - _resident_bytes()
    next_ms, _ = _counted(step)
    programs = len(compiled)
    return {
        "step_ms": statistics.median(plain),
        "next_ms": next_ms,
        "programs": programs,
        "given_back_bytes": given_back,
    }


def empty_cache(options: argparse.Namespace) -> dict[str, Any]:
    """`torch.cuda.empty_cache()` before every step of every second stretch of steps."""
    import torch

    step = _step("torch", options.batch_size)

    def emptied() -> None:
        torch.cuda.empty_cache()
        step()

    times: dict[str, list[float]] = {"never": [], "each step": []}
    asked: dict[str, int] = {"never": 0, "each step": 0}
    for number in range(TURNS):
        order = [("never", step), ("each step", emptied)][:: 1 if number % 2 == 0 else -1]
        for name, call in order:
            call()
            before = torch.cuda.memory_stats()["num_device_alloc"]
            times[name] += [_counted(call)[0] for _ in range(options.steps)]
            asked[name] += torch.cuda.memory_stats()["num_device_alloc"] - before
    step()
    reserved, allocated = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    torch.cuda.empty_cache()
    many = TURNS * options.steps
    return {
        "never": {"step_ms": statistics.median(times["never"]), "device_allocations": asked["never"] / many},
        "each step": {
            "step_ms": statistics.median(times["each step"]),
            "device_allocations": asked["each step"] / many,
        },
        "reserved_bytes": [reserved, torch.cuda.memory_reserved()],
        "allocated_bytes": allocated,
    }


CASES = {
    "steps": steps,
    "trim": trim,
    "small blocks": small_blocks,
    "clear_caches": clear_caches,
    "empty_cache": empty_cache,
}


def _step(framework: str, batch_size: int) -> Callable[[], None]:
    """One synchronized training step of the deep CNN, warm; in JAX through `jax.jit`."""
    given = deep_cnn(framework, batch_size)
    step = _in_torch(**given) if framework == "torch" else _in_jax(**given)
    for _ in range(WARM):
        step()
    return step


def _in_torch(model: Any, example_inputs: Any, targets: Any, loss: Any, optimizer: Any) -> Callable[[], None]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    (x,), y = (each.to(device) for each in example_inputs), targets.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)

    def step() -> None:
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def _in_jax(model: Any, example_inputs: Any, targets: Any, loss: Any, optimizer: Any) -> Callable[[], None]:
    import jax
    import optax
    from flax import nnx

    graph, params, rest = nnx.split(model, nnx.Param, ...)
    state = [params, rest, optimizer.init(params)]

    @jax.jit
    def update(params: Any, rest: Any, moments: Any) -> tuple:
        def scored(params: Any) -> tuple:
            module = nnx.merge(graph, params, rest, copy=True)
            found = loss(module(*example_inputs), targets)
            return found, nnx.split(module, nnx.Param, ...)[2]

        gradients, new_rest = jax.grad(scored, has_aux=True)(params)
        updates, new_moments = optimizer.update(gradients, moments, params)
        return optax.apply_updates(params, updates), new_rest, new_moments

    def step() -> None:
        state[:] = jax.block_until_ready(update(*state))

    return step


def _counted(call: Callable[[], Any]) -> tuple[float, int]:
    """Milliseconds and minor page faults of a call."""
    faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults


def _medians(counted: list[tuple[float, int]]) -> dict[str, float]:
    times, faults = zip(*counted, strict=True)
    return {"step_ms": statistics.median(times), "faults": statistics.median(faults)}


def _trim() -> None:
    ctypes.CDLL(None).malloc_trim(0)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    main()
