"""What torch.compile does meanwhile: its graphs, its graph breaks, and what Inductor made of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch._dynamo.utils import counters

from perfkit.backends.adapter import CompileLog
from perfkit.backends.torch_surgery import APART

_COUNTERS = ("stats", "graph_break", "unimplemented", "inductor", "aot_autograd")
_LIMIT = "Dynamo recompile limit exceeded"


@contextmanager
def watching() -> Iterator[Callable[[], CompileLog]]:
    """Within it, torch's compilations are recorded; the function tells them so far."""
    before = {group: Counter(counters[group]) for group in _COUNTERS}
    yield lambda: _log({group: Counter(counters[group]) - before[group] for group in _COUNTERS})


def _log(counts: dict[str, Counter]) -> CompileLog:
    reasons = [*counts["graph_break"], *(reason for reason in counts["unimplemented"] if not _is_limit(reason))]
    return CompileLog(
        graphs=counts["stats"]["unique_graphs"],
        breaks=tuple(dict.fromkeys(reason.strip().splitlines()[0] for reason in reasons)),
        cached=counts["inductor"]["fxgraph_cache_hit"],
        integer_kernels=sum(counts["inductor"][f"{op}_weight_prepack_matcher_count"] for op in ("qlinear", "qconv")),
        integer_layers=counts["inductor"]["perfkit_integer_layers"],
        integer_calls=counts["inductor"]["perfkit_integer_calls"],
        gave_up=_gave_up(counts),
    )


def _gave_up(counts: dict[str, Counter]) -> str:
    """That Dynamo's limit was reached; where models share it, also before, since it is told of the first one alone."""
    reached, when = [*filter(_is_limit, counts["unimplemented"])], ""
    if not reached and not APART and counts["graph_break"]:
        reached, when = [*filter(_is_limit, counters["unimplemented"])], ", by models before in this process"
    if not reached:
        return ""
    limit = "accumulated_recompile_limit" if "accumulated_recompile_limit" in reached[0] else "recompile_limit"
    return (
        f"torch._dynamo.config.{limit} was reached{when}: parts of the model run eagerly, no faster than before. "
        "torch.compiler.reset() before perfkit is called lets them be compiled"
    )


def _is_limit(reason: str) -> bool:
    return reason.startswith(_LIMIT)
