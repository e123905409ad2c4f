"""What `optimize` does but for the clock: a recipe applied, called once and compared with the original."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from perfkit import Effect, backends
from perfkit._chain import chain_of
from perfkit._numbers import check_numbers
from perfkit._report import Fidelity
from perfkit._settings import Settings
from perfkit._variant import apply, observed, ready


@dataclass(frozen=True)
class Outcome:
    """The result's model, the effect of the chain's last step, and how close the outputs or losses are."""

    model: Any
    effect: Effect
    fidelity: Fidelity


def applied(model: Any, recipe: Any, *example_inputs: Any, **training: Any) -> Outcome:
    """Apply `recipe`; with loss=, targets= and optimizer= in training."""
    chain, mode = chain_of(recipe), "training" if training else "inference"
    backend = backends.of(model, example_inputs)
    settings = dict.fromkeys(("loss", "targets", "optimizer")) | training
    with backend.preserved():
        work = backend.bind(model, None, example_inputs, mode=mode, seed=0, **settings)
        original, steps = ready(work, "nothing"), apply(chain, work)
        result = ready(steps.works[-1], str(chain))
        fidelity, _ = check_numbers(original, result, chain, Settings(1.0))
        return Outcome(result.finished.model, observed(steps, result.log).steps[-1].effect, fidelity)
