"""The optimizer's update in one pass over each parameter."""

from dataclasses import dataclass

from perfkit import Recipe, Stage


@dataclass(frozen=True, kw_only=True)
class FusedOptimizer(Recipe):
    """Let SGD, Adam, AdamW and Adagrad update each parameter in one pass, by torch's own fused kernels.

    Without, an update is a dozen operations on each tensor, or on all of them, each of which reads and writes memory
    and has its price to start. It pays where the update is much of a step: many parameters for a small batch. State
    and settings stay as they are, also of an optimizer that has taken steps.

    In JAX XLA fuses the update where the step is compiled.

    Source: https://docs.pytorch.org/docs/stable/optim.html (fused)
    """

    stage = Stage.RUNTIME
    tolerance = 1e-5  # the fused update rounds in another order

    def unavailable(self, framework, device):
        return "XLA fuses the update with the rest of the step: 'compile'" if framework == "jax" else None

    def refusal(self, work):
        if not work.trains:
            return "it is about the optimizer's update, which inference does not have"
        from perfkit.backends.torch_fused_optimizer import refusal

        return refusal(work)

    def torch(self, work):
        from perfkit.backends.torch_fused_optimizer import fused

        return fused(work)


RECIPE = FusedOptimizer

if __name__ == "__main__":
    from perfkit.cli import lesson

    lesson("fused_optimizer")
