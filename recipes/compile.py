"""The framework's own compiler."""

from dataclasses import dataclass

from perfkit import Effect, InvalidInputError, Recipe, Stage

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True, kw_only=True)
class Compile(Recipe):
    """Compile the model: torch.compile in PyTorch, one XLA program ahead of time in JAX.

    Fuses elementwise operations and takes Python out of the way. It costs seconds on the first call and again for every
    new input shape; the report says after how many calls that is earned back. For inference in PyTorch the weights are
    frozen into the program, which lets it reorder them for the hardware; `load_state_dict` and `.to` compile anew. In
    JAX what it computes of parameters alone, such as casts, is kept in memory until others come.

    Args:
        mode: PyTorch only: as torch.compile has it; "reduce-overhead" uses CUDA graphs, "max-autotune" times kernels.
        freezing: PyTorch inference only: freeze the weights into the compiled program.
        dynamic: PyTorch only: compile for any size at once (True), for each (False), or decide on the way (None).
        fullgraph: PyTorch only: an error instead of a graph break.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.compile.html; https://docs.jax.dev/en/latest/aot.html
    """

    stage = Stage.COMPILE
    provides = "order in which layers run"
    tolerance = 1e-5  # fusing adds in another order

    mode: str = "default"
    freezing: bool = True
    dynamic: bool | None = None
    fullgraph: bool = False

    def __post_init__(self):
        if self.mode not in MODES:
            raise InvalidInputError(f"compile(mode={self.mode!r}): expected one of {', '.join(map(repr, MODES))}")

    def unavailable(self, framework, device):
        if framework == "torch":
            from perfkit.backends.torch_compile import missing_compiler

            return missing_compiler(device)
        return None

    def refusal(self, work):
        if work.framework == "jax" and self != Compile():
            return "its options are torch.compile's: write 'compile' alone for JAX"
        return None

    def variants(self, work):
        if work.framework == "jax":
            return (self,)
        if work.device == "cuda":
            return self, Compile(mode="max-autotune")
        return (self,) if work.trains else (self, Compile(freezing=False))

    def torch(self, work):
        from perfkit.backends.torch_compile import compiled

        return compiled(work, self.mode, self.freezing, dynamic=self.dynamic, fullgraph=self.fullgraph)

    def jax(self, work):
        return work.replace(model=work.model.compiled_ahead()), Effect((work.backend.model_name(work),))

    def observed(self, effect, log):
        gave_up = (log.gave_up,) if log.gave_up else ()
        if log.graphs == 0:
            nothing = "the compiler compiled nothing: everything runs as before"
            return Effect(skipped=effect.skipped, notes=(nothing, *gave_up, *log.breaks))
        breaks = tuple(f"graph break: {reason}" for reason in log.breaks)
        warm = (f"{log.cached} of it from a warm cache",) if log.cached else ()
        notes = (
            *effect.notes,
            f"{log.graphs} graph(s) compiled, {len(breaks)} graph break(s)",
            *gave_up,
            *breaks,
            *warm,
        )
        return Effect(effect.touched, effect.skipped, notes)


RECIPE = Compile

if __name__ == "__main__":
    from perfkit.cli import lesson

    lesson("compile")
