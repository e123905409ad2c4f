"""`layouts`: which way of spreading a model over several devices is expected to be the quickest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from perfkit import backends
from perfkit._chain import Chain, chain_of, check
from perfkit._errors import InvalidInputError, UnsupportedError
from perfkit._recipe import Recipe
from perfkit._showing import InTerminal
from perfkit._variant import apply
from perfkit._workload import Workload, check_mode
from perfkit.measure.kept_memory import fresh
from perfkit.parallel import world
from perfkit.parallel.links import Ring
from perfkit.parallel.planning import candidates, ranked
from perfkit.parallel.planning_parts import Cluster, Costs, Prediction

LATENCY_US = 10.0
"""Of one message, where nobody says: a launch of NCCL's, or a switched network."""

BUDGET_S, ROUNDS = 6.0, 7


@dataclass(frozen=True)
class Layouts(InTerminal):
    """What a training step is expected to take, by layout.

    Args:
        rows: of the whole batch.
        one_device_s: a step of the whole batch on one device.
        measured: what was measured, and what was given.
        predictions: the quickest first.
        refused: layouts that cannot be, with the reason (JAX, where each was compiled).
    """

    _terminal, _width = "layouts", 120

    model: str
    device: str
    devices: int
    rows: int
    one_device_s: float
    measured: str
    predictions: tuple[Prediction, ...]
    refused: tuple[str, ...] = ()

    @property
    def best(self) -> Prediction:
        """The quickest."""
        return self.predictions[0]


def layouts(
    model: Any,
    *,
    params: Any = None,
    devices: int,
    link_gbps: float | None = None,
    link_latency_us: float = LATENCY_US,
    example_inputs: Any,
    loss: Callable[[Any, Any], Any],
    targets: Any,
    optimizer: Any,
    recipe: str | Recipe | Chain | None = None,
    batch_dim: int = 0,
    budget_s: float = BUDGET_S,
    seed: int = 0,
    progress: Callable[[str], Any] = str,
) -> Layouts:
    """Predict a training step on several devices like this one, for each layout; nothing is changed.

    With `link_gbps` one device measures what the model computes, at the batch sizes that the layouts lead to, and the
    link is a ring of that speed. Without it link and computing are measured as they are when all devices work at once:
    in torch every one of `devices` processes calls this function, started by `perfkit launch`. In JAX one process does,
    which must see as many devices either way, for each layout's program is compiled.

    Args:
        model, params, example_inputs, loss, targets, optimizer: as for `perfkit.optimize`; the whole batch.
        devices: how many there are.
        link_gbps: gigabits that a device sends in a second.
        link_latency_us: microseconds that one message takes, however short.
        recipe: applied before the model is spread, such as "bf16".
        batch_dim: the dimension of the inputs that is the batch.
        budget_s: seconds to spend measuring in one process.

    Raises:
        InvalidInputError: something passed cannot be used, or no layout is possible.
        UnsupportedError: another number of processes (torch) or of devices (JAX) than `devices`.

    Example:
        >>> print(layouts(model, devices=8, link_gbps=400, example_inputs=x, targets=y, loss=loss, optimizer=adam))
    """
    for name, value in (("link_gbps", link_gbps), ("link_latency_us", link_latency_us)):
        if value is not None and not value > 0:
            raise InvalidInputError(f"{name}={value!r}: expected a number above 0")
    if devices < 2:
        raise InvalidInputError(f"devices={devices!r}: expected 2 or more, for there is nothing to share out among one")
    check_mode("training", loss, targets, optimizer, example_inputs)
    backend = backends.of(model, example_inputs)
    with backend.preserved():
        work = backend.bind(
            model, params, example_inputs, mode="training", loss=loss, targets=targets, optimizer=optimizer, seed=seed
        )
        if recipe is not None:
            chain = chain_of(recipe)
            check(chain, work)
            work = apply(chain, work).works[-1]
        link = None if link_gbps is None else Ring(link_latency_us / 1e6, link_gbps * 1e9 / 8)
        of = _torch if backend.name == "torch" else _jax
        costs, cluster, measured, refused = of(work, batch_dim, devices, link, budget_s, progress)
        if link is not None:
            measured += f"; the link was given: {link_gbps:g} Gbit/s, {link_latency_us:g} µs"
        predictions = tuple(ranked(costs, cluster))
        one_s = costs.passing_s(costs.rows) + costs.update_s + costs.fresh_s * fresh(costs.temporary)
        name = backend.model_name(work)
        return Layouts(name, work.device, devices, costs.rows, one_s, measured, predictions, refused)


def _torch(
    work: Workload, batch_dim: int, devices: int, link: Ring | None, budget_s: float, progress: Callable[[str], Any]
) -> tuple[Costs, Cluster, str, tuple[str, ...]]:
    """Costs, cluster, how they were found, and what is refused."""
    from perfkit.parallel import torch_calibration, torch_costs

    if link is not None:
        progress("timing the model's parts")
        costs = torch_costs.measured(torch_costs.Step(work, batch_dim), devices, budget_s)
        return costs, Cluster(devices, link), "computing, by one process", ()
    found = world.of("torch")
    if found.size != devices:
        raise UnsupportedError(
            f"{found.size} process(es) for {devices} devices: start as many, or give link_gbps= of their link"
        )
    costs, cluster, _ = torch_calibration.calibrated(work, batch_dim, ROUNDS, told=progress)
    costs, cluster = found.agree((costs, cluster))
    return costs, cluster, f"computing, link and framework, by {devices} processes at a time on this machine", ()


def _jax(
    work: Workload, batch_dim: int, devices: int, link: Ring | None, budget_s: float, progress: Callable[[str], Any]
) -> tuple[Costs, Cluster, str, tuple[str, ...]]:
    """The same of a JAX model, whose layouts are compiled."""
    from perfkit.parallel import jax_costs, jax_link, jax_programs

    found = world.of("jax")
    if found.devices != devices or not found.alone:
        raise UnsupportedError(
            f"JAX sees {found.devices} device(s) in {found.size} process(es), and programs for {devices} are compiled "
            "on as many in one process: on a CPU set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={devices} before JAX starts, as "
            "'perfkit plan --framework jax' does"
        )
    step = jax_costs.Step(work, batch_dim)
    ways = [way for way in candidates(step.rows, devices) if way.pipeline == 1 or way.tensor == 1]  # stages lie packed
    programs, refused = jax_programs.programs(step, ways, progress)
    if not programs:
        refused = refused or (f"its number does not divide a batch of {step.rows} rows",)
        raise InvalidInputError(f"no layout of {devices} devices is possible: {'; '.join(refused)}")
    progress("timing steps")
    if link is not None:
        costs, cluster = jax_costs.measured(step, devices, budget_s), Cluster(devices, link)
        how = "computing, on one device"
    else:
        costs, cluster, _ = jax_link.calibrated(work, batch_dim, ROUNDS, told=progress)
        how = f"computing and link, by {devices} devices at a time on this machine"
    return replace(costs, programs=programs), cluster, f"{how}; what programs send was read from their HLO", refused
