"""Weights in 8-bit integers beforehand, activations at each call."""

from dataclasses import dataclass

from perfkit.recipes._quantizer import Quantizer


@dataclass(frozen=True, kw_only=True)
class Int8Dynamic(Quantizer):
    """Multiply 8-bit integers, reading the range of the activations from each input: no calibration data is needed.

    Linear and recurrent layers only. Finding the range costs a pass over the input, so it pays where weights are large
    against activations: small batches, wide layers. In PyTorch on CPUs other than x86, linear layers need `+compile` to
    run on integers.

    Args:
        include: names or patterns of the layers to quantize ("encoder.*"); all where empty.
        exclude: names or patterns of the layers to leave alone.

    Source: https://docs.pytorch.org/ao/stable/workflows/inference.html
    """

    tolerance = 5e-2  # as int8

    def unavailable(self, framework, device):
        if framework == "torch":
            from perfkit.quantization.torch_quantize import unavailable

            return unavailable(device, needed=(7, 5))
        return None

    def unsought(self, work):
        return "'int8' does the same on ranges known beforehand: choose it by name"

    def torch(self, work):
        from perfkit.quantization.torch_quantize import int8_dynamic

        return int8_dynamic(work, self)

    def jax(self, work):
        from perfkit.quantization.jax_quantize import int8_dynamic

        return int8_dynamic(work, self)


RECIPE = Int8Dynamic

if __name__ == "__main__":
    from perfkit.cli import lesson

    lesson("int8_dynamic")
