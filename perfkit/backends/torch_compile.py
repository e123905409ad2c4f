"""torch.compile on a copied module."""

from __future__ import annotations

import os
import shutil
import threading
import warnings
from contextlib import ExitStack
from typing import Any

import torch
import torch._inductor.config
from torch import nn
from torch._dynamo.callback import callback_handler
from torch.nn.modules.conv import _ConvNd

from perfkit._report import Effect, Skipped
from perfkit._workload import Workload
from perfkit.backends.torch_state import draws_random
from perfkit.backends.torch_surgery import COMPILED_WITH, FIXED_SHAPES, INTEGER, around_call, compile_in_place, derive


def missing_compiler(device: str) -> str | None:
    """What torch.compile needs on this machine and does not find; None where nothing is missing."""
    if device == "cpu":
        if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++", "cl"))):
            return "torch.compile on CPU needs a C++ compiler, and there is none: install g++ or set CXX"
    elif device == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            return "torch.compile on CUDA needs triton, which is not installed: pip install 'perfkit[triton]'"
    return None


def compiled(work: Workload, mode: str, freezing: bool, **settings: Any) -> tuple[Workload, Effect]:
    """Compile on the first call; for inference without gradients and with the weights frozen into the program."""
    options = dict(torch._inductor.list_mode_options(mode))
    freezing = freezing and not work.trains
    whole = _not_frozen(work) if freezing else ""
    notes = (f"not frozen: {whole}",) if whole else ()
    freezing = freezing and not whole
    if freezing:
        options["freezing"] = True
    if not work.trains and work.inputs is not None and draws_random(work):
        options["fallback_random"] = True
        notes += ("it draws random numbers: by torch's generator, as before, and not by Inductor's own",)
    if any(getattr(type(part), INTEGER, False) for part in work.model.modules()):
        from perfkit.backends import torch_compile_integers as integers  # which imports the kernels

        options |= {
            "pre_grad_custom_pass": integers.ChainedIntegers(),
            "post_grad_custom_pre_pass": integers.JoinedIntegers(),
        }
    if settings.get("dynamic") is None and any(hasattr(type(part), FIXED_SHAPES) for part in work.model.modules()):
        settings["dynamic"] = False
    compile_in_place(work.model, options=options, **settings)
    if not work.trains:
        around_call(work.model, _FrozenInference if freezing else torch.no_grad)
    if freezing:
        _compile_anew_with_new_weights(work.model)  # outermost: its reset takes away what _FrozenInference registers
    return work, Effect((work.backend.model_name(work),), tuple(_left_eager(work.model)), notes)


def _not_frozen(work: Workload) -> str:
    """Why weights are not frozen into the program; empty where they can be."""
    if work.layout is not None and work.layout.size("tensor") > 1:
        return "Inductor freezes whole weights, and tensor_parallel splits them"
    convolutions = (layer for layer in work.model.modules() if isinstance(layer, _ConvNd))
    weights = (parameter for layer in convolutions for parameter in layer.parameters(recurse=False))
    if work.device == "cpu" and any(weight.dtype == torch.float64 for weight in weights):
        # torch 2.13 raises then: "itensor_view_from_dense expects float"
        return "Inductor packs a convolution's frozen weight for oneDNN, which has no float64"
    return ""


def uncompiled(model: nn.Module) -> dict[str, Any] | None:
    """Take off a model what `compiled` put around it; returns the settings that it compiles with, None without.

    Weights are not frozen by these settings.
    """
    kind = next((kind for kind in type(model).__mro__ if COMPILED_WITH in vars(kind)), None)
    if kind is None:
        return None
    settings = dict(vars(kind)[COMPILED_WITH])
    settings["options"] = {name: value for name, value in settings["options"].items() if name != "freezing"}
    model.__class__ = kind.__mro__[1]
    model._compiled_call_impl = None
    for name in ("_perfkit_frozen", "_perfkit_written"):
        vars(model).pop(name, None)
    return settings


class _FrozenInference:
    """Within it there are no gradients, and what is compiled freezes its weights.

    `options={"freezing": True}` alone freezes nothing (torch 2.11 to 2.13): Dynamo, which decides whether weights are
    constants of the graph, reads the global setting. Setting it costs microseconds, so it is set while something
    compiles and not at each call.
    """

    def __enter__(self):
        self.gradients = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        _calls.depth = getattr(_calls, "depth", 0) + 1
        if _freeze not in callback_handler.start_callbacks:  # the first time, or after torch.compiler.reset()
            callback_handler.register_start_callback(_freeze)
            callback_handler.register_end_callback(_thaw)

    def __exit__(self, *_):
        _calls.depth -= 1
        torch._C._set_grad_enabled(self.gradients)


_calls = threading.local()


def _freeze(_: Any) -> None:
    if getattr(_calls, "depth", 0):
        _calls.settings = ExitStack()
        _calls.settings.enter_context(torch._inductor.config.patch(freezing=True))
        _calls.settings.enter_context(warnings.catch_warnings())
        # Inductor's own, when it lowers integer kernels
        warnings.filterwarnings("ignore", "To copy construct from a tensor", UserWarning)


def _thaw(_: Any) -> None:
    if settings := vars(_calls).pop("settings", None):
        settings.close()


def _left_eager(model: nn.Module) -> list[Skipped]:
    from perfkit.backends.torch_fused_rnn import (
        calls_kernel,
    )  # which imports the kernels: only where something is compiled

    if getattr(torch._dynamo.config, "allow_rnn", False):
        return []
    return [
        Skipped(name or type(module).__name__, f"torch.compile does not trace nn.{module._get_name()}: it runs eagerly")
        for name, module in model.named_modules()
        if isinstance(module, nn.RNNBase) and not calls_kernel(module)
    ]


def _compile_anew_with_new_weights(model: nn.Module) -> None:
    """Frozen weights must not go stale: writing to them, `load_state_dict` and `.to` make the next call compile again.

    Writes through `parameter.data` leave no trace in torch and are the one way that is not seen.
    """
    base = type(model)
    _watch(model)

    def __call__(self, *args, **kwargs):
        if sum([parameter._version for parameter in self._perfkit_frozen]) != self._perfkit_written:
            _watch(self)
            torch.compiler.reset()
        return base.__call__(self, *args, **kwargs)

    def replacing(method: str):
        def replaced(self, *args, **kwargs):
            result = getattr(base, method)(self, *args, **kwargs)
            self._perfkit_written = -1
            return result

        return replaced

    derive(model, __call__=__call__, load_state_dict=replacing("load_state_dict"), _apply=replacing("_apply"))


def _watch(model: nn.Module) -> None:
    model._perfkit_frozen = tuple(model.parameters())
    model._perfkit_written = sum([parameter._version for parameter in model._perfkit_frozen])
