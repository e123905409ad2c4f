"""Quantization of torch modules, layer by layer: how, on which grid, and what the caller is told.

On CPU no graph is exported. Each layer's `forward` does what torchao's PT2E flow with its X86 quantizer would write
into an exported graph (round the input, round the weight, multiply), and Inductor turns that pattern into integer
kernels when the model is compiled. Working on layers, it does not matter how `forward` calls them: twice, with a
`view` in between, on packed sequences, behind Python's control flow.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from perfkit._errors import missing
from perfkit._report import Effect, Skipped
from perfkit._workload import Workload
from perfkit.backends.torch_encoder import leave_short_cuts
from perfkit.backends.torch_fused_rnn import let_compile
from perfkit.backends.torch_stderr import without_lines
from perfkit.backends.torch_surgery import WHOLE
from perfkit.backends.torch_training import teacher
from perfkit.quantization import (
    torch_int4,
    torch_integer_kernels,
    torch_layers,
    torch_onednn,
    torch_qat,
    torch_rnn_int8,
)
from perfkit.quantization.torch_choice import FLOATS, check_gradients, choose
from perfkit.quantization.torch_fold import fold_norms
from perfkit.quantization.torch_layers import CONVS
from perfkit.quantization.torch_onednn import top
from perfkit.quantization.torch_ranges import calibrate, linked

if TYPE_CHECKING:
    from perfkit._recipe import LayerRecipe


def unavailable(device: str, needed: tuple[int, int], on_cpu: bool = True) -> str | None:
    """Why a device cannot run it; None where it can.

    Args:
        needed: the CUDA compute capability from which on there are kernels.
    """
    if device == "cuda":
        found = torch.cuda.get_device_capability()
        if found < needed:
            return (
                f"it needs a GPU of compute capability {needed[0]}.{needed[1]}, and this one has {found[0]}.{found[1]}"
            )
        return None if find_spec("torchao") else "on CUDA it needs torchao: pip install 'perfkit[torch]'"
    if device == "cpu" and on_cpu:
        return None
    return f"there are no kernels for it on {device}: it needs a GPU of compute capability {needed[0]}.{needed[1]}"


def int8(work: Workload, recipe: LayerRecipe) -> tuple[Workload, Effect]:
    """Weights and activations in 8 bits, on grids read from calibration data.

    Args:
        recipe: has `weight_bits`.

    Raises:
        InvalidInputError: a calibration batch does not run.
    """
    if work.device == "cuda":
        return _int8_cuda(work, recipe)
    layers, skipped = choose(work.model, recipe, (nn.Linear, *CONVS))
    trained = {name for name, module in layers.items() if torch_qat.is_trained(module)}
    folded = fold_norms(work, {name: m for name, m in layers.items() if isinstance(m, CONVS) and name not in trained})
    for name in [] if recipe.include else [name for name in layers if name not in trained and _depthwise(layers[name])]:
        del layers[name]
        skipped.append(Skipped(name, _DEPTHWISE))
    leave_short_cuts(work.model)
    multiplying = {name: module for name, module in layers.items() if _multiplies(module)}
    followers = linked(work, multiplying).followers
    observed, samples = calibrate(work, {name: m for name, m in multiplying.items() if name not in trained})
    touched, clipped, most = [], {}, top()
    for name, module in layers.items():
        if not _multiplies(module):
            _without_calibration(module)
        elif name in trained:
            torch_layers.static(module, torch_qat.stripped(module), recipe.weight_bits)
        elif reason := observed[name].dead:
            skipped.append(Skipped(name, reason))
            continue
        else:
            grid, clipped[name] = observed[name].grid(most)
            torch_layers.static(module, grid, recipe.weight_bits)
        touched.append(name)
    notes = (
        *_calibration_notes(work, samples, clipped),
        *(f"{name}: its ranges are those that it was trained with" for name in layers if name in trained),
        *_range_notes(most),
        *(f"{norm} is folded into {conv}" for norm, conv in folded.items()),
        *_quantize_pools(work.model, {pool: layers[name] for pool, name in followers.items() if name in touched}),
    )
    let_compile(work.model)
    check_gradients(work)
    skipped = [item for item in skipped if item.name not in folded]
    return work, _effect(layers, touched, skipped, notes)


def int8_dynamic(work: Workload, recipe: LayerRecipe) -> tuple[Workload, Effect]:
    """Weights in 8 bits beforehand, the inputs of linear layers at each call."""
    if work.device == "cuda":
        return _int8_by_torchao(work, recipe)
    layers, skipped = choose(work.model, recipe, (nn.Linear,))
    leave_short_cuts(work.model)
    for module in layers.values():
        if isinstance(module, nn.Linear):
            torch_layers.dynamic(module, top())
        else:
            _without_calibration(module)
    let_compile(work.model)
    check_gradients(work)
    return work, _effect(layers, layers, skipped, _range_notes(top()))


def weight_only(work: Workload, recipe: LayerRecipe) -> tuple[Workload, Effect]:
    """Weights in 8 bits in memory; everything is computed in the input's precision."""
    layers, skipped = choose(work.model, recipe, (nn.Linear, *CONVS), recurrent=False, dtypes=FLOATS)
    leave_short_cuts(work.model)
    for module in layers.values():
        if isinstance(module, nn.Embedding):
            torch_layers.embedding(module)
        else:
            torch_layers.weight_only(module)
    check_gradients(work)
    return work, Effect(tuple(layers), tuple(skipped))


