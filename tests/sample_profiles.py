"""Profiles of every kind that `perfkit.profile` can produce, built by hand: no framework, no timing."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable

from sample_profile_parts import (
    MIB,
    ceilings,
    environment,
    findings,
    laid_out,
    latency,
    layer_ops,
    memory,
    quantity,
    time,
)

from perfkit._quantity import Quantity
from perfkit.profiling._memory_data import Allocation, Memory, MemoryPoint
from perfkit.profiling._profile import Ceilings, DeviceState, Energy, Finding, Profile, Series
from perfkit.profiling._time_data import Module, Op, Span, Time

HOSTILE = "<script>alert('x')</script></script><!--|`a`*b*[bold red]\"&amp;\x1b[31m\n# @octocat ]]>\u2028"


def cnn(training: bool = True, **changes) -> Profile:
    """The small CNN on a CPU."""
    found = Profile(
        model="MnistCNN",
        framework="torch",
        mode="training" if training else "inference",
        device="cpu",
        inputs="float32 (64, 1, 28, 28)",
        environment=environment(),
        outcome="complete",
        explanation="",
        time=time(training),
        memory=memory(training),
        ceilings=ceilings(),
        energy=Energy(
            *(Quantity.missing(unit, "no RAPL counter can be read here") for unit in ("J", "W", "W")), 0.0, "none"
        ),
        findings=findings(),
        notes=("2 threads.",),
        created="2026-11-26T10:00:00Z",
        perfkit_version="0.1.0",
    )
    return dataclasses.replace(found, **changes)


def inference() -> Profile:
    return cnn(training=False)


def on_gpu() -> Profile:
    """A launch-bound model on a card: kernels beside host operations, gaps, telemetry, a clock that was held down."""
    source = random.Random(3)
    host = tuple(layer_ops(False))
    kernels = tuple(
        dataclasses.replace(
            op, name=f"sm90_{op.name[6:]}_kernel<float, 128, 64>", kind="kernel", self_ms=op.self_ms / 9
        )
        for op in host
    )
    spans, at = list(laid_out(host)), 0.3
    for op in kernels:
        spans.append(Span(op.name, "device 0: stream 7", "kernel", at, op.self_ms, 0, op.module))
        at += op.self_ms + 0.35
    spans.append(Span("cudaStreamSynchronize", "host", "wait", 4.0, 0.4, 1))
    seconds = tuple(0.1 * index for index in range(60))
    wattage = tuple(310 + 40 * math.sin(second) + source.gauss(0, 6) for second in seconds)
    card = DeviceState(
        "NVIDIA H100 80GB HBM3 (0)",
        {
            "temperature": quantity(61, "°C"),
            "power": quantity(338, "W"),
            "power limit": quantity(700, "W"),
            "sm clock": quantity(1755, "MHz"),
            "ECC errors": quantity(0, "count"),
            "fan": Quantity.missing("%", "not supported: this card has no fan"),
        },
        ("software power cap",),
        ("python (pid 4711), 1.2 GiB",),
        (
            Series("power", "W", seconds, wattage),
            Series("temperature", "°C", seconds, tuple(52 + 9 * (1 - math.exp(-second)) for second in seconds)),
            Series("sm clock", "MHz", seconds, tuple(1980.0 if second < 3 else 1755.0 for second in seconds)),
        ),
    )
    measured = time(
        False,
        ops=(*host, *kernels),
        spans=tuple(sorted(spans, key=lambda span: span.start_ms)),
        busy=quantity(0.14, "ratio", "union of kernels"),
        idle_ms=(0.41, 0.35, 0.35, 0.34),
        waiting=quantity(0.09, "ratio"),
        recompiles=2,
    )
    return cnn(
        False,
        device="cuda",
        environment=environment(accelerators=("NVIDIA H100 80GB HBM3",)),
        time=measured,
        memory=memory(
            False,
            reserved=quantity(64 * MIB, "B"),
            device_used=quantity(1.3 * 2**30, "B"),
            fragmentation=quantity(0.22, "ratio"),
        ),
        energy=Energy(
            quantity(0.71, "J", "energy above idle / steps"),
            quantity(338, "W"),
            quantity(96, "W"),
            5.02,
            "NVML, 1 card",
        ),
        devices=(card,),
    )


def in_jax() -> Profile:
    ops = tuple(
        dataclasses.replace(op, name=name)
        for op, name in zip(
            layer_ops(False), ("conv_general_dilated", "add", "max", "reduce_window_max") * 3, strict=False
        )
    )
    programmed = memory(False, program={"temp": 9.1 * MIB, "arguments": 2.84 * MIB, "output": 2560.0, "alias": 0.0})
    compiled = time(False, ops=ops, first_call_s=quantity(1.9, "s"), compile_s=quantity(1.7, "s", "XLA's own events"))
    return cnn(False, framework="jax", time=compiled, memory=programmed)


def faster() -> Profile:
    """The CNN after its convolutions became others, in a tenth less time elsewhere, and without one operation."""
    before = time()
    ops = tuple(
        dataclasses.replace(
            op,
            name=op.name.replace("aten::conv", "aten::mkldnn_conv"),
            self_ms=0.6 * op.self_ms if "conv" in op.name else op.self_ms,
        )
        for op in before.ops
        if op.name != "aten::add_"
    )
    saved = sum(op.self_ms for op in before.ops) - sum(op.self_ms for op in ops)
    phases = dict(before.phases_ms)
    phases["forward"] -= saved
    modules = tuple(
        dataclasses.replace(module, self_ms=0.6 * module.self_ms) if module.path == "conv1" else module
        for module in before.modules
    )
    step = latency(sum(phases.values()) / 1.1, seed=4)
    return cnn(time=time(ops=ops, modules=modules, phases_ms=phases, step=step), memory=memory(False))


def failed() -> Profile:
    """The model raised before anything was measured."""
    told = "RuntimeError: mat1 and mat2 shapes cannot be multiplied (64x5408 and 3136x128)"
    return cnn(outcome="failed", explanation=told, time=None, memory=None, ceilings=None, energy=None, findings=())


def interrupted() -> Profile:
    return cnn(outcome="interrupted", explanation="Interrupted while memory was traced.", memory=None, energy=None)


def unavailable() -> Profile:
    """Nothing could be measured, each for a reason of its own."""

    def blank(value):
        if isinstance(value, Quantity):
            return Quantity.missing(value.unit, f"no such counter here ({value.unit})")
        return value

    measured, held = time(ops=(), modules=(), spans=(), phases_ms={}), memory(timeline=(), largest=(), by_category={})
    fields = [
        {item.name: blank(getattr(part, item.name)) for item in dataclasses.fields(part)} for part in (measured, held)
    ]
    return cnn(
        time=Time(**fields[0]),
        memory=Memory(**(fields[1] | {"by_module": {}})),
        ceilings=Ceilings({"float32": Quantity.missing("GFLOP/s", "no budget")}, Quantity.missing("GB/s", "no budget")),
        findings=(),
        devices=(DeviceState("CPU package 0", {"power": Quantity.missing("W", "no permission to read RAPL")}),),
        created="",
        perfkit_version="",
    )


def huge() -> Profile:
    """More of everything than a page can hold."""
    source = random.Random(1)
    stem = "model.decoder.layers." + "a_long_module_name." * 4
    modules, ops, spans = [Module("", "Huge", 1, 900, 1800, 0, 1e12, 10**9, 0, 0)], [], []
    for index in range(400):
        path = f"{stem}{index}"
        modules.append(Module(path, "Block", 1, 0.6, 1.2, 1.8, 6e8, 10**6, 4 * MIB, MIB))
        ops += [Op(f"aten::op_{part}", "op", path, "forward", 3, source.random(), 1e8, 1e6) for part in range(4)]
    for index in range(24_000):
        track, start = f"host {index % 3}", 0.03 * (index // 3)
        spans.append(
            Span(f"aten::op_{index % 40}", track, "op", start, 0.03 * source.random(), 2, f"{stem}{index % 400}")
        )
    points = tuple(
        MemoryPoint(0.6 * index, {"parameters": 4e9, "activations": 1e7 * index, "temporaries": 1e8 * source.random()})
        for index in range(2000)
    )
    held = memory(timeline=points, largest=tuple(Allocation(1e8, "activations", stem, "op") for _ in range(400)))
    card = DeviceState("card", {}, series=(Series("power", "W", tuple(map(float, range(5000))), (1.0,) * 5000),))
    measured = time(modules=tuple(modules), ops=tuple(ops), spans=tuple(spans), step=latency(2700.0, 2000))
    return cnn(time=measured, memory=held, devices=(card,), notes=tuple("note " * 40 for _ in range(20)))


def hostile() -> Profile:
    """Every free text is markup for someone: HTML, script, rich, the terminal."""
    bad = HOSTILE
    missing = Quantity.missing("B", bad)
    measured = time(
        ops=(Op(bad, "op", bad, "forward", 1, 2.0, 1e6, 1e6, bad), *layer_ops(True)),
        modules=(Module("", bad, 1, 2, 0, 0, 0, 0, 0, 0), Module(bad, bad, 1, 2, 0, 2, 1e6, 3, 0, 0)),
        spans=(Span(bad, bad, "op", 0, 2.0, 0, bad),),
    )
    held = memory(
        by_module={bad: 1e6},
        largest=(Allocation(1e6, "activations", bad, bad, bad),),
        growth=missing,
        program={bad: 1.0},
    )
    device = DeviceState(bad, {bad: missing}, (bad,), (bad,), (Series(bad, bad, (0.0, 1.0), (1.0, 2.0)),))
    finding = Finding(bad, bad, (bad,), 0.5, "time", bad, bad, quantity(1.2, "ratio", bad))
    return cnn(
        model=bad,
        framework=bad,
        device=bad,
        inputs=bad,
        explanation=bad,
        outcome="interrupted",
        time=measured,
        memory=held,
        ceilings=Ceilings({bad: quantity(1e3, "GFLOP/s")}, quantity(10.0, "GB/s", bad)),
        energy=Energy(missing, missing, missing, 1.0, bad),
        devices=(device,),
        findings=(finding,),
        notes=(bad,),
        environment=environment(cpu=bad, libraries={bad: bad}),
        created=bad,
        perfkit_version=bad,
    )


FACTORIES: dict[str, Callable[[], Profile]] = {
    made.__name__: made for made in (cnn, inference, on_gpu, in_jax, failed, interrupted, unavailable, huge, hostile)
}
