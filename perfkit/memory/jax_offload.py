"""What a JAX model remembers for its backward pass, in the memory of the host."""

from __future__ import annotations

from functools import partial

import jax

from perfkit._report import Effect, Skipped
from perfkit._workload import Workload


def offloaded(work: Workload, activations: bool, optimizer: bool) -> tuple[Workload, Effect]:
    """Results of matrix products wait for the backward pass on the host; all else is computed again from them."""
    skipped = (
        (Skipped("optimizer state", "in JAX it stays on the device: the step is one program"),) if optimizer else ()
    )
    if not activations:
        return work, Effect(skipped=skipped)
    policy = jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host")
    work = work.replace(model=work.model.then(partial(jax.checkpoint, policy=policy)))
    note = "results of matrix products wait on the host (pinned_host), and all else is computed again from them"
    return work, Effect((work.backend.model_name(work),), skipped, (note,))
