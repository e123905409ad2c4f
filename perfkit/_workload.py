"""Workload: what is optimized, validated once, passed from step to step."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from perfkit._batch import Samples
from perfkit._errors import InvalidInputError
from perfkit.parallel.world import ALONE, World

if TYPE_CHECKING:
    from perfkit.backends.adapter import Backend
    from perfkit.parallel.layout import Layout
    from perfkit.parallel.spread import Spread

MODES = ("inference", "training")
CALIBRATION_BATCHES = 256
CALIBRATION_SAMPLES = 16


@dataclass(frozen=True)
class Inputs:
    """One call's arguments: `model(*args, **kwargs)`."""

    args: tuple = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Training:
    """What a training step needs beside the model.

    Args:
        loss: `loss(outputs, targets)`, a scalar.
        targets: what the outputs for the example inputs should be.
        optimizer: torch: an optimizer over the model's parameters; JAX: an optax transformation.
        loss_scaling: scale the loss dynamically, so that float16 gradients do not underflow.
        around: contexts within which every step runs, backward included.
        teacher: `teacher(*args, **kwargs)`, the original's outputs; half of the loss is then the distance to them.
        averaged: makes of this process' loss the one over the whole batch.
        gradients: torch: `gradients(model, inputs, targets)` adds the gradients to the parameters and returns the loss,
            where that is not one call, one loss and one backward.
        micro_batches: how many parts of one size a step runs one after the other, adding up their gradients.
        donates: JAX: the step's outputs take over the memory of the state that it was given.
        batch_dim: the dimension along which the first input is cut into them.
        exchanging: torch: says whether the next backward pass shall send gradients: that of the last micro-batch alone;
            None where none sends any, or all must.
        rounds: torch: what is done beside steps that each process takes by itself; None where they take them together.
    """

    loss: Callable[[Any, Any], Any]
    targets: Any
    optimizer: Any
    loss_scaling: bool = False
    around: tuple[Callable[[], AbstractContextManager], ...] = ()
    teacher: Callable[..., Any] | None = None
    averaged: Callable[[Any], Any] | None = None
    gradients: Callable[[Any, Inputs, Any], Any] | None = None
    micro_batches: int = 1
    donates: bool = False
    batch_dim: int = 0
    exchanging: Callable[[bool], None] | None = None
    rounds: Any = None


@dataclass(frozen=True)
class Workload:
    """A model and how it is called.

    Args:
        backend: the adapter of the model's framework.
        model: torch: the `nn.Module`; JAX: a `JaxModel`.
        inputs: example arguments; None where the caller gave none.
        mode: "inference" or "training".
        device: "cpu", "cuda", "tpu", …
        training: loss, targets and optimizer; None for inference.
        seed: what every run on these inputs is seeded with.
        calibration: inputs that ranges of activations are read from; empty where the caller gave none.
        world: the processes that run `optimize` together; alone unless a recipe of the chain is for several.
        layout: how the chain's recipes share their devices; None where none asks for several.
        spread: how the model is spread over them; None where every process has a whole one of its own.
        samples: of how many samples the caller's example inputs are; None where that cannot be told.
    """

    backend: Backend
    model: Any
    inputs: Inputs | None
    mode: str
    device: str
    training: Training | None = None
    seed: int = 0
    calibration: tuple[Inputs, ...] = ()
    world: World = ALONE
    layout: Layout | None = None
    spread: Spread | None = None
    samples: Samples | None = None

    def replace(self, **changes: Any) -> Self:
        """The next workload: this one with some fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def framework(self) -> str:
        return self.backend.name

    @property
    def trains(self) -> bool:
        return self.mode == "training"

    @property
    def period(self) -> int:
        """Training steps that are alike only together: what they cost is told for one of them, on average."""
        return self.spread.period if self.spread else 1

    @property
    def takes_part(self) -> bool:
        """Whether a timed call is made by this process: one process makes those of a whole model."""
        return self.spread is not None or self.world.leads


def calibrated(work: Workload, batches: Iterable | None) -> Workload:
    """The workload with what a caller passed as `calibration=`; as it is without any.

    Raises:
        InvalidInputError: see `calibration_inputs`.
    """
    if batches is None:
        return work
    backend = work.backend
    inputs = calibration_inputs(batches, partial(backend.as_inputs, work), partial(backend.batch_size, work))
    return work.replace(calibration=inputs)


def calibration_inputs(batches: Any, as_inputs: Callable[[Any], Inputs], rows: Callable[[Inputs], int | None]):
    """What a caller passed as `calibration=`, as inputs.

    Args:
        batches: iterable of what may be passed as `example_inputs`; at most `CALIBRATION_BATCHES` of it are read.
        as_inputs: makes inputs of one batch.
        rows: how many samples a batch holds; None where that cannot be told.

    Raises:
        InvalidInputError: it is no iterable, is empty, or holds too few samples to read ranges from.
    """
    if isinstance(batches, (str, Mapping)) or not isinstance(batches, Iterable):
        raise InvalidInputError(
            f"calibration is a {type(batches).__name__}: expected an iterable of batches, each as example_inputs"
        )
    inputs = tuple(map(as_inputs, itertools.islice(batches, CALIBRATION_BATCHES)))
    if not inputs:
        raise InvalidInputError(
            "calibration is empty: give it batches as the model will see them (a used-up iterator?)"
        )
    counts = [1 if count is None else count for count in map(rows, inputs)]
    if sum(counts) < CALIBRATION_SAMPLES:
        raise InvalidInputError(
            f"calibration holds {sum(counts)} sample(s), too few to read the ranges of activations from: "
            f"give at least {CALIBRATION_SAMPLES}, better some hundreds"
        )
    return inputs


def check_mode(mode: str, loss: Any, targets: Any, optimizer: Any, example_inputs: Any) -> None:
    """Refuse a mode that is unknown, or whose companions are missing or too many.

    Raises:
        InvalidInputError: with what is missing.
    """
    if mode not in MODES:
        raise InvalidInputError(f"mode={mode!r} is not known: use {' or '.join(map(repr, MODES))}")
    companions = {"loss": loss, "targets": targets, "optimizer": optimizer}
    given = [name for name, value in companions.items() if value is not None]
    if mode == "inference" and given:
        raise InvalidInputError(
            f"{', '.join(given)} given with mode='inference': they belong to training; "
            f"pass mode='training' or leave {'it' if len(given) == 1 else 'them'} out"
        )
    if mode == "training":
        needed = [name for name, value in companions.items() if value is None]
        if example_inputs is None:
            needed.append("example_inputs")
        if needed:
            raise InvalidInputError(f"mode='training' also needs {', '.join(needed)}")
