"""The parts of a profile, built by hand: a small CNN's operations, modules, times and memory."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator

from perfkit._environment import Environment
from perfkit._quantity import Latency, Quantity
from perfkit.profiling._memory_data import Allocation, Memory, MemoryPoint
from perfkit.profiling._profile import Ceilings, Finding
from perfkit.profiling._time_data import Module, Op, Span, Time

MIB = 2**20

# name, class, parameters, output MiB, FLOPs forward in millions, forward ms, and the operations with their shares
LAYERS = (
    ("conv1", "Conv2d", 320, 5.28, 24.9, 0.82, (("aten::convolution", 0.97), ("aten::add_", 0.03))),
    ("relu", "ReLU", 0, 5.28, 0.0, 0.31, (("aten::relu", 1.0),)),
    ("pool", "MaxPool2d", 0, 1.32, 0.0, 0.58, (("aten::max_pool2d_with_indices", 1.0),)),
    ("fc1", "Linear", 692_352, 0.03, 88.6, 1.94, (("aten::addmm", 1.0),)),
    ("fc2", "Linear", 1_290, 0.002, 0.16, 0.05, (("aten::addmm", 1.0),)),
)
BACKWARD = {"aten::addmm": "aten::mm", "aten::convolution": "aten::convolution_backward", "aten::add_": "aten::sum"}


def quantity(value: float, unit: str, method: str | None = None) -> Quantity:
    return Quantity(value, unit, method=method)


def latency(median_ms: float, count: int = 200, seed: int = 0) -> Latency:
    source = random.Random(seed)
    samples = sorted(median_ms * (0.97 + source.gammavariate(2, 0.015)) for _ in range(count))
    p99 = Quantity.missing("ms", f"p99 needs 662 samples, have {count}")
    median = samples[count // 2]
    return Latency(tuple(samples), median, quantity(samples[int(0.9 * count)], "ms"), quantity(samples[-9], "ms"), p99)


def environment(**changes) -> Environment:
    found = Environment(
        fingerprint="a1b2c3d4e5f6",
        cpu="AMD EPYC 9B14",
        cores=2,
        instruction_sets=("avx2", "avx512f"),
        memory_bytes=Quantity(16 * 2**30, "B"),
        accelerators=(),
        os="Linux 6.1",
        python="3.11.7",
        libraries={"torch": "2.13.0", "numpy": "2.4.0"},
        threads={"torch": 2},
        settings={"float32_matmul_precision": "highest"},
    )
    return dataclasses.replace(found, **changes)


def layer_ops(training: bool) -> Iterator[Op]:
    """The operations of the small CNN, by layer and phase."""
    for module, _, _, output_mib, mflops, forward_ms, parts in LAYERS:
        for name, part in parts:
            moved = 2.2 * output_mib * MIB + 4 * 1e3
            yield Op(name, "op", module, "forward", 1, part * forward_ms, part * mflops * 1e6, moved, "float32[64, 32]")
            if training:
                back = BACKWARD.get(name, f"{name}_backward")
                yield Op(back, "op", module, "backward", 2, 1.9 * part * forward_ms, 2 * part * mflops * 1e6, 2 * moved)
    if training:
        yield Op("aten::_log_softmax", "op", "", "loss", 1, 0.04, 0, 5e3, "float32[64, 10]")
        yield Op("aten::_foreach_addcdiv_", "op", "", "optimizer", 2, 0.55, 4.1e6, 11e6)
        yield Op("aten::_foreach_mul_", "op", "", "optimizer", 4, 0.38, 2.8e6, 16e6)


def layer_modules(training: bool) -> tuple[Module, ...]:
    found = []
    for name, kind, parameters, output_mib, mflops, forward_ms, _ in LAYERS:
        back = 1.9 * forward_ms if training else 0.0
        flops, saved = (3 if training else 1) * mflops * 1e6, training * output_mib * MIB
        found.append(
            Module(name, kind, 1, forward_ms, back, forward_ms + back, flops, parameters, saved, output_mib * MIB)
        )
    totals = {
        field: sum(getattr(module, field) for module in found)
        for field in ("forward_ms", "backward_ms", "flops", "parameters", "saved_bytes")
    }
    return (Module("", "MnistCNN", 1, self_ms=0.06, output_bytes=2560, **totals), *found)


def laid_out(ops: tuple[Op, ...]) -> tuple[Span, ...]:
    """One step as spans: phases outside, modules within, operations within those."""
    spans, now = [], 0.0
    for phase in ("forward", "loss", "backward", "optimizer"):
        within = [op for op in ops if op.phase == phase and op.kind == "op"]
        within = within[::-1] if phase == "backward" else within
        track, start = ("host: autograd" if phase == "backward" else "host"), now
        for op in within:
            now += 0.02
            if op.module:
                spans.append(Span(op.module, track, "module", now, op.self_ms + 0.01, 1, op.module))
            spans.append(Span(op.name, track, "op", now + 0.005, op.self_ms, 2, op.module))
            now += op.self_ms + 0.01
        if within:
            spans.append(Span(phase, "host", "phase", start, now - start, 0))
    return tuple(sorted(spans, key=lambda span: (span.start_ms, span.depth)))


def time(training: bool = True, **changes) -> Time:
    ops = tuple(layer_ops(training))
    total = sum(op.self_ms for op in ops)
    phases = {phase: sum(op.self_ms for op in ops if op.phase == phase) for phase in ("forward", "loss", "backward")}
    phases |= {"optimizer": sum(op.self_ms for op in ops if op.phase == "optimizer"), "other": 0.1 * total}
    no_device = Quantity.missing("ratio", "the host computes by itself: there is no device to wait for")
    found = Time(
        step=latency(total),
        first_call_s=quantity(0.0451, "s"),
        compile_s=quantity(0.0, "s", "nothing was compiled"),
        recompiles=0,
        phases_ms={name: ms for name, ms in phases.items() if ms},
        busy=quantity(0.93, "ratio", "union of operations"),
        idle_ms=(),
        waiting=no_device,
        attributed=quantity(1 / 1.1, "ratio", "operations / profiled step"),
        overhead=quantity(1.1, "ratio", "profiled step / step"),
        flops=quantity(sum(op.flops for op in ops), "FLOP", "formulas on the shapes of every operation"),
        utilization=quantity(0.27, "ratio", "29.8 GFLOP/s at the median / 162 GFLOP/s, the ceiling for float32"),
        ops=ops,
        modules=layer_modules(training),
        spans=laid_out(ops),
    )
    return dataclasses.replace(found, **changes)


def memory(training: bool = True, **changes) -> Memory:
    held = {"parameters": 2.65 * MIB, "inputs": 0.19 * MIB}
    if training:
        held |= {"gradients": 2.65 * MIB, "optimizer state": 5.3 * MIB}
    timeline, peak = [], {}
    for index in range(120):
        wave = math.sin(math.pi * index / 119)
        now = held | {"activations": 14 * MIB * wave, "temporaries": 3 * MIB * abs(math.sin(index / 4)) * wave}
        timeline.append(MemoryPoint(0.1 * index, now))
        peak = max(peak, now, key=lambda point: sum(point.values()))
    gone = Quantity.missing("B", "no CUDA device: there is no caching allocator")
    activations = peak["activations"]
    found = Memory(
        peak=quantity(sum(peak.values()), "B", "allocations traced during one step"),
        by_category=peak,
        by_module={"conv1": 0.45 * activations, "relu": 0.4 * activations, "pool": 0.15 * activations},
        timeline=tuple(timeline),
        largest=(
            Allocation(0.45 * activations, "activations", "conv1", "aten::convolution", "float32[64, 32, 26, 26]", 0.1),
            Allocation(2.64 * MIB, "parameters", "fc1", "", "float32[128, 5408]"),
            Allocation(1.9 * MIB, "temporaries", "", "aten::mm", "float32[64, 5408]", 4.2, 4.9),
        ),
        growth=quantity(0.0, "B"),
        process_high_water=quantity(41 * MIB, "B", "resident memory, median of 3 steps"),
        native_heap=quantity(58 * MIB, "B", "mallinfo2"),
        reserved=gone,
        device_used=Quantity.missing("B", "no NVIDIA driver"),
        fragmentation=Quantity.missing("ratio", gone.unavailable),
    )
    return dataclasses.replace(found, **changes)


def ceilings() -> Ceilings:
    slow = Quantity.missing("GFLOP/s", "torch has no int8 product for this processor")
    return Ceilings(
        {"float32": quantity(162.0, "GFLOP/s"), "bfloat16": quantity(70.0, "GFLOP/s"), "int8": slow},
        quantity(18.4, "GB/s", "triad of 256 MiB"),
    )


def findings() -> tuple[Finding, ...]:
    return (
        Finding(
            "convolution layout",
            "38% of the step is spent in convolutions that reorder their inputs.",
            ("conv1",),
            0.38,
            "time",
            "channels_last+compile",
            "Keep images with the channels innermost, so that no kernel reorders them.",
            quantity(1.31, "ratio", "the reorders alone"),
        ),
        Finding(
            "activations dominate",
            "Activations are 14.0 MiB of the 27.4 MiB held at the peak.",
            ("conv1", "relu"),
            0.51,
            "memory",
            "bf16",
            "Keep them in 16 bits.",
            quantity(1.34, "ratio"),
        ),
        Finding(
            "data waits",
            "The step waits 4% of its time for its inputs.",
            (),
            0.04,
            "time",
            "",
            "Load the next batch while this one is computed.",
            Quantity.missing("ratio", "not known before the loader is seen"),
        ),
    )
