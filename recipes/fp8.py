"""Weights and activations in 8-bit floating point."""

from dataclasses import dataclass

from perfkit.recipes._quantizer import Quantizer


@dataclass(frozen=True, kw_only=True)
class Fp8(Quantizer):
    """Multiply 8-bit floating-point numbers (e4m3) with a scale for each row: twice the speed of bfloat16 at best.

    Needs hardware that multiplies float8: NVIDIA GPUs since Ada and Hopper. In PyTorch the model must be in bfloat16
    (`half+fp8`), and `+compile` fuses the scaling into the kernels before and after.

    Args:
        include: names or patterns of the layers to quantize ("encoder.*"); all where empty.
        exclude: names or patterns of the layers to leave alone.

    Source: https://arxiv.org/abs/2209.05433
    """

    tolerance = 5e-2  # unit roundoff 2^-4 = 6 % per number, averaged over the sums of a few layers

    def unavailable(self, framework, device):
        if framework == "torch":
            from perfkit.quantization.torch_quantize import unavailable

            return unavailable(device, needed=(8, 9), on_cpu=False)
        from perfkit.quantization.jax_quantize import fp8_unavailable

        return fp8_unavailable(device)

    def torch(self, work):
        from perfkit.quantization.torch_quantize import fp8

        return fp8(work, self)

    def jax(self, work):
        from perfkit.quantization.jax_quantize import fp8

        return fp8(work, self)


RECIPE = Fp8

if __name__ == "__main__":
    from perfkit.cli import lesson

    lesson("fp8")
