"""nn.LSTM, nn.GRU and nn.RNN whose forward is `perfkit.kernels.rnn`: the same module, parameters and interface."""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch._dynamo.config
from torch import Tensor, nn
from torch._dynamo.callback import callback_handler
from torch.nn.utils.rnn import PackedSequence

from perfkit.backends.torch_spellings import Last
from perfkit.backends.torch_surgery import INTEGER_RNN, derive
from perfkit.kernels._torch import lowered
from perfkit.kernels.rnn.torch_call import picked_at_once, run
from perfkit.kernels.sequence.cpu_kernel import LastStep

FORWARDS = (nn.LSTM.forward, nn.GRU.forward, nn.RNN.forward)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FUSED = "_perfkit_fused"
"""Marks the classes of the modules whose forward is ours."""
TRACED = "_perfkit_traced"
"""Marks the classes of models that torch.compile may trace with their recurrent modules."""


def refusal(module: nn.RNNBase) -> str | None:
    """Why `fuse` cannot take this module; None where it can."""
    if is_fused(module):
        return "it runs in perfkit's kernels already"
    if type(module).forward not in FORWARDS:
        return f"this {module._get_name()} has a forward of its own, which would be lost"
    if module.proj_size:
        return f"it projects its hidden state (proj_size={module.proj_size}), which the kernels do not"
    missing = [name for name in module._flat_weights_names if name not in module._parameters]
    if missing:
        return f"its {missing[0]} is computed (a parametrization), which nn.{module._get_name()} reads in its own way"
    dtypes = {module._parameters[name].dtype for name in module._flat_weights_names}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        return f"its weights are {', '.join(sorted(str(dtype).removeprefix('torch.') for dtype in dtypes))}"
    return None


def is_fused(module: nn.Module) -> bool:
    """Whether `fuse` was here."""
    return getattr(type(module), FUSED, False)


def may_begin(module: nn.RNNBase) -> bool:
    """Whether it is a recurrent layer as torch has it, or one that runs in the kernels."""
    return type(module).forward in FORWARDS or is_fused(module)


def last_problem(links: tuple, x: Tensor) -> LastStep | None:
    """What a recurrent layer whose last step alone is read computes of x in the CPU kernel; None where it does not."""
    module = links[-1]
    if not is_fused(module) or len(links) != 2 or not isinstance(links[0], Last):
        return None
    output = "batch-first output" if module.batch_first else "output"
    state = "LSTM state" if module.mode == "LSTM" else "state"
    if links[0].reads not in (output, state) or not _usual(x, module.weight_ih_l0, 3):
        return None
    weights = [lowered("cpu", *direction) for direction in module.all_weights]
    form = module.mode, weights, module.batch_first, module.bidirectional
    problem = picked_at_once(*lowered("cpu", x), *form)
    dropped = module.dropout and module.training and module.num_layers > 1
    return None if problem is None or module.bidirectional or dropped else LastStep(problem, module.batch_first)


def fuse(module: nn.RNNBase) -> None:
    """Give `module` a forward that calls `perfkit.kernels.rnn` with its parameters as they are at each call.

    What the kernels do not take (other dtypes, an empty batch) goes the module's own way.
    """
    base = type(module)
    each = 4 if module.bias else 2
    names = module._flat_weights_names
    groups = [tuple(names[at : at + each]) for at in range(0, len(names), each)]

    def forward(self, input, hx=None):
        parameters = self._parameters
        return _forward(self, input, hx, [[parameters[name] for name in group] for group in groups], base.forward)

    derive(module, forward=forward, **{FUSED: True})


def _forward(module: nn.RNNBase, given: Any, hx: Any, weights: list, own: Any) -> Any:
    """What nn.RNNBase's forwards do around their kernels: unbatched input, states, packed sequences."""
    packed = isinstance(given, PackedSequence)
    x = given.data if packed else given
    if not _usual(x, weights[0][0], 2 if packed else 3):
        if not packed and _usual(x, weights[0][0], 2):
            return _unbatched(module, x, hx)
        return own(module, given, hx)
    h0, c0 = (hx, None) if module.mode != "LSTM" else (None, None) if hx is None else hx
    layout = module.batch_first, module.bidirectional, module.dropout, module.training
    y, hn, cn = run(given, module.mode, weights, h0, c0, None, *layout, None, False, None)
    return y, (hn, cn) if module.mode == "LSTM" else hn


def _usual(x: Any, weight: Tensor, dims: int) -> bool:
    """Whether the kernels may take it; torch says what is wrong with the rest."""
    if not isinstance(x, Tensor) or x.dim() != dims or x.dtype not in DTYPES or not x.numel():
        return False
    return x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type)


def _unbatched(module: nn.RNNBase, x: Tensor, hx: Any) -> Any:
    """One sequence, (T, I), as a batch of one."""
    if hx is not None:
        states = hx if module.mode == "LSTM" else (hx,)
        for state in states:
            if state.dim() != 2:
                raise RuntimeError(f"For unbatched 2-D input, hx should also be 2-D but got {state.dim()}-D tensor")
        hx = tuple(state.unsqueeze(1) for state in states)
        hx = hx if module.mode == "LSTM" else hx[0]
    batch = 0 if module.batch_first else 1
    y, states = module.forward(x.unsqueeze(batch), hx)
    states = tuple(state.squeeze(1) for state in states) if module.mode == "LSTM" else states.squeeze(1)
    return y.squeeze(batch), states


class _Calls(threading.local):
    """How many calls of models are on their way in this thread, and what was set for a compilation within them."""

    depth = 0
    setting: Any = None


_calls = _Calls()


def _allow(_: Any) -> None:
    if _calls.depth:
        _calls.setting = torch._dynamo.config.patch(allow_rnn=True)
        _calls.setting.__enter__()


def _forbid(_: Any) -> None:
    if setting := _calls.setting:
        _calls.setting = None
        setting.__exit__(None, None, None)


def calls_kernel(module: nn.Module) -> bool:
    """Whether a recurrent module's forward is a call of a kernel of ours, in floats or on integers."""
    return is_fused(module) or getattr(type(module), INTEGER_RNN, False)


def let_compile(model: nn.Module) -> None:
    """Let torch.compile trace `model` whole, if its recurrent modules all call kernels; otherwise it breaks the graph.

    It knows them by their class, and that is still what they are. The setting is torch's own and global: it is changed
    while something inside a call of `model` compiles, and not at each call.
    """
    found = [module for module in model.modules() if isinstance(module, nn.RNNBase)]
    if not found or not all(map(calls_kernel, found)) or hasattr(type(model), TRACED):
        return
    base = type(model)

    def __call__(self, *args, **kwargs):
        # no context manager: those take a microsecond, of a small model's twenty
        _calls.depth += 1
        if _allow not in callback_handler.start_callbacks:  # the first time, or after torch.compiler.reset()
            callback_handler.register_start_callback(_allow)
            callback_handler.register_end_callback(_forbid)
        try:
            return base.__call__(self, *args, **kwargs)
        finally:
            _calls.depth -= 1

    derive(model, __call__=__call__, **{TRACED: True})
