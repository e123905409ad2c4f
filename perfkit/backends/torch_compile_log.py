"""What torch.compile does meanwhile: its graphs, its graph breaks, and what Inductor made of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch._dynamo.utils import counters

from perfkit.backends.adapter import CompileLog

_COUNTERS = ("stats", "graph_break", "unimplemented", "inductor", "aot_autograd")


@contextmanager
def watching() -> Iterator[Callable[[], CompileLog]]:
    """Within it, torch's compilations are recorded; the function tells them so far."""
    before = {group: Counter(counters[group]) for group in _COUNTERS}
    yield lambda: _log({group: Counter(counters[group]) - before[group] for group in _COUNTERS})


def _log(counts: dict[str, Counter]) -> CompileLog:
    reasons = [*counts["graph_break"], *counts["unimplemented"]]
    return CompileLog(
        graphs=counts["stats"]["unique_graphs"],
        breaks=tuple(dict.fromkeys(reason.strip().splitlines()[0] for reason in reasons)),
        cached=counts["inductor"]["fxgraph_cache_hit"],
        integer_kernels=sum(counts["inductor"][f"{op}_weight_prepack_matcher_count"] for op in ("qlinear", "qconv")),
        integer_layers=counts["inductor"]["perfkit_integer_layers"],
        integer_calls=counts["inductor"]["perfkit_integer_calls"],
    )
