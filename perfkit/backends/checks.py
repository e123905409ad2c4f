"""What every framework's adapter refuses: example inputs that do not fit the model, and a loss that is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from perfkit._errors import DoesNotRunError, InvalidInputError

if TYPE_CHECKING:
    from perfkit._workload import Training


def does_not_run(name: str, inputs: str, error: Exception, advice: str = "") -> DoesNotRunError:
    """The error for example inputs that do not fit the model; `advice` says what to do, where that is known."""
    if advice:
        return DoesNotRunError(
            f"{name} does not run on example_inputs ({inputs}): {type(error).__name__}: {error}. {advice}"
        )
    return DoesNotRunError(
        f"{name} does not run on example_inputs ({inputs}): {type(error).__name__}: {error}. "
        "A tuple is passed as positional arguments, a dict as keyword arguments where its keys are the model's "
        "parameters, anything else as the only argument"
    )


def check_loss(training: Training, outputs: Any, shape_of: Callable[[Any], tuple | None]) -> None:
    """Refuse a loss that raises on these outputs, or is no scalar.

    Raises:
        InvalidInputError: with what the loss raised or returned.
    """
    try:
        loss = training.loss(outputs, training.targets)
    except Exception as error:
        raise InvalidInputError(f"loss(outputs, targets) raised {type(error).__name__}: {error}") from error
    shape = shape_of(loss)
    if shape is None or len(shape):
        found = f"a {type(loss).__name__}" if shape is None else f"shape {list(shape)}"
        raise InvalidInputError(
            f"loss(outputs, targets) returned {found}: expected a scalar, such as a mean over the batch"
        )
