"""Float32 matrix products on tensor cores."""

from dataclasses import dataclass, replace

from perfkit import Effect, Recipe, Stage


@dataclass(frozen=True, kw_only=True)
class Tf32(Recipe):
    """Let float32 matrix products and convolutions round their operands to TF32: 10 bits of mantissa instead of 23.

    Weights, sums and everything else stay float32. NVIDIA GPUs since Ampere (compute capability 8.0) run it on tensor
    cores; nothing else does.

    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#tensorfloat-32-tf32-on-ampere-and-later-devices
    """

    stage = Stage.PRECISION
    provides = "precision"
    tolerance = 5e-3  # unit roundoff 2^-11, over a few dozen layers

    def unavailable(self, framework, device):
        if device not in ("cuda", "gpu"):
            return f"TF32 is for NVIDIA GPUs of compute capability 8.0 and above, and this is {device!r}"
        if framework == "torch":
            import torch

            if torch.version.hip or torch.cuda.get_device_capability() < (8, 0):
                return f"{torch.cuda.get_device_name()} has no TF32: it came with compute capability 8.0"
        return None

    def torch(self, work):
        from perfkit.backends.torch_precision import tf32_allowed
        from perfkit.backends.torch_surgery import around_call

        around_call(work.model, tf32_allowed)
        if work.trains:
            work = work.replace(training=replace(work.training, around=(*work.training.around, tf32_allowed)))
        return work, Effect((work.backend.model_name(work),))

    def jax(self, work):
        import jax

        def wrap(function):
            def tf32(*args, **kwargs):
                with jax.default_matmul_precision("tensorfloat32"):
                    return function(*args, **kwargs)

            return tf32

        return work.replace(model=work.model.then(wrap)), Effect((work.backend.model_name(work),))


RECIPE = Tf32

if __name__ == "__main__":
    from perfkit.cli import lesson

    lesson("tf32")
