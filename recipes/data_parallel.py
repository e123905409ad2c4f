"""The same model on several devices, each with its part of the batch."""

from dataclasses import dataclass

from perfkit import InvalidInputError, ParallelRecipe, Stage

ENGINES = ("jit", "pmap")


@dataclass(frozen=True, kw_only=True)
class DataParallel(ParallelRecipe):
    """Train on several devices at once: each takes a part of the batch, and gradients are averaged before the step.

    The losses are those of one process with the whole batch, to rounding, if the loss is a mean over the batch and no
    layer looks at other rows (batch norm does). PyTorch: DistributedDataParallel, or FSDP2 with `shard`; every process
    gets its own part of each batch, as torch's DistributedSampler deals it out. JAX: one program over a mesh, which
    takes whole batches. Pays where a step's computation takes longer than sending the gradients.

    Args:
        size: how many devices share the batch; None for all that the chain's other recipes leave.
        shard: each device holds a part of parameters, gradients and optimizer state, and gathers weights when needed:
            less memory, more traffic.
        compress: send gradients in bfloat16: half the traffic, and a rounding of 2^-9 of each. PyTorch alone.
        precision: with `shard`, "bf16" computes with weights and activations in bfloat16, and halves their traffic;
            gradients are added up, and parameters kept, in float32. PyTorch alone; in JAX use the recipe `bf16`.
        offload: with `shard`, parameters and optimizer state wait in the host's memory. CUDA alone.
        batch_dim: the dimension of the inputs that is the batch; of targets it is the first one of that length.
        engine: JAX only: "jit", one program for which XLA finds what must be sent; "pmap", gradients averaged by hand.

    Source: https://arxiv.org/abs/2006.15704 (DDP); https://arxiv.org/abs/2304.11277 (FSDP)
    """

    stage = Stage.DATA
    provides = "data axis"
    axis = "data"
    tolerance = 1e-3  # sums in another order, over some steps of an optimizer

    shard: bool = False
    precision: str | None = None
    compress: bool = False
    offload: bool = False
    batch_dim: int = 0
    engine: str = "jit"

    def __post_init__(self):
        super().__post_init__()
        if self.engine not in ENGINES:
            known = " or ".join(map(repr, ENGINES))
            raise InvalidInputError(f"data_parallel(engine={self.engine!r}): expected {known}")
        if self.offload and not self.shard:
            raise InvalidInputError("data_parallel(offload=True) is about sharded parameters: add shard=True")
        if self.precision is not None and not (self.precision == "bf16" and self.shard):
            raise InvalidInputError(
                f"data_parallel(precision={self.precision!r}, shard={self.shard!r}): expected 'bf16', with shard=True; "
                "for whole parameters use 'bf16+data_parallel'"
            )
        if self.compress and self.shard:
            raise InvalidInputError("data_parallel(compress=True) is about whole gradients: leave shard out")

    def refusal(self, work):
        from perfkit.parallel.batch import indivisible

        if not work.trains:
            return "it shares out training steps: for inference start one process for each device"
        return super().refusal(work) or self._refused_options(work) or indivisible(work, self.batch_dim)

    def _refused_options(self, work):
        if work.framework == "jax":
            from perfkit.parallel.jax_data import refusal

            return refusal(work, self)
        if work.layout.size("pipeline") > 1 and self.precision:
            return "the stages of a pipeline read inputs that FSDP2 does not cast: use 'bf16' in place of precision="
        if work.layout.size("pipeline") > 1 and self.offload:
            return "FSDP2's offload inside of a pipeline's stages has not been tried on several GPUs: leave it out"
        if work.layout.size("tensor") > 1 and not self.shard:
            return "torch's DistributedDataParallel does not take the parts of tensor_parallel: add shard=True"
        return "engine='pmap' is JAX's: leave it out, or give it a JAX model" if self.engine == "pmap" else None

    def torch(self, work):
        from perfkit.parallel.torch_data import data_parallel

        return data_parallel(work, self)

    def jax(self, work):
        from perfkit.parallel.jax_data import data_parallel

        return data_parallel(work, self)


RECIPE = DataParallel

if __name__ == "__main__":
    from perfkit.cli import lesson

    lesson("data_parallel")