def int4_weight_only(work: Workload, recipe: LayerRecipe) -> tuple[Workload, Effect]:
    """Weights of linear layers and embeddings in 4 bits in memory; everything is computed in the input's precision.

    Args:
        recipe: has `group_size`.
    """
    if work.device == "cuda":
        options = {"group_size": recipe.group_size}
        return _by_torchao(work, recipe, "Int4WeightOnlyConfig", options, torch.bfloat16)
    layers, skipped = choose(work.model, recipe, (nn.Linear,), recurrent=False, dtypes=FLOATS)
    leave_short_cuts(work.model)
    touched = []
    for name, module in layers.items():
        if reason := torch_int4.refusal(module, recipe.group_size):
            skipped.append(Skipped(name, reason))
            continue
        kind = torch_int4.embedding if isinstance(module, nn.Embedding) else torch_int4.linear
        kind(module, recipe.group_size)
        touched.append(name)
    return work, Effect(tuple(touched), tuple(skipped))


def fp8(work: Workload, recipe: LayerRecipe) -> tuple[Workload, Effect]:
    """Linear layers in float8 with a scale for each row, on GPUs that multiply it."""
    options = {"granularity": torchao().PerRow()}
    return _by_torchao(work, recipe, "Float8DynamicActivationFloat8WeightConfig", options, torch.bfloat16)


def qat(work: Workload, recipe: LayerRecipe) -> tuple[Workload, Effect]:
    """Training with the rounding of `int8` in `forward`, and gradients as if there were none.

    Args:
        recipe: has `weight_bits` and `distill`.

    Source: https://arxiv.org/abs/1712.05877
    """
    if recipe.distill:
        work = work.replace(training=replace(work.training, teacher=teacher(work)))
    layers, skipped = choose(work.model, recipe, (nn.Linear, *CONVS), trains=True)
    leave_short_cuts(work.model)
    for name in [name for name, module in layers.items() if isinstance(module, nn.Embedding)]:
        del layers[name]
        skipped.append(Skipped(name, "embeddings are rounded when 'int8' converts the model, not while it trains"))
    for module in layers.values():
        torch_qat.prepare(module, recipe.weight_bits, top())
    return work, Effect(tuple(layers), tuple(skipped), simulated=True)


def _int8_cuda(work: Workload, recipe: LayerRecipe) -> tuple[Workload, Effect]:
    work, effect = _int8_by_torchao(work, recipe)
    note = "on CUDA the inputs' ranges are read at each call: calibration data is not used"
    return work, replace(effect, notes=(*effect.notes, note))


def torchao() -> Any:
    """`torchao.quantization`, without the lines it prints about kernels that this machine cannot load.

    Raises:
        MissingDependencyError: torchao is not installed.
    """
    if find_spec("torchao") is None:
        raise missing("torchao", "quantization on CUDA", extra="torch")
    with without_lines("Failed to load"):
        return importlib.import_module("torchao.quantization")


