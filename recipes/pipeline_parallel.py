"""The layers one after another on several devices, each with some of them, and a batch in parts."""

from dataclasses import dataclass

from perfkit import InvalidInputError, ParallelRecipe, Stage

SCHEDULES = ("1f1b", "gpipe", "interleaved")


@dataclass(frozen=True, kw_only=True)
class PipelineParallel(ParallelRecipe):
    """Cut the model into stages of equal time, one for each device: parts of the batch follow each other through them.

    Each device holds the weights, gradients and optimizer state of its stage alone, and sends activations to the next:
    for models that do not fit on one device, over links too slow for `tensor_parallel`. Where the model is cut is found
    by timing its layers. A device waits while the first micro-batch comes and the last one goes: the report tells this
    bubble. Each process is given the whole batch, and is told the loss of the whole batch.

    PyTorch: torch.distributed.pipelining. `result.model` holds the parameters of this process' stage; calling it, on
    every process with the same batch, gives whole outputs without gradients. JAX: one program by `shard_map`.

    Args:
        size: how many devices; None for all that the chain's other recipes leave.
        stages: how many parts the model is cut into; None for one for each device, two with "interleaved".
        schedule: "1f1b" keeps few activations, "gpipe" all of the batch's; "interleaved" is 1f1b with several stages
            on each device: a smaller bubble, more traffic. By default 1f1b; in JAX gpipe.
        split_at: names of the layers that a stage begins with; found by measuring where empty.
        micro_batches: into how many parts a process' rows are divided; by default up to four for each device.
        batch_dim: the dimension of the inputs that is the batch; of targets it is the first one of that length.

    Source: https://arxiv.org/abs/1811.06965 (GPipe); https://arxiv.org/abs/2104.04473 (interleaved 1F1B)
    """

    stage = Stage.PIPELINE
    provides = "pipeline axis"
    axis = "pipeline"
    tolerance = 1e-3  # sums in another order, over some steps of an optimizer

    stages: int | None = None
    schedule: str | None = None
    split_at: tuple[str, ...] = ()
    micro_batches: int | None = None
    batch_dim: int = 0

    def __post_init__(self):
        super().__post_init__()
        split_at = (self.split_at,) if isinstance(self.split_at, str) else tuple(self.split_at)
        object.__setattr__(self, "split_at", split_at)
        if self.schedule not in (None, *SCHEDULES):
            known = ", ".join(map(repr, SCHEDULES))
            raise InvalidInputError(f"pipeline_parallel(schedule={self.schedule!r}): expected one of {known}")
        for option in ("stages", "micro_batches"):
            value = getattr(self, option)
            if value is not None and not (isinstance(value, int) and value >= 1):
                raise InvalidInputError(f"pipeline_parallel({option}={value!r}): expected a number above 0, or None")

    def refusal(self, work):
        from perfkit.parallel.pipeline_plan import planned

        if work.inputs is None:
            return "it times the layers on a batch: pass example_inputs"
        if reason := super().refusal(work):
            return reason
        if work.framework == "torch" and work.trains:
            from perfkit.parallel.torch_pipeline import too_old

            if reason := too_old():
                return reason
        plan = planned(work, self)
        if isinstance(plan, str):
            return plan
        if work.framework == "jax":
            from perfkit.parallel.jax_pipeline import refusal

            return refusal(work, self)
        return None

    def torch(self, work):
        from perfkit.parallel.torch_pipeline import pipeline_parallel

        return pipeline_parallel(work, self)

    def jax(self, work):
        from perfkit.parallel.jax_pipeline import pipeline_parallel

        return pipeline_parallel(work, self)


RECIPE = PipelineParallel

if __name__ == "__main__":
    from perfkit.cli import lesson

    lesson("pipeline_parallel")
