"""Mixed precision in float16."""

from dataclasses import dataclass, replace

from perfkit import Recipe, Stage


@dataclass(frozen=True, kw_only=True)
class Fp16(Recipe):
    """Run matrix products and convolutions in float16; keep weights, sums and sensitive operations in float32.

    float16 has 11 bits of precision but ends at 65504 and 6e-8: activations may overflow (the fidelity check sees it),
    and gradients underflow, so training scales the loss, halving the scale whenever a gradient overflows and doubling
    it after 2000 clean steps. For GPUs before Ampere; elsewhere `bf16` is as fast and safer.

    Source: https://arxiv.org/abs/1710.03740; https://docs.pytorch.org/docs/stable/amp.html
    """

    stage = Stage.PRECISION
    provides = "precision"
    tolerance = 5e-3  # unit roundoff 2^-11 = 0.05 %, over a few layers

    def unprofitable(self, framework, device):
        from perfkit.measure.environment import has

        if device == "cpu" and not any(map(has, ("amx_fp16", "avx512_fp16", "fphp"))):
            return "this CPU has no float16 arithmetic (AMX-FP16, AVX512-FP16, ARM's FP16): it emulates it"
        return None

    def torch(self, work):
        import torch

        from perfkit.backends.torch_precision import autocast

        return autocast(self._scaled(work), torch.float16)

    def jax(self, work):
        from perfkit.backends.jax_precision import autocast

        return autocast(self._scaled(work), "float16")

    def _scaled(self, work):
        return work.replace(training=replace(work.training, loss_scaling=True)) if work.trains else work


RECIPE = Fp16

if __name__ == "__main__":
    from perfkit.cli import lesson

    lesson("fp16")
