"""What `python -m bench.gpu` times: perfkit's ops as they are dispatched, against what else there is, interleaved.

A ratio is the rival's time over perfkit's, with its 99 % interval, of times between events on the device, its cache
emptied before each call (`perfkit.kernels._clock`); for JAX of the host's clock around whole, synchronized calls. Small
calls take the host longer than the device: beside it stands "device", the same where the host was ahead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from statistics import median
from typing import Any

import torch
import torch._functorch.config

from bench.gpu_cases import Conv, Linear, Rnn
from bench.gpu_rows import Row, wide_first
from bench.gpu_subject import Subject
from perfkit._quantity import Comparison
from perfkit.kernels import conv2d, rnn, trace
from perfkit.kernels._clock import MOST_CALLS, Call, block_ms, calls_per_block
from perfkit.kernels.conv2d import cases as conv2d_cases
from perfkit.kernels.linear_int8 import cases as linear_cases
from perfkit.kernels.rnn import cases as rnn_cases
from perfkit.measure import statistics, timing

FLOOR = 0.95
"""After dispatch nothing is to be slower than this against the framework's own layers."""

MOST_PAIRS = 40


MOST_QUEUED = 20
"""Calls of a block before each of which the device waits."""


def paired(
    rival: Call, ours: Call, device: str, budget_s: float, *, queued: bool = False
) -> tuple[Comparison, float, float]:
    """Both in alternating blocks, ABBA and BAAB; the comparison and the median block of each, in ms.

    As `perfkit.measure.timing.interleave`, by the device's clock, and with blocks of calls that are queued.
    """
    sides = rival, ours
    calls = [min(calls_per_block(call, device), MOST_QUEUED if queued else MOST_CALLS) for call in sides]
    medians: tuple[list[float], list[float]] = ([], [])
    end, needed = time.monotonic() + budget_s, statistics.pairs_needed(timing.CONFIDENCE)
    for order in timing.orders(seed=0):
        for side in order:
            sides[side]()
            medians[side].append(median(block_ms(sides[side], calls[side], device, queued=queued)))
        if len(medians[0]) >= (MOST_PAIRS if time.monotonic() < end else needed):
            break
    compared = statistics.compare(*medians, baseline="rival", variant="perfkit", confidence=timing.CONFIDENCE, seed=0)
    return compared, median(medians[0]), median(medians[1])


def time_rows() -> Iterator[Row]:
    """The table of what must be seen first, then every other benchmark case against the framework's own layers."""
    seen = set()

    def row(name: str, make: Callable[[str], Subject], rivals: tuple[str, ...], **more: Any) -> Row:
        seen.add(name)
        return Row("time", name, lambda device, budget_s: timed(make(device), rivals, device, budget_s, **more), make)

    benchmarks = rnn_cases.BENCHMARKS
    wide = {name: case for name, case in benchmarks.items() if name.startswith("wide")}
    kernelbench, packed = benchmarks["KernelBench 3 #35"], benchmarks["packed"]
    large = next(case for case in conv2d_cases.BENCHMARKS if case.batch == 1024)

    def lstm(case: rnn_cases.Case, training: bool = False) -> Callable[[str], Subject]:
        return lambda device: Rnn(case, training, device)

    def conv(case: Any, dtype: str, training: bool = False) -> Callable[[str], Subject]:
        return lambda device: Conv(case, dtype, dtype != "float32", False, training, device)

    yield row("rnn KernelBench 3 #35", lstm(kernelbench), ("native", "compile"))
    yield row("rnn KernelBench 3 #35, products in TF32", lstm(kernelbench), ("native",), tf32=True)
    yield row("rnn packed", lstm(packed), ("native",))
    yield row("rnn packed, training", lstm(packed, True), ("native",))
    for dtype in ("float32", "bfloat16"):
        yield row(f"conv2d batch 1024 {dtype}", conv(large, dtype), ("native", "compile"))
        backward = conv(large, dtype, True)
        yield row(f"conv2d batch 1024 {dtype}, backward", backward, ("native", "compile"), backward=True)
    for name, case in wide.items():
        yield row(f"rnn {name}", lstm(case), ("native",))
    for case in linear_cases.BENCHMARKS:
        if case.rows in (16, 512, 4096):
            yield row(f"linear_int8 {case.name}", lambda device, case=case: Linear(case, device), ("library", "native"))
    yield from jax_rows()
    for training in (False, True):
        for name, case in wide_first(benchmarks):
            name = f"rnn {name}{', training' if training else ''}"
            if name not in seen:
                yield row(name, lstm(case, training), ("native",))
        for case in conv2d_cases.BENCHMARKS:
            name = f"conv2d {case.name}{', training' if training else ''}"
            yield row(name, conv(case, "float32", training), ("native",))


