"""Advice on what a step does besides computing: copies, values read back, compilations."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator

from perfkit._quantity import Quantity
from perfkit.profiling._profile import Finding
from perfkit.profiling._time_data import Op, Span
from perfkit.profiling.advice_compile import after_compiling, compiled_how
from perfkit.profiling.facts import Facts, is_copy, names, sped
from perfkit.reporting._format import format_bytes, format_percent

LEAST_SHARE = 0.02
LEAST_BYTES = 1e5
READ_BACK = re.compile(r"(_local_scalar_dense|is_nonzero|pure_callback|io_callback|debug_callback|xla_python_)")
LAYOUT = re.compile(r"(nchwToNhwc|nhwcToNchw|nchw_to_nhwc|nhwc_to_nchw)", re.IGNORECASE)


def copies(facts: Facts) -> Iterator[Finding]:
    """Tensors that are copied into another order or dtype, module by module."""
    elsewhere = {*facts.recurrent, *facts.float64}  # a recurrent layer turns its input by itself
    by_place: dict[str, list[Op]] = {}
    for op in facts.ops:
        if is_copy(op) and op not in elsewhere and op.phase in ("forward", "loss", "backward"):
            by_place.setdefault(op.module, []).append(op)
    for module, ops in by_place.items():
        moved, share = sum(op.moved_bytes for op in ops), facts.share(ops)
        if share < LEAST_SHARE or moved < LEAST_BYTES:
            continue
        yield Finding(
            kind="a copy",
            told=f"{' and '.join(sorted({op.name for op in ops}))} in {module or 'the model itself'} copies "
            f"{format_bytes(moved / 2)}: {format_percent(share)} of the step",
            where=(module,) if module else names(ops),
            share=share,
            resource="time",
            recipe="",
            advice="leave out the .contiguous(), .clone() or change of layout, or do it once, before the loop",
            predicted=sped(share, 1e3, "none of it left"),
        )


def layouts(facts: Facts) -> Iterator[Finding]:
    """cuDNN turns images from one order of dimensions into the other around its convolutions."""
    turning = [op for op in facts.ops if LAYOUT.search(op.name)]
    share = facts.share(turning)
    if share >= LEAST_SHARE:
        yield Finding(
            kind="layouts",
            told=f"{sum(op.calls for op in turning):.0f} kernels turn images between NCHW and NHWC: "
            f"{format_percent(share)} of the step",
            where=names(turning)[:5],
            share=share,
            resource="time",
            recipe="channels_last",
            advice="keep images with the channels innermost throughout",
            predicted=sped(share, 1e3, "none of it left"),
        )


def read_back(facts: Facts) -> Iterator[Finding]:
    """The host waits for a value in the middle of a step."""
    ops = facts.profile.time.ops
    reading = [op for op in ops if READ_BACK.search(op.name) and op.phase in ("forward", "loss", "backward")]
    waits = _waits_within(facts)
    if not reading and not waits:
        return
    waited_ms = sum(span.duration_ms for span in waits)
    times = sum(op.calls for op in reading if "is_nonzero" not in op.name) or len(waits)  # which reads by the other one
    share = max(waited_ms / facts.step_ms, facts.share(reading)) if facts.step_ms else 0.0
    yield Finding(
        kind="a value read back",
        told=f"the host reads a value off the device {times:.0f} time{'s' if times > 1 else ''} in the middle of a step"
        + (f", and waits {format_percent(waited_ms / facts.step_ms)} of it" if waits else ""),
        where=names(reading)[:5] or tuple(dict.fromkeys(span.module or span.name for span in waits))[:5],
        share=share,
        resource="time",
        recipe="",
        advice="keep .item(), float(), printing and `if tensor:` out of the step: they stop the host until the device "
        "is done, and break compiled graphs",
        predicted=Quantity.missing(
            "ratio",
            "a processor does not wait for itself: it costs on a device, and in compiled graphs"
            if facts.profile.device == "cpu"
            else "it depends on what the host could have started meanwhile",
        ),
    )


def decided_in_python(facts: Facts) -> Iterator[Finding]:
    """A JAX model whose operations depend on a value that Python reads, so that XLA cannot compile it."""
    if not facts.read_at:
        return
    left = after_compiling(facts)
    yield Finding(
        kind="a value read back",
        told=f"a value is read in Python at {facts.read_at}: so XLA cannot compile the model, and it runs operation by "
        "operation",
        where=(),
        share=1 - left,
        resource="time",
        recipe="",
        advice="decide within the program: jnp.where or jax.lax.cond in place of `if`, jax.lax.while_loop of `while`, "
        "an array in place of float(), .item() and numpy; then compile it",
        predicted=Quantity(1 / left, "ratio", method=f"compiled: {compiled_how(facts)}"),
    )


def _waits_within(facts: Facts) -> list[Span]:
    """The host's waits that it goes on working after; the one at the end of a step is the profiler's own."""
    host = [span for span in facts.profile.time.spans if span.track.startswith("host")]
    last_ms = max((span.start_ms for span in host if span.kind == "op"), default=0.0)
    return [span for span in host if span.kind == "wait" and span.start_ms + span.duration_ms <= last_ms]


def recompiles(facts: Facts) -> Iterator[Finding]:
    """Something compiles again while steps run."""
    time = facts.profile.time
    if time is None or not time.recompiles:
        return
    mean, median = statistics.fmean(time.step.samples_ms), time.step.median_ms
    compiling = facts.share([op for op in facts.ops if op.name == "compile"])
    share = max(1 - median / mean, compiling)
    eager = facts.profile.framework == "jax" and facts.by_operation
    yield Finding(
        kind="recompiling",
        told=f"{time.recompiles} compilation{'s' if time.recompiles > 1 else ''} in {len(time.step.samples_ms)} steps "
        "that should need none",
        where=(),
        share=share,
        resource="time",
        recipe="compile" if eager else "",
        advice="compile the whole model, once"
        if eager
        else "keep shapes, dtypes and Python numbers the same from step to step, or pad to a few lengths; in JAX "
        "make the jitted function once, outside of the loop",
        predicted=sped(share, 1e3, "steps without a compilation, against the mean of all"),
    )


RULES = (copies, layouts, read_back, decided_in_python, recompiles)
