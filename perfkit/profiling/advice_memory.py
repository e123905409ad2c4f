"""Advice on memory: what the peak is made of, and what is left behind."""

from __future__ import annotations

from collections.abc import Iterator

from perfkit._quantity import Quantity
from perfkit.measure import kept_memory
from perfkit.profiling._memory_data import Memory
from perfkit.profiling._profile import Finding
from perfkit.profiling._time_data import Module
from perfkit.profiling.facts import Facts
from perfkit.reporting._format import format_bytes, format_percent

DOMINATES = 0.5
LEAST_BYTES = 8e6
"""Smaller peaks are nobody's trouble."""
LEAK_BYTES = 1024
WEIGHTS_BYTES = 64e6


def _peak(facts: Facts) -> tuple[Memory, float] | None:
    memory = facts.profile.memory
    return (memory, memory.peak.value) if memory and memory.peak.value else None


def leak(facts: Facts) -> Iterator[Finding]:
    """Each step leaves something behind."""
    memory = facts.profile.memory
    growth = memory.growth.value if memory else None
    if not growth or growth < LEAK_BYTES:
        return
    peak = memory.peak.value or growth
    yield Finding(
        kind="a leak",
        told=f"memory grows by {format_bytes(growth)} a step: after 1000 steps, by {format_bytes(1000 * growth)}",
        where=tuple(dict.fromkeys(held.module or held.op for held in memory.largest if held.freed_ms is None))[:3],
        share=min(growth / peak, 1.0),
        resource="memory",
        recipe="",
        advice="something keeps tensors of earlier steps: a list of losses (append loss.item() or loss.detach()), a "
        "cache, a hidden state that is not detached",
        predicted=Quantity.missing("ratio", "it grows without end"),
    )


def activations(facts: Facts) -> Iterator[Finding]:
    """What the backward pass needs is most of the peak."""
    if (found := _peak(facts)) is None or not facts.trains:
        return
    memory, peak = found
    held = memory.by_category.get("activations", 0.0)
    if held < DOMINATES * peak or peak < LEAST_BYTES or "checkpoint" in facts.applied:
        return
    kept = _kept(facts.profile.time.modules) if facts.profile.time else None
    if kept is not None and kept < held:
        yield _smaller(
            "activations dominate",
            f"{format_percent(held / peak)} of the peak of {format_bytes(peak)} is activations that wait for the "
            "backward pass",
            tuple(sorted(memory.by_module, key=memory.by_module.get, reverse=True))[:5],
            held / peak,
            "checkpoint",
            "compute them again in the backward pass instead of keeping them",
            peak / (peak - held + kept),
            f"{format_bytes(kept)} of activations left: the largest part, and what goes from part to part",
        )


def _kept(modules: tuple[Module, ...]) -> float | None:
    """What checkpointing each part of the model leaves: the inputs of all, and the inside of the largest."""
    parts = [module for module in modules if module.path and "." not in module.path and module.saved_bytes]
    if len(parts) < 3:
        return None
    return sum(part.output_bytes for part in parts) + max(part.saved_bytes for part in parts)


def batch(facts: Facts) -> Iterator[Finding]:
    """What grows with the batch is most of the peak of a training step."""
    if (found := _peak(facts)) is None or not facts.trains or "accumulate" in facts.applied:
        return
    memory, peak = found
    held = sum(memory.by_category.get(name, 0.0) for name in ("activations", "temporaries"))
    if held < DOMINATES * peak or peak < LEAST_BYTES:
        return
    yield _smaller(
        "the batch dominates",
        f"{format_percent(held / peak)} of the peak of {format_bytes(peak)} grows with the batch",
        (),
        held / peak,
        "accumulate(batch_dim=1)" if facts.time_major else "accumulate",
        "run the step in micro-batches, if memory is short: it takes longer",
        peak / (peak - held / 2),
        "half of it at a time, in two micro-batches",
    )


def fresh(facts: Facts) -> Iterator[Finding]:
    """On a CPU each step takes memory from the system anew: in PyTorch as counted, in JAX, in training, as compiled."""
    if (found := _peak(facts)) is None or facts.profile.device != "cpu":
        return
    memory, peak = found
    about, torch = facts.profile.environment, facts.profile.framework == "torch"
    taken = memory.program.get("anew" if torch else "temp", 0.0)
    kept = kept_memory.kept(about.settings) or kept_memory.replaced(about.settings) or "keep_memory" in facts.applied
    if kept or not (torch or facts.trains) or "Linux" not in about.os or not kept_memory.fresh(int(taken)):
        return
    yield Finding(
        kind="fresh memory",
        told=f"each step takes {format_bytes(taken)} from the system anew and gives that back: the kernel zeroes "
        "and maps every page of it again",
        where=(),
        share=min(taken / peak, 1.0),
        resource="memory",
        recipe="keep_memory" if torch else "",
        advice=kept_memory.BY_RECIPE if torch else kept_memory.KEEPING,
        predicted=Quantity.missing("ratio", "the time that the kernel takes for it was not measured"),
    )


def optimizer_state(facts: Facts) -> Iterator[Finding]:
    """The optimizer's moments are most of the peak."""
    if (found := _peak(facts)) is None or not facts.trains:
        return
    memory, peak = found
    held = memory.by_category.get("optimizer state", 0.0)
    if held < 0.4 * peak or peak < WEIGHTS_BYTES or facts.profile.device == "cpu":
        return
    yield _smaller(
        "optimizer state dominates",
        f"{format_percent(held / peak)} of the peak of {format_bytes(peak)} is the optimizer's state",
        ("optimizer",),
        held / peak,
        "offload",
        "keep it in the host's memory",
        peak / (peak - held),
        "none of it on the device",
    )


def weights(facts: Facts) -> Iterator[Finding]:
    """In inference, float32 weights are most of the peak."""
    if (found := _peak(facts)) is None or facts.trains or {"half", "int8", "int8_weight_only"} & facts.applied:
        return
    memory, peak = found
    held = memory.by_category.get("parameters", 0.0)
    if held < DOMINATES * peak or held < WEIGHTS_BYTES:
        return
    yield _smaller(
        "weights dominate",
        f"{format_percent(held / peak)} of the peak of {format_bytes(peak)} is weights",
        (),
        held / peak,
        "half",
        "store them in 16 bits",
        peak / (peak - held / 2),
        "half of them, if they are float32 now",
    )


def _smaller(
    kind: str, told: str, where: tuple[str, ...], share: float, recipe: str, advice: str, factor: float, because: str
) -> Finding:
    predicted = Quantity(factor, "ratio", method=f"{because}; the rest of the peak as it is")
    return Finding(kind, told, where, share, "memory", recipe, advice, predicted)


RULES = (leak, activations, batch, fresh, optimizer_state, weights)
