"""Results in the memory of what they are made from."""

from dataclasses import dataclass, replace

from perfkit import Effect, Recipe, Stage


@dataclass(frozen=True, kw_only=True)
class Donate(Recipe):
    """Write what a training step makes over what it was made from, where nobody else reads that.

    In JAX the step's new parameters and optimizer state take over the memory of the old ones (`compile` does that too).
    In PyTorch the optimizer updates in one fused pass without temporaries, and activations write over the output of the
    layer before them, within sequences of layers whose gradients do not need it.

    Source: https://docs.jax.dev/en/latest/buffer_donation.html;
        https://docs.pytorch.org/docs/stable/optim.html (fused)
    """

    stage = Stage.MEMORY
    aim = "memory"
    tolerance = 1e-5  # the fused update rounds in another order

    def refusal(self, work):
        return None if work.trains else "it is about what a training step overwrites: inference overwrites nothing"

    def torch(self, work):
        from perfkit.memory.torch_in_place import in_place

        return in_place(work)

    def jax(self, work):
        if work.model.ahead:
            return work, Effect(notes=("the compiled step donates its state already",))
        return work.replace(training=replace(work.training, donates=True)), Effect(("training step",))


RECIPE = Donate

if __name__ == "__main__":
    from perfkit.cli import lesson

    lesson("donate")
