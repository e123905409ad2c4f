"""Advice on layers that perfkit has kernels for: convolutions with a pool behind them, recurrent layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from perfkit._quantity import Quantity
from perfkit.profiling._profile import Finding
from perfkit.profiling._time_data import Op
from perfkit.profiling.advice_compile import after_compiling, timed_as_one
from perfkit.profiling.facts import Facts, Shape, is_host, names, outermost, shapes_of, sped
from perfkit.reporting._format import format_bytes, format_percent

LEAST_SHARE = 0.1
FEW_CHANNELS = 8
"""Up to so many input channels perfkit's convolution beats the libraries' on a processor."""
EFFICIENCY = 0.5
"""Of the roof, what perfkit's convolution is taken to reach."""
CALL_MS = 0.03
"""What calling it takes besides."""
MAPPED_BYTES = 32 * 2**20
"""C's allocator maps an array of this size anew each time, page by page as it is written, and gives it back when it is
freed, which no operation accounts for; smaller ones are used again. Source: mallopt(3), M_MMAP_THRESHOLD."""
OVER_XLA = 1.3
"""So many times faster than XLA's compiled convolution, ReLU and pool is perfkit's: 0.8 to 1.9 was measured on the
reference CNNs in bench/results, 0.9 to 1.4 for the whole call."""
RECURRENT_FACTOR = {"fused_kernels": 1.5, "half+fused_kernels": 2.4}
"""Slower than what was measured on the reference models in bench/results: 1.4 to 2.0, and 2.5 to 8.0 with bfloat16."""


def convolution_then_pool(facts: Facts) -> Iterator[Finding]:
    """A convolution of few channels writes what ReLU and pool read back, and keep a quarter of."""
    if "fused_kernels" in facts.applied:
        return
    for conv in facts.products:
        written = _output(conv)
        if written is None or conv.phase != "forward":
            continue
        behind = [op for op in facts.fusable if _reads(op, written)]
        pools = [op for op in behind if "pool" in op.name or "reduce_window_max" in op.name]
        if not pools:
            continue
        passes = [conv, *behind, *_backward(facts, conv)]
        share, least_ms = _share(facts, passes), _least_ms(facts, passes, written)
        if share < LEAST_SHARE:
            continue
        factor = max(sum(op.self_ms for op in passes) / least_ms, 1.0) if least_ms else 4.0
        how = f"at {EFFICIENCY:.0%} of the machine's roof" if least_ms else "4 times faster"
        if _compiles_too(facts) and facts.as_one is not None:
            factor, how = OVER_XLA, f"{OVER_XLA:g} times faster than compiled by XLA"
        yield Finding(
            kind="convolution, then pool",
            told=f"{conv.module or conv.name} writes {format_bytes(written.bytes)} that {_of(behind)} read back: "
            f"together {format_percent(share)} of {_whole(facts)}",
            where=names(passes)[:5],
            share=facts.share(passes),
            resource="time",
            recipe=_chain(facts, "fused_kernels"),
            advice="compute convolution, ReLU and pool in one pass, without the convolution's output in memory",
            predicted=_gain(
                facts, passes, factor, f"these {how} without their output in memory", _freeing(facts, passes)
            ),
        )


def _output(conv: Op) -> Shape | None:
    """What a convolution with few input channels writes; None for other operations."""
    shapes = shapes_of(conv)
    if "conv" not in conv.name or "backward" in conv.name or len(shapes) < 2 or len(shapes[0].sizes) != 4:
        return None
    image, weight = shapes[0].sizes, shapes[1].sizes
    if len(weight) != 4:
        return None
    last = "conv_general" in conv.name  # JAX: NHWC and HWIO
    inputs, outputs = (weight[2], weight[3]) if last else (weight[1], weight[0])
    if inputs > FEW_CHANNELS:
        return None
    # sides: of the image's, less what a "valid" kernel cannot reach; `_reads` allows for either
    height, width = image[1:3] if last else image[2:4]
    sizes = (image[0], height, width, outputs) if last else (image[0], outputs, height, width)
    return Shape(shapes[0].dtype, sizes)


def _reads(op: Op, written: Shape) -> bool:
    """Whether an operation's first input is what was written, up to a border of a few pixels."""
    shapes = shapes_of(op)
    if not shapes or len(shapes[0].sizes) != 4:
        return False
    pairs = zip(sorted(shapes[0].sizes), sorted(written.sizes), strict=True)
    exact = sum(found == size for found, size in pairs)
    near = all(0 <= size - found <= 12 for found, size in zip(shapes[0].sizes, written.sizes, strict=True))
    return near and exact >= 2 and shapes[0].sizes[0] == written.sizes[0]


def _backward(facts: Facts, conv: Op) -> list[Op]:
    return [op for op in facts.products if op.module == conv.module and op.phase == "backward" and op.module]


