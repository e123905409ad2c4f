"""Weights and activations in 8-bit integers."""

from dataclasses import dataclass

from perfkit import InvalidInputError
from perfkit.recipes._quantizer import Quantizer


@dataclass(frozen=True, kw_only=True)
class Int8(Quantizer):
    """Multiply 8-bit integers: weights rounded per output channel, activations to ranges read from calibration data.

    A quarter of the memory, and several times the speed where the hardware multiplies 8-bit integers: VNNI or AMX CPUs,
    GPUs since Turing, TPUs. Pass `calibration=` with data as the model will see it, some hundreds of samples. In
    PyTorch on CPUs other than x86, linear layers and convolutions need `+compile` to run on integers; in JAX they are
    faster than in floats on x86 CPUs with VNNI. In PyTorch on CPU depthwise convolutions stay in floats, which are
    faster, unless `include` names layers.

    Args:
        weight_bits: bits that weights are rounded to, 2 to 8; they are stored in 8.
        include: names or patterns of the layers to quantize ("encoder.*"); all where empty.
        exclude: names or patterns of the layers to leave alone.

    Source: https://arxiv.org/abs/1712.05877; https://docs.pytorch.org/ao/stable/pt2e_quantization/
    """

    tolerance = 5e-2  # half a step is 0.4 % of a weight's range and of an activation's, over a few layers
    calibrates = True

    weight_bits: int = 8

    def __post_init__(self):
        super().__post_init__()
        if self.weight_bits not in range(2, 9):
            raise InvalidInputError(f"int8(weight_bits={self.weight_bits!r}): expected 2 to 8")

    def unavailable(self, framework, device):
        if framework == "torch":
            from perfkit.quantization.torch_quantize import unavailable

            return unavailable(device, needed=(7, 5))
        return None

    def refusal(self, work):
        if work.inputs is None and not work.calibration:
            return "it reads the ranges of activations from data: pass calibration= or example_inputs="
        return super().refusal(work)

    def unsought(self, work):
        return None if work.calibration else "it rounds to 8 bits: pass calibration= to have it tried"

    def torch(self, work):
        from perfkit.quantization.torch_quantize import int8

        return int8(work, self)

    def jax(self, work):
        from perfkit.quantization.jax_quantize import int8

        return int8(work, self)


RECIPE = Int8

if __name__ == "__main__":
    from perfkit.cli import lesson

    lesson("int8")
