"""Weights in 8-bit integers, computing in the inputs' precision."""

from dataclasses import dataclass

from perfkit.recipes._quantizer import Quantizer


@dataclass(frozen=True, kw_only=True)
class Int8WeightOnly(Quantizer):
    """Store weights in 8-bit integers and multiply in the inputs' precision: a quarter of the memory, little error.

    It pays where reading the weights is what takes the time, that is at batch sizes of one or a few; at large ones the
    unpacking costs more than it saves.

    Args:
        include: names or patterns of the layers to quantize ("encoder.*"); all where empty.
        exclude: names or patterns of the layers to leave alone.

    Source: https://docs.pytorch.org/ao/stable/workflows/inference.html
    """

    tolerance = 2e-2  # half a step is 0.4 % of a weight's range, over a few layers

    def torch(self, work):
        from perfkit.quantization.torch_quantize import weight_only

        return weight_only(work, self)

    def jax(self, work):
        from perfkit.quantization.jax_quantize import weight_only

        return weight_only(work, self, bits=8)


RECIPE = Int8WeightOnly

if __name__ == "__main__":
    from perfkit.cli import lesson

    lesson("int8_weight_only")
