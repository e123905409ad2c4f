"""The programs of a JAX model's layouts: compiled on the devices that are here, and read, not run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from perfkit._chain import Chain, chain_of, check
from perfkit._errors import InvalidInputError, UnsupportedError, first_line
from perfkit._variant import apply
from perfkit._workload import Workload
from perfkit.backends.jax_compile import persistent_cache
from perfkit.backends.jax_training import Trainer
from perfkit.parallel.gathering import gathered
from perfkit.parallel.jax_collectives import Collective, collectives, filled_first
from perfkit.parallel.jax_costs import Step
from perfkit.parallel.jax_shares import share_kept
from perfkit.parallel.planning_parts import Program, Way

KINDS = {
    "all-reduce": "all_reduce",
    "all-gather": "all_gather",
    "reduce-scatter": "reduce_scatter",
    "all-to-all": "all_gather",  # as many rounds of a ring, with parts as large
    "collective-permute": "send",
}
"""HLO's operations as `links` knows them."""


def programs(
    step: Step, ways: Iterable[Way], told: Callable[[str], Any] = str
) -> tuple[dict[Way, Program], tuple[str, ...]]:
    """What the program of each layout does; and those that cannot be, with the reason."""
    found: dict[Way, Program] = {}
    refused = []
    for way in ways:
        told(f"compiling {way}")
        try:
            found[way] = _program(step, way)
        except (UnsupportedError, InvalidInputError) as error:
            refused.append(f"{way}: {first_line(error)}")
    return found, tuple(refused)


def _program(step: Step, way: Way) -> Program:
    chain = _along(chain_of(way.recipe), step.batch_dim)
    work = gathered(step.work, chain)
    check(chain, work)
    applied = apply(chain, work)
    split = [
        name for part in applied.steps if part.recipe.startswith("tensor_parallel") for name in part.effect.touched
    ]
    if way.tensor > 1 and not split:
        raise UnsupportedError("no layer can be split")
    return program(step, way, applied.works[-1])


def program(step: Step, way: Way, work: Workload) -> Program:
    """What the program does of a workload that was spread in that way."""
    trainer = Trainer(work)
    with persistent_cache():
        batch = trainer.placement.batch(step.batch(step.rows))
        compiled = trainer.program.jitted.lower(trainer.state, *batch).compile()
        kept = share_kept(step.work, work, way.data) if way.tensor > 1 else 1.0
    hlo = compiled.as_text()
    sent = collectives(hlo, work.world.devices)
    handed = [item for item in sent if way.pipeline > 1 and item.looped and item.kind == "collective-permute"]
    return Program(
        sends=tuple(_sent(item) for item in sent if item not in handed),
        kept=kept,
        bytes=work.model.placement.bytes_of(work.model.params),
        stages=_stages(work) if way.pipeline > 1 else (),
        temporary=compiled.memory_analysis().temp_size_in_bytes,
        handed=max((item.bytes for item in handed), default=0),
        filled=filled_first(hlo),
    )


def _stages(work: Workload) -> tuple[tuple[float, int], ...]:
    packing = work.model.placement.packing
    sizes = [sum(packing.bytes_of(index) for index in owned) for owned in packing.owned]
    return tuple(zip(work.spread.balance, sizes, strict=True))


def _along(chain: Chain, batch_dim: int) -> Chain:
    """The chain with every recipe that divides the batch told along which dimension."""
    about: dict[str, Any] = {"batch_dim": batch_dim}
    return Chain(tuple(replace(each, **about) if hasattr(each, "batch_dim") else each for each in chain))


def _sent(item: Collective) -> tuple[str, float, int, int]:
    size = item.bytes * (item.ranks if item.kind == "reduce-scatter" else 1)  # its result is one part
    return KINDS[item.kind], size, item.ranks, item.runs
