"""One side of the report: what a variant of the model costs."""

from __future__ import annotations

from perfkit._quantity import Comparison, Latency, Quantity, Verdict
from perfkit._report import Measurement, Parallel
from perfkit._variant import Variant
from perfkit.backends.adapter import Traffic
from perfkit.measure import memory


def measurement(name: str, variant: Variant, latency: Latency | None, anew: bool = False) -> Measurement:
    """Put together what was timed and what is measured apart from timing: memory and size.

    Args:
        anew: compile once more, where that is what it takes to count memory.
    """
    work, backend = variant.work, variant.work.backend
    model_bytes, parameters = backend.size(work)
    peak = high_water = optimizer = Quantity.missing("B", variant.unmeasured)
    if variant.measurable:
        with variant.finished.keeping_state():
            peak = backend.tensor_peak(work, variant.finished, anew=anew)
            optimizer = backend.optimizer_state(work, variant.finished)
            high_water = memory.process_high_water(variant.call)
    return Measurement(
        name=name,
        latency=latency,
        throughput=_throughput(variant, latency),
        first_call_s=variant.first_call_s,
        compile_s=compile_seconds(variant, latency),
        tensor_peak_bytes=peak,
        process_high_water_bytes=high_water,
        model_bytes=model_bytes,
        parameters=parameters,
        optimizer_state_bytes=optimizer,
    )


def parallel(result: Variant, speedup: Comparison | None) -> Parallel | None:
    """What spreading the model over several devices gave and cost; None where it was not spread."""
    work, world = result.work, result.work.world
    if work.spread is None:
        return None
    model_bytes, _ = work.backend.size(work)
    peak, ratio = (Quantity.missing(unit, result.unmeasured) for unit in ("B", "ratio"))
    traffic = Traffic(peak, ratio)
    if result.measurable:
        with result.finished.keeping_state():
            traffic = work.backend.traffic(work, result.finished)
            peak = work.backend.tensor_peak(work, result.finished)
    efficiency = ratio
    if speedup is not None:
        method = f"speed-up {speedup.ratio:.2f} / {world.devices} devices"
        efficiency = Quantity(speedup.ratio / world.devices, "ratio", method=method)
    ranks = world.gather((peak, model_bytes))
    return Parallel(
        layout=str(work.layout),
        devices=world.devices,
        processes=world.size,
        parts=work.spread.parts,
        efficiency=efficiency,
        sent_bytes=traffic.sent_bytes,
        communicating=traffic.share,
        rank_peak_bytes=tuple(peak for peak, _ in ranks),
        rank_model_bytes=tuple(held for _, held in ranks),
        balance=work.spread.balance,
        bubble=work.spread.bubble,
    )


def payback(optimizing_s: float, before: Measurement, after: Measurement, speedup: Comparison | None) -> Quantity:
    """After how many calls the cost of optimizing is earned back."""
    if speedup is None:
        return Quantity.missing("calls", before.throughput.unavailable)
    if speedup.verdict != Verdict.FASTER:
        return Quantity.missing("calls", f"nothing is earned back: {speedup.verdict}")
    saved_s = (before.latency.median_ms - after.latency.median_ms) / 1e3
    if saved_s <= 0:
        return Quantity.missing("calls", "the medians of single calls do not differ")
    return Quantity(float(round(optimizing_s / saved_s)), "calls", method="cost of optimizing / time saved per call")


def _throughput(variant: Variant, latency: Latency | None) -> Quantity:
    if latency is None:
        return Quantity.missing("items/s", variant.unmeasured)
    samples = variant.work.samples
    if samples is None:
        return Quantity.missing("items/s", "no dimension of the inputs is known to be the batch")
    where = "" if samples.dim == 0 else f", along dimension {samples.dim} of the inputs,"
    if samples.assumed:
        where = ", if the first dimension of the inputs is the batch, as nothing tells,"
    return Quantity(
        samples.count / latency.median_ms * 1e3, "items/s", method=f"{samples.count} items{where} per median call"
    )


def compile_seconds(variant: Variant, latency: Latency | None) -> Quantity:
    """What of the first call was compilation."""
    if latency is None:
        return Quantity.missing("s", variant.unmeasured)
    if variant.log.seconds is not None:
        return Quantity(variant.log.seconds, "s", method="the framework's own compile events during the first call")
    if variant.log.graphs == 0:
        return Quantity(0.0, "s", method="nothing was compiled")
    seconds = max(variant.first_call_s.value - latency.median_ms / 1e3, 0.0)
    return Quantity(seconds, "s", method="first call minus a median call")