def timed(
    subject: Subject,
    rivals: tuple[str, ...],
    device: str,
    budget_s: float,
    *,
    backward: bool = False,
    tf32: bool = False,
) -> dict[str, Any]:
    """The op as it is dispatched, against the "native" layers, those under "compile", or a named implementation."""
    with _tf32() if tf32 else nullcontext(), _kept_graphs() if backward else nullcontext():
        with trace() as choices:
            ours = _call(subject, subject.outputs, backward, None)
            ours()
        row: dict[str, Any] = {"ran": choices[0].implementation, "why": choices[0].why, "rivals": {}}
        for rival in rivals:
            try:
                call = _rival(subject, rival, backward)
                call()
                share_s = budget_s / len(rivals) / 2
                compared, theirs_ms, ours_ms = paired(call, ours, device, share_s)
                alone, their_device_ms, our_device_ms = paired(call, ours, device, share_s, queued=True)
            except Exception as error:  # what a rival cannot do is a finding, and the others are still to be timed
                row["rivals"][rival] = {"refused": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"}
                continue
            row |= {"ms": ours_ms, "device_ms": our_device_ms}
            row["rivals"][rival] = (
                {"ms": theirs_ms} | told(compared) | {"device": {"ms": their_device_ms} | told(alone)}
            )
    floor = row["rivals"].get("native", {}) if subject.op.name != "linear_int8" else row["rivals"].get("library", {})
    if floor.get("high", 1.0) < FLOOR:
        row["failed"] = f"{floor['ratio']:.2f}x after dispatch: below {FLOOR} against the framework's own"
    return row


def told(compared: Comparison) -> dict[str, Any]:
    """A comparison as it is written down."""
    fields = ("ratio", "low", "high", "pairs")
    return {field: getattr(compared, field) for field in fields} | {"verdict": str(compared.verdict)}


def _rival(subject: Subject, name: str, backward: bool) -> Call:
    if name == "native":
        return _call(subject, lambda _implementation: subject.native(), backward, None)
    if name == "compile":
        compiled = torch.compile(subject.native, dynamic=False)
        return _call(subject, lambda _implementation: compiled(), backward, None)
    return _call(subject, subject.outputs, backward, name)


def _call(subject: Subject, forward: Callable[[str | None], list], backward: bool, implementation: str | None) -> Call:
    """One call; with `backward` of the gradients alone, again and again through the same graph."""
    if not backward:
        return lambda: subject.complete(lambda: forward(implementation))
    outputs, leaves = forward(implementation), list(subject.leaves.values())
    return lambda: torch.autograd.grad(outputs, leaves, subject.gradients, retain_graph=True)


@contextmanager
def _tf32() -> Iterator[None]:
    """Products of float32 in TF32, in matrix products as in convolutions and recurrent layers."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def _kept_graphs() -> AbstractContextManager:
    """torch.compile's graphs else overwrite what they saved, and can be differentiated once."""
    return torch._functorch.config.patch(donated_buffer=False)


# ---- JAX -------------------------------------------------------------------------------------------------------------


def jax_rows() -> Iterator[Row]:
    """perfkit's ops in JAX against what JAX has: cuDNN's LSTM in float32, convolution and pool under jit."""
    for batch, hidden in ((16, 512), (64, 256)):
        name = f"JAX LSTM float32 H={hidden} B={batch}"
        yield Row("time", name, lambda device, budget_s, given=(batch, hidden): jax_lstm(device, budget_s, *given))
    yield Row("time", "JAX conv2d batch 1024 float32", jax_conv)


def jax_lstm(device: str, budget_s: float, batch: int, hidden: int, steps: int = 512) -> dict[str, Any]:
    """Against `jax.experimental.rnn.lstm`."""
    if refused := _no_jax(device):
        return {"refused": refused}
    import jax
    from jax.experimental import rnn as builtin

    keys = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(keys[0], (steps, batch, hidden))
    shapes = (4 * hidden, hidden), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,)
    weights = [jax.random.uniform(key, shape) * hidden**-0.5 for key, shape in zip(keys[1:], shapes, strict=True)]
    flat = jax.numpy.concatenate([weight.ravel() for weight in weights])
    state, lengths = jax.numpy.zeros((1, batch, hidden)), jax.numpy.full(batch, steps, "int32")
    turned = jax.numpy.swapaxes(x, 0, 1)  # its layout is the batch first

    def theirs(x, flat):
        return builtin.lstm(x, state, state, flat, lengths, hidden, hidden, 1, 0.0, False)[0]

    ours = jax.jit(lambda x, weights: rnn.lstm(x, [weights])[0])
    return _jax_timed(jax.jit(theirs), (turned, flat), ours, (x, weights), budget_s)


def jax_conv(device: str, budget_s: float, batch: int = 1024) -> dict[str, Any]:
    """Against `lax.conv_general_dilated`, ReLU and `lax.reduce_window`, under jit."""
    if refused := _no_jax(device):
        return {"refused": refused}
    import jax

    x = jax.random.normal(jax.random.key(0), (batch, 28, 28, 1))
    weight, bias = jax.random.normal(jax.random.key(1), (3, 3, 1, 32)), jax.numpy.ones(32)

    def theirs(x, weight, bias):
        y = jax.lax.conv_general_dilated(x, weight, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        y, window = jax.nn.relu(y + bias), (1, 2, 2, 1)
        return jax.lax.reduce_window(y, -jax.numpy.inf, jax.lax.max, window, window, "VALID")

    ours = jax.jit(lambda x, weight, bias: conv2d.conv2d(x, weight, bias, activation="relu", pool=2))
    return _jax_timed(jax.jit(theirs), (x, weight, bias), ours, (x, weight, bias), budget_s)


def _no_jax(device: str) -> str:
    """Why JAX cannot be timed on such a device; empty where it can."""
    try:
        import jax
    except ImportError:
        return "jax is not installed"
    found = jax.default_backend()
    wanted = "gpu" if device == "cuda" else "cpu"
    return "" if found == wanted else f"jax runs on {found} here: install its CUDA plugin, pip install 'jax[cuda12]'"


def _jax_timed(
    theirs: Call, their_arguments: tuple, ours: Call, our_arguments: tuple, budget_s: float
) -> dict[str, Any]:
    import jax

    with trace() as choices:
        jax.block_until_ready(ours(*our_arguments))
    latency, _, compared = timing.paired(
        lambda: jax.block_until_ready(theirs(*their_arguments)),
        lambda: jax.block_until_ready(ours(*our_arguments)),
        baseline="rival",
        variant_name="perfkit",
        budget_s=budget_s,
    )
    rival = {"ms": latency.median_ms} | told(compared)
    return {"ran": choices[0].implementation, "why": choices[0].why, "rivals": {"built in": rival}}