def _least_ms(facts: Facts, passes: list[Op], written: Shape) -> float | None:
    """What the fused kernel is taken to need: all FLOPs, but only what goes in and comes out."""
    peak, bandwidth = facts.peak("float32"), facts.bandwidth
    if not peak or not bandwidth:
        return None
    computing_ms = sum(op.flops for op in passes) / peak / 1e6
    rounds = 2 if any(op.phase == "backward" for op in passes) else 1
    moved = rounds * (written.bytes / 4 + shapes_of(passes[0])[0].bytes)
    return max(computing_ms, moved / bandwidth / 1e6) / EFFICIENCY + rounds * CALL_MS


def _freeing(facts: Facts, passes: list[Op]) -> float:
    """The part of the step in which what they write and the fused kernel does not is given back to the system."""
    if facts.on_device or facts.profile.framework != "torch":
        return 0.0
    mapped = {op: size for op in facts.ops if (size := _fresh_bytes(op)) >= MAPPED_BYTES}
    own = sum(mapped.get(op, 0.0) for op in passes if "pool" not in op.name)
    return facts.outside * own / sum(mapped.values()) if own else 0.0


def _fresh_bytes(op: Op) -> float:
    """What an operation writes into memory of its own."""
    if op.name.endswith("_") or not op.calls:
        return 0.0
    return op.moved_bytes / op.calls - sum(shape.bytes for shape in shapes_of(op))


def _of(ops: list[Op]) -> str:
    told = dict.fromkeys(op.module or op.name for op in sorted(ops, key=lambda op: op.name))
    return " and ".join(list(told)[:3])


def recurrent_layers(facts: Facts) -> Iterator[Finding]:
    """Recurrent layers: many small products, one behind the other."""
    ops, share = facts.recurrent, _share(facts, facts.recurrent)
    if share < LEAST_SHARE or "fused_kernels" in facts.applied:
        return
    half = _bfloat16_pays(facts) and all("float32" in op.shapes or not op.shapes for op in ops)
    for recipe, told in (("fused_kernels", "in one kernel"), ("half+fused_kernels", "in bfloat16")):
        if recipe.startswith("half") and not half:
            continue
        yield Finding(
            kind="recurrent layers" if recipe == "fused_kernels" else "recurrent layers in float32",
            told=f"recurrent layers take {format_percent(share)} of {_whole(facts)}"
            + ("" if recipe == "fused_kernels" else ", in float32"),
            where=outermost(names(ops))[:5],
            share=facts.share(ops),
            resource="time",
            recipe=_chain(facts, recipe),
            advice=f"run each of them {told}",
            predicted=_recurrent_gain(facts, recipe),
        )


def _recurrent_gain(facts: Facts, recipe: str) -> Quantity:
    if facts.profile.device != "cpu":
        return Quantity.missing("ratio", "perfkit's recurrent kernels are not measured on such a device yet")
    factor = RECURRENT_FACTOR[recipe]
    return _gain(facts, facts.recurrent, factor, f"{factor:g} times faster, as on the reference models")


def _bfloat16_pays(facts: Facts) -> bool:
    wide, narrow = facts.peak("float32"), facts.peak("bfloat16")
    return bool(wide and narrow and narrow > 1.3 * wide)


def _chain(facts: Facts, recipe: str) -> str:
    """In JAX a rewritten model is traced at every call, unless it is compiled."""
    return f"{recipe}+compile" if _compiles_too(facts) else recipe


def _whole(facts: Facts) -> str:
    return "what is computed" if _compiles_too(facts) else "the step"


def _compiles_too(facts: Facts) -> bool:
    return facts.profile.framework == "jax" and facts.by_operation and not facts.trains


def _share(facts: Facts, ops: Sequence[Op]) -> float:
    """Of the step; where it is compiled too, of what is then left: the computing."""
    computing = facts.share(op for op in facts.ops if not is_host(op)) if _compiles_too(facts) else 1.0
    return facts.share(ops) / computing if computing else 0.0


def _gain(facts: Facts, ops: Sequence[Op], factor: float, because: str, freeing: float = 0.0) -> Quantity:
    """What the step gains.

    Args:
        freeing: the part of it outside of operations that is then gone too.
    """
    if not _compiles_too(facts):
        return sped(facts.share(ops), factor, because, gone=freeing)
    share, told = _share(facts, ops), "the rest compiled"
    if facts.as_one is not None:
        left, told = facts.as_one * (1 - share + share / factor), timed_as_one(facts)
    else:
        left = after_compiling(facts, dict.fromkeys(ops, factor))
    return Quantity(1 / left, "ratio", method=f"Amdahl: {share:.0%} of what is computed, {because}; {told}")


RULES = (convolution_then_pool, recurrent_layers)
