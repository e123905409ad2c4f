"""Recomputing activations in the backward pass."""

from dataclasses import dataclass

from perfkit import Recipe, Stage


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Recipe):
    """Recompute parts of the model in the backward pass instead of remembering what they computed.

    Which parts is chosen from one measured training step: those that save most for the time that running them again
    takes, until what is held fits the budget. A recurrent layer is cut into pieces of time. The numbers stay the same,
    random ones included, and a batch norm's statistics are taken once.

    Args:
        budget: what may be held for the backward pass at most: a share of it up to 1, or above that a number of bytes.

    Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost" (2016), https://arxiv.org/abs/1604.06174;
        Gruslys et al., "Memory-Efficient Backpropagation Through Time" (2016)
    """

    stage = Stage.MEMORY
    aim = "memory"
    positional = ("budget",)
    tolerance = 1e-5  # a recurrent layer's gradients are added up piece by piece

    budget: float = 0.35

    def __post_init__(self):
        from perfkit.memory.segments import check_budget

        check_budget(self.budget)

    def refusal(self, work):
        return None if work.trains else "it is about the backward pass, which inference does not have"

    def torch(self, work):
        from perfkit.memory.torch_checkpoint import checkpointed

        return checkpointed(work, self.budget)

    def jax(self, work):
        from perfkit.memory.jax_checkpoint import checkpointed

        return checkpointed(work, self.budget)


RECIPE = Checkpoint

if __name__ == "__main__":
    from perfkit.cli import lesson

    lesson("checkpoint")
