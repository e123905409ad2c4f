"""perfkit's own kernels in place of the layers that they are made for."""

from dataclasses import dataclass

from perfkit import LayerRecipe, Stage


@dataclass(frozen=True, kw_only=True)
class FusedKernels(LayerRecipe):
    """Run recurrent layers, and convolutions with the ReLU and max-pool behind them, in perfkit's own kernels.

    PyTorch: nn.LSTM, nn.GRU and nn.RNN whole; conv → [batch norm that does not train] → ReLU → max-pool in one go, in
    the usual spellings; for inference on CPU nn.Linear with the ReLU behind it, and layers that follow each other by
    one call, also behind a recurrent layer of which the last step alone is read; the same on integers behind `int8` on
    x86 CPUs. JAX: scans over an LSTM, GRU or
    simple cell, the same convolutions, and for inference on CPUs with AVX-512 linear layers, in the jaxpr of any
    model. For inference and for training. A layer whose call no kernel of ours takes here stays as it is, and the
    report says why. Small models gain most; where the library's layer is as good, nothing is swapped.

    Args:
        include: names or shell patterns of the layers to work on; all where empty.
        exclude: names or shell patterns of the layers to leave alone.

    Source: `perfkit.kernels.rnn`, `perfkit.kernels.conv2d`, `perfkit.kernels.linear`
    """

    stage = Stage.KERNELS
    tolerance = 1e-5  # the same sums in another order

    def torch(self, work):
        from perfkit.backends.torch_fused import fused

        return fused(work, self)

    def jax(self, work):
        from perfkit.backends.jax_fused import fused

        return fused(work, self)


RECIPE = FusedKernels

if __name__ == "__main__":
    from perfkit.cli import lesson

    lesson("fused_kernels")