def _int8_by_torchao(work: Workload, recipe: LayerRecipe) -> tuple[Workload, Effect]:
    """The second version of torchao's integers: 0.17 takes the first one unasked, which 0.18 has no more."""
    return _by_torchao(work, recipe, "Int8DynamicActivationInt8WeightConfig", {"version": 2})


def _by_torchao(
    work: Workload,
    recipe: LayerRecipe,
    config: str,
    options: Mapping[str, Any] = MappingProxyType({}),
    needs: torch.dtype | None = None,
) -> tuple[Workload, Effect]:
    library = torchao()
    layers, skipped = choose(work.model, recipe, (nn.Linear,), recurrent=False, dtypes=(needs,) if needs else FLOATS)
    for name in [name for name, module in layers.items() if isinstance(module, nn.Embedding)]:
        del layers[name]
        skipped.append(Skipped(name, "on CUDA only linear layers are quantized"))
    leave_short_cuts(work.model)
    chosen = {id(module) for module in layers.values()}
    with warnings.catch_warnings():
        # torchao 0.17's own use of what it deprecates
        warnings.filterwarnings("ignore", "Deprecation: PlainLayout", UserWarning)
        config = getattr(library, config)(**options)
    library.quantize_(work.model, config, filter_fn=lambda module, _: id(module) in chosen)
    return work, Effect(tuple(layers), tuple(skipped), (f"torchao's {type(config).__name__}",))


_DEPTHWISE = "depthwise: too few products for each value that would be rounded, so floats are faster; include= takes it"
"""Measured with oneDNN on AVX-512 with VNNI: on integers, rounding included, twice to six times the time."""


def _depthwise(module: nn.Module) -> bool:
    return isinstance(module, CONVS) and module.groups == module.in_channels > 1


def _multiplies(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, *CONVS))


def _without_calibration(module: nn.Module) -> None:
    if isinstance(module, nn.RNNBase):
        torch_rnn_int8.quantize_rnn(module)
    else:
        torch_layers.embedding(module)


def _effect(layers: Mapping[str, nn.Module], touched: Iterable[str], skipped: Iterable[Skipped], notes: Iterable[str]):
    """What was done; simulated where no touched layer runs on integers before the model is compiled."""
    touched = tuple(touched)
    rounding = [name for name in touched if _multiplies(layers[name])]
    if rounding:
        notes = (*notes, *torch_integer_kernels.known())
    compiled = [name for name in rounding if not torch_onednn.takes(layers[name])]
    recurrent = any(isinstance(layers[name], nn.RNNBase) for name in touched)
    at_once = recurrent or len(compiled) < len(rounding)
    if compiled and at_once:
        notes = (*notes, f"{', '.join(compiled)}: on integers with '+compile' only")
    simulated = bool(compiled) and not at_once
    return Effect(touched, tuple(skipped), tuple(notes), simulated)


def _range_notes(most: int) -> tuple[str, ...]:
    if most == torch_onednn.FULL:
        return ()
    return (
        "this CPU has no VNNI, whose 16-bit sums could overflow with 8-bit activations: they have 7 bits, "
        "which is less exact and gains less",
    )


def _calibration_notes(work: Workload, samples: int, clipped: dict[str, float]) -> Iterator[str]:
    if not clipped:
        return
    source = "" if work.calibration else ", the example inputs alone: give calibration= data as the model will see it"
    yield f"ranges read from {samples} samples{source}"
    worst = max(clipped, key=clipped.get)
    yield f"at most {clipped[worst]:.2%} of a layer's inputs saturate ({worst})"


def _quantize_pools(model: nn.Module, followers: dict[str, nn.Module]) -> Iterator[str]:
    """Put max-pools on the grid of the layer that takes their output, so that they too run on integers."""
    names = {module: name for name, module in model.named_modules()}
    for pool, follower in followers.items():
        flat, whole = isinstance(follower, nn.Linear), getattr(type(follower), WHOLE)
        torch_layers.pool(model.get_submodule(pool), follower.input_grid, flat, whole)
        yield f"{pool} runs on the grid of {names[follower]}"
