"""The layers' weights on several devices, each with a part of every one."""

from dataclasses import dataclass

from perfkit import LayerRecipe, ParallelRecipe, Stage


@dataclass(frozen=True, kw_only=True)
class TensorParallel(ParallelRecipe, LayerRecipe):
    """Split the weights of layers over several devices: each computes a part of every layer's outputs.

    Each device holds a part of the split weights, of their gradients and of their optimizer state. Inputs and outputs
    are whole on each: every process is given the same batch. Linear layers that follow each other are split by columns
    and by rows and send once for both; attention, by heads, sends once; other linear layers, embeddings (by features)
    and convolutions (by channels) send their outputs. Pays for wide layers on devices with a fast link; for models that
    fit on one device and small batches it is slower than `data_parallel`.

    Args:
        size: how many devices share the layers; None for all that the chain's other recipes leave.
        include: names or shell patterns of the layers to split ("encoder.*"); all where empty.
        exclude: names or shell patterns of the layers to leave whole.
        recurrent: whether to split the weights that loops read, those of recurrent layers among them, in JAX: each
            device holds a part of them, and sends in every step.

    Source: https://arxiv.org/abs/1909.08053 (Megatron-LM)
    """

    stage = Stage.TENSOR
    provides = "tensor axis"
    axis = "tensor"
    tolerance = 1e-3  # sums in another order, over some steps of an optimizer

    recurrent: bool = False

    def __post_init__(self):
        ParallelRecipe.__post_init__(self)
        LayerRecipe.__post_init__(self)

    def refusal(self, work):
        if work.inputs is None:
            return "it reads from a call which layer takes whose output: pass example_inputs"
        if work.layout is not None and work.layout.size("pipeline") > 1 and (self.include or self.exclude):
            return "each process of a pipeline sees the layers of its stage alone: leave include and exclude out"
        if self.recurrent and work.framework == "torch":
            return (
                "recurrent=True is for JAX: torch runs all steps of a recurrent layer as one operation on whole "
                "weights. Leave it out, and recurrent layers stay whole"
            )
        return super().refusal(work)

    def torch(self, work):
        from perfkit.parallel.torch_stagewise import in_each_stage
        from perfkit.parallel.torch_tensor import tensor_parallel

        return in_each_stage(work, lambda work: tensor_parallel(work, self))

    def jax(self, work):
        from perfkit.parallel.jax_tensor import tensor_parallel

        return tensor_parallel(work, self)


RECIPE = TensorParallel

if __name__ == "__main__":
    from perfkit.cli import lesson

    lesson("tensor_parallel")
