"""Recurrent layers stop where nothing is read any more."""

from dataclasses import dataclass

from perfkit import LayerRecipe, Stage


@dataclass(frozen=True, kw_only=True)
class SkipPadding(LayerRecipe):
    """Compute each row of a padded batch up to the last step that is read of it.

    A model that reads texts of many lengths pads them to one, runs a recurrent layer over all steps, and picks each
    row's output at its last real step: `hidden[torch.arange(B), lengths - 1]`, or the same by `gather` or
    `take_along_dim`. The steps behind it reach nothing. With this the layer waits until its output is read, and runs
    over a packed sequence that ends there. The numbers are the same; where anything else is read (a mean over all
    steps, the last state), the layer computes everything, as before. Layers that feed each other stop at the same step.

    It hurts where the layer is slower on packed sequences, as torch's own is: take it with `fused_kernels` or `int8`.
    What it gives depends on the lengths in a batch. `compile` excludes it: in a compiled program nothing can wait.

    Args:
        include: names or shell patterns of the layers to work on; all where empty.
        exclude: names or shell patterns of the layers to leave alone.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.rnn.pack_padded_sequence.html
    """

    stage = Stage.CALLS
    provides = "order in which layers run"
    tolerance = 1e-5  # the same sums, by rows in another order

    def unavailable(self, framework, device):
        if framework == "jax":
            return "fused_kernels and int8 do this in JAX themselves: what is read of a loop can be seen in a program"
        return None

    def unsought(self, work):
        from perfkit.backends.torch_padding import unsought

        return unsought(work)

    def torch(self, work):
        from perfkit.backends.torch_padding import skipping

        return skipping(work, self)


RECIPE = SkipPadding

if __name__ == "__main__":
    from perfkit.cli import lesson

    lesson("skip_padding")
