"""Which layers of a torch module to quantize, why the others are left alone, and which models cannot be."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import nn

from perfkit._errors import UnsupportedError
from perfkit._report import Skipped
from perfkit._workload import Workload
from perfkit.backends.torch_state import keeping_state
from perfkit.backends.torch_surgery import is_composed, unwrapped
from perfkit.quantization import torch_qat, torch_rnn_int8

if TYPE_CHECKING:
    from perfkit._recipe import LayerRecipe

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def choose(
    model: nn.Module,
    recipe: LayerRecipe,
    kinds: tuple[type[nn.Module], ...],
    recurrent: bool = True,
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
    trains: bool = False,
) -> tuple[dict[str, nn.Module], list[Skipped]]:
    """The layers to quantize by name, embeddings included, and those that are not, with the reason.

    Those that are chosen of transformers' Conv1D, GPT-2's linear layers, become linear layers in place.
    """
    held = {name or type(model).__name__: module for name, module in model.named_modules() if _has_weights(module)}
    reasons = {name: _reason(module, kinds, recurrent, dtypes, trains) for name, module in held.items()}
    if _lies_transposed(model):
        reasons[type(model).__name__] = "it is the whole model, which stays what it is"
    possible = [name for name, reason in reasons.items() if not reason]
    chosen = recipe.selected(possible)
    skipped = [Skipped(name, reasons[name] or "excluded") for name in held if name not in chosen]
    turned = [name for name in chosen if _lies_transposed(held[name])]
    return {name: held[name] for name in possible if name in chosen} | _as_linear(model, turned), skipped


def _lies_transposed(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D: a linear layer, of which the weight is (inputs, outputs)."""
    kind = type(module)
    if (kind.__module__, kind.__name__) != ("transformers.pytorch_utils", "Conv1D") or "forward" in vars(module):
        return False
    return not (module._forward_hooks or module._forward_pre_hooks)


def _as_linear(model: nn.Module, names: list[str]) -> dict[str, nn.Module]:
    """Put linear layers in the place of such modules, and tell them by name."""
    places: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False) if names else ():
        places.setdefault(module, []).append(name)
    made = {}
    for name in names:
        module = model.get_submodule(name)
        weight = module.weight
        made[name] = nn.Linear(*weight.shape, device="meta")
        made[name].weight = nn.Parameter(weight.detach().t().contiguous(), requires_grad=weight.requires_grad)
        made[name].bias = module.bias
        made[name].train(module.training)
        for place in places[module]:
            model.set_submodule(place, made[name])
    return made


def _has_weights(module: nn.Module) -> bool:
    return next(itertools.chain(module.parameters(recurse=False), module.buffers(recurse=False)), None) is not None


def _reason(module: nn.Module, kinds: tuple, recurrent: bool, dtypes: tuple[torch.dtype, ...], trains: bool) -> str:
    """Why a module is left alone; empty where it is not."""
    kind = type(module).__name__
    if isinstance(module, nn.RNNBase):
        if not recurrent:
            return "recurrent layers are quantized by 'int8' and 'int8_dynamic'"
        return "" if trains else torch_rnn_int8.refusal(module) or ""
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse or module.scale_grad_by_freq):
        return "an embedding with max_norm, sparse or scale_grad_by_freq changes its rows while it runs"
    turned = not trains and nn.Linear in kinds and _lies_transposed(module)
    if not (turned or isinstance(module, (nn.Embedding, *kinds))):
        return f"{kind}: this recipe leaves it in its precision"
    plain = next((each for each in (nn.Embedding, *kinds) if isinstance(module, each)), type(module))
    if unwrapped(module)[0].forward is not plain.forward and not torch_qat.is_trained(module):
        return f"this {kind} has a forward of its own, which would be lost"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight and never calls it"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is no parameter of its own: quantized or computed already"
    if is_composed(weight):
        return f"its weight is a {type(weight).__name__}: quantized or spread already"
    if weight.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}, and this works on {wanted}"
    return ""


def check_gradients(work: Workload) -> None:
    """Refuse a model whose forward differentiates through layers that have no gradient any more.

    Raises:
        UnsupportedError: it does.
    """
    if work.inputs is None:
        return
    with torch.random.fork_rng(), torch.no_grad(), keeping_state(work.model):
        try:
            work.model(*work.inputs.args, **work.inputs.kwargs)
        except RuntimeError as error:
            if not any(told in str(error) for told in _WITHOUT_GRADIENT):
                return  # what else does not run is told where it is called
            raise UnsupportedError(
                f"{type(work.model).__name__} computes gradients in its forward (torch.autograd.grad, .backward()), "
                "and layers on integers have none for their inputs: leave those alone that it differentiates through, "
                "with exclude=, or choose a recipe that keeps gradients: 'bf16', 'compile', 'fused_kernels'"
            ) from error


_WITHOUT_GRADIENT = (
    "appears to not have been used in the graph",
    "_weight_int8pack_mm is not implemented",
    "does not require grad and does not have a grad_fn",
)
"""What torch says to those who ask for them."""
