"""Mixed precision in bfloat16."""

from dataclasses import dataclass

from perfkit import Recipe, Stage


@dataclass(frozen=True, kw_only=True)
class Bf16(Recipe):
    """Run matrix products and convolutions in bfloat16; keep weights, sums and sensitive operations in float32.

    bfloat16 has the range of float32 with 8 bits of precision, so nothing overflows and training needs no loss scaling.
    Fast where the hardware multiplies bfloat16: CPUs with AMX, AVX512-BF16 or ARM's BF16, GPUs since Ampere, TPUs.
    Slower elsewhere.

    Source: https://docs.pytorch.org/docs/stable/amp.html; https://arxiv.org/abs/1905.12322
    """

    stage = Stage.PRECISION
    provides = "precision"
    tolerance = 2e-2  # unit roundoff 2^-8 = 0.4 %, over a few layers

    def unprofitable(self, framework, device):
        from perfkit.measure.environment import has

        if device == "cpu" and not any(map(has, ("amx_bf16", "avx512_bf16", "bf16"))):
            return "this CPU has no bfloat16 instructions (AMX, AVX512-BF16, ARM's BF16): it emulates them"
        return None

    def torch(self, work):
        import torch

        from perfkit.backends.torch_precision import autocast

        return autocast(work, torch.bfloat16)

    def jax(self, work):
        from perfkit.backends.jax_precision import autocast

        return autocast(work, "bfloat16")


RECIPE = Bf16

if __name__ == "__main__":
    from perfkit.cli import lesson

    lesson("bf16")
