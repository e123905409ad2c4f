"""What the recipes that quantize have in common."""

from dataclasses import dataclass, replace

from perfkit import LayerRecipe, Stage

EAGER = "simulated: these layers round to 8 bits and multiply in float32; '+compile' makes integer kernels of them"

COMPILED = "simulated: these layers round to 8 bits and multiply in float32: the compiler made integer kernels of none"


@dataclass(frozen=True, kw_only=True)
class Quantizer(LayerRecipe):
    """Base of the recipes that store or multiply in fewer bits. The pipeline gives back layers that cost too much."""

    stage = Stage.QUANTIZATION
    provides = "quantization"
    gives_back = True

    def refusal(self, work):
        return "it is for inference: 'qat' trains a model for it" if work.trains else None

    def unsought(self, work):
        return "it saves memory rather than time: choose it by name"

    def observed(self, effect, log):
        made = []
        if log.integer_kernels:
            made.append(f"the compiler made {log.integer_kernels} integer kernels")
        if log.integer_layers:
            made.append(
                f"compiled, {log.integer_layers} layers are {log.integer_calls} call(s) of perfkit's integer kernels"
            )
        if made:
            return replace(effect, notes=(*effect.notes, *made), simulated=False)
        if not effect.simulated:
            return effect
        return replace(effect, notes=(*effect.notes, COMPILED if log.graphs else EAGER))
