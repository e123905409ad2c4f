"""`layouts`: which way of spreading a model over several devices is expected to be the quickest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from perfkit import backends
from perfkit._errors import InvalidInputError, UnsupportedError
from perfkit._recipe import Chain, Recipe, chain_of, check
from perfkit._variant import apply
from perfkit._workload import check_mode
from perfkit.parallel import world
from perfkit.parallel.links import Ring
from perfkit.parallel.planning import ranked
from perfkit.parallel.planning_parts import Cluster, Prediction

LATENCY_US = 10.0
"""Of one message, where nobody says: a launch of NCCL's, or a switched network."""

BUDGET_S, ROUNDS = 6.0, 7


@dataclass(frozen=True)
class Layouts:
    """What a training step is expected to take, by layout.

    Args:
        rows: of the whole batch.
        one_device_s: a step of the whole batch on one device.
        measured: what was measured, and what was given.
        predictions: the quickest first.
    """

    model: str
    device: str
    devices: int
    rows: int
    one_device_s: float
    measured: str
    predictions: tuple[Prediction, ...]

    @property
    def best(self) -> Prediction:
        """The quickest."""
        return self.predictions[0]

    def __rich__(self):
        from perfkit.reporting import layouts

        return layouts.render(self)

    def __str__(self) -> str:
        from perfkit.reporting import layouts

        return layouts.plain(self)


def layouts(
    model: Any,
    *,
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
    """Predict the training step of a torch model on several devices like this one, for each layout; nothing is changed.

    With `link_gbps` one process measures what the model computes, at the batch sizes that the layouts lead to, and the
    link is a ring of that speed. Without it every one of `devices` processes calls this function, started by
    `perfkit launch`, and link, framework and computing are measured as they are when all of them work at a time.

    Args:
        model, example_inputs, loss, targets, optimizer: as for `perfkit.optimize`; the whole batch.
        devices: how many there are.
        link_gbps: gigabits that a device sends in a second.
        link_latency_us: microseconds that one message takes, however short.
        recipe: applied before the model is spread, such as "bf16".
        batch_dim: the dimension of the inputs that is the batch.
        budget_s: seconds to spend measuring in one process.

    Raises:
        InvalidInputError: something passed cannot be used, or no layout is possible.
        UnsupportedError: a JAX model; or another number of processes than `devices`.

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
    if backend.name != "torch":
        raise UnsupportedError("layouts are predicted from parts of a torch model: give it the same model in torch")
    from perfkit.parallel import torch_costs, torch_link

    with backend.preserved():
        work = backend.bind(
            model, None, example_inputs, mode="training", loss=loss, targets=targets, optimizer=optimizer, seed=seed
        )
        if recipe is not None:
            chain = chain_of(recipe)
            check(chain, work)
            work = apply(chain, work).works[-1]
        if link_gbps is None:
            found = world.of("torch")
            if found.size != devices:
                raise UnsupportedError(
                    f"{found.size} process(es) for {devices} devices: start as many, or give link_gbps= of their link"
                )
            costs, cluster, _ = torch_link.calibrated(work, batch_dim, ROUNDS, told=progress)
            costs, cluster = found.agree((costs, cluster))
            measured = f"computing, link and framework, by {devices} processes at a time on this machine"
        else:
            progress("timing the model's parts")
            costs = torch_costs.measured(torch_costs.Step(work, batch_dim), devices, budget_s)
            cluster = Cluster(devices, Ring(link_latency_us / 1e6, link_gbps * 1e9 / 8))
            measured = f"computing, by one process; the link was given: {link_gbps:g} Gbit/s, {link_latency_us:g} µs"
        predictions = tuple(ranked(costs, cluster))
        one_s = costs.passing_s(costs.rows) + costs.update_s
        return Layouts(backend.model_name(work), work.device, devices, costs.rows, one_s, measured, predictions)
