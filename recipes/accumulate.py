"""Training steps in micro-batches."""

from dataclasses import dataclass

from perfkit import InvalidInputError, Recipe, Stage


@dataclass(frozen=True, kw_only=True)
class Accumulate(Recipe):
    """Run each training step in micro-batches and add up their gradients: the same step in less memory.

    The gradient of a mean over the batch is the mean of the micro-batches' gradients, so the step is the same to
    rounding. What a model remembers for its backward pass is that of one micro-batch. Batch norm takes the statistics
    of each, and dropout draws its numbers in another order: the report says where. It costs time where a micro-batch is
    too small to keep the machine busy.

    Args:
        micro_batches: how many a batch is cut into; its length must be a multiple of it.
        batch_dim: the dimension that is cut, of the first input that has as many rows there as a target; of other
            tensors the same one, or the first.

    Source: Huang et al., "GPipe" (2018), section 2.2; https://docs.pytorch.org/docs/stable/notes/amp_examples.html
    """

    stage = Stage.MEMORY
    aim = "memory"
    positional = ("micro_batches",)
    tolerance = 1e-5  # gradients are added up in another order

    micro_batches: int = 2
    batch_dim: int = 0

    def __post_init__(self):
        if not (isinstance(self.micro_batches, int) and self.micro_batches >= 2):
            raise InvalidInputError(
                f"accumulate({self.micro_batches!r}): expected a number of micro-batches, 2 or more"
            )

    def refusal(self, work):
        from perfkit.memory.micro_batches import refusal

        return refusal(work, self.micro_batches, self.batch_dim)

    def torch(self, work):
        from perfkit.memory.torch_accumulate import accumulate

        return accumulate(work, self.micro_batches, self.batch_dim)

    def jax(self, work):
        from perfkit.memory.jax_accumulate import accumulate

        return accumulate(work, self.micro_batches, self.batch_dim)


RECIPE = Accumulate

if __name__ == "__main__":
    from perfkit.cli import lesson

    lesson("accumulate")
