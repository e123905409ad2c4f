"""One profiled step of a JAX model as spans: the host's thread, and what XLA ran."""

from __future__ import annotations

from collections.abc import Iterator

from perfkit.profiling import jax_ops
from perfkit.profiling._time_data import Span
from perfkit.profiling.jax_ops import Reader
from perfkit.profiling.jax_trace import Trace

MOST_SPANS = 2000


def spans(model: str, trace: Trace, reader: Reader, step: tuple[float, float]) -> tuple[Span, ...]:
    """The longest `MOST_SPANS` of a step, in order.

    Args:
        model: its name, for the span of the model itself.
        step: beginning and end.
    """
    found = [*_host(model, trace, step), *_operations(trace, reader, step)]
    longest = sorted(found, key=lambda span: -span.duration_ms)[:MOST_SPANS]
    return tuple(_nested(sorted(longest, key=lambda span: (span.start_ms, -span.duration_ms))))


def _host(model: str, trace: Trace, step: tuple[float, float]) -> Iterator[Span]:
    for item in trace.host:
        if item.end_ms > step[0] and item.start_ms < step[1]:
            kind = item.kind if item.kind in ("module", "wait") else "op"
            name = f"dispatch {item.name}" if item.kind == "dispatch" else item.name or model
            yield _span(name, "host", kind, (item.start_ms, item.end_ms), step, item.module)


def _operations(trace: Trace, reader: Reader, step: tuple[float, float]) -> Iterator[Span]:
    for event in jax_ops.of_step(trace, step):
        rows = reader.rows(event)
        kind = "copy" if event.copies else "kernel" if trace.device else "op"
        module = max(rows, key=lambda row: row.share).module if rows else ""
        name = " + ".join(dict.fromkeys(row.name for row in rows)) or event.name
        yield _span(name, event.track, kind, (event.start_ms, event.end_ms), step, module)


def _span(name: str, track: str, kind: str, at: tuple[float, float], step: tuple[float, float], module: str) -> Span:
    start, end = max(at[0], step[0]), min(at[1], step[1])
    return Span(name, track, kind, start - step[0], end - start, module=module)


def _nested(ordered: list[Span]) -> Iterator[Span]:
    """The spans with how deep they lie in those of their track that are not over yet."""
    open_until: dict[str, list[float]] = {}
    for span in ordered:
        around = [until for until in open_until.get(span.track, ()) if until > span.start_ms]
        open_until[span.track] = [*around, span.start_ms + span.duration_ms]
        yield Span(span.name, span.track, span.kind, span.start_ms, span.duration_ms, len(around), span.module)
