"""nn.LSTM, nn.GRU and nn.RNN on int8 weights, for inference on CPU: the same module, without its float weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from perfkit._errors import InvalidInputError, UnsupportedError
from perfkit.backends.torch_surgery import INTEGER_RNN, derive

FORWARDS = (nn.LSTM.forward, nn.GRU.forward, nn.RNN.forward)


def refusal(module: nn.Module) -> str | None:
    """Why `quantize_rnn` cannot take this module, and what to do; None where it can."""
    if not isinstance(module, (nn.LSTM, nn.GRU, nn.RNN)):
        return f"{type(module).__name__} is no nn.LSTM, nn.GRU or nn.RNN"
    if is_quantized(module):
        return "its weights are int8 already"
    if type(module).forward not in FORWARDS:
        return f"{type(module).__name__} has a forward of its own, which would be lost"
    if module.proj_size:
        return f"it projects its hidden state (proj_size={module.proj_size}), which the int8 kernel does not"
    missing = [name for name in module._flat_weights_names if name not in module._parameters]
    if missing:
        return f"its {missing[0]} is computed (a parametrization): remove that first"
    if module.training:
        return "it is in training mode, and int8 weights cannot be trained: call .eval()"
    weights = [getattr(module, name) for name in module._flat_weights_names]
    dtypes = {weight.dtype for weight in weights}
    if dtypes != {torch.float32}:
        found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        return f"its weights are {found}: expected float32, call .float()"
    if any(weight.device.type != "cpu" for weight in weights):
        return f"it is on {weights[0].device}: the int8 kernel runs on CPU, call .cpu()"
    if not all(bool(weight.isfinite().all()) for weight in weights):
        return "its weights are not all finite numbers"
    return None


def is_quantized(module: nn.Module) -> bool:
    """Whether `quantize_rnn` was here."""
    return getattr(type(module), INTEGER_RNN, False)


def quantize_rnn(module: nn.RNNBase, *, input_scale: float | None = None) -> None:
    """Give `module` int8 weights, in place: it becomes one of a subclass of its class, with the same interface.

    Its parameters are replaced by buffers: for each direction of each layer `packed_ih`, `scale_ih`, `packed_hh`,
    `scale_hh`, `bias` and, for the GRU, `bias_hn`, with the suffixes `_l0`, `_l0_reverse`, ... The equations are in
    `perfkit.kernels.rnn_int8`. Inputs may be of any floating dtype, outputs are float32.

    Args:
        module: nn.LSTM, nn.GRU or nn.RNN, float32, on CPU, in eval mode.
        input_scale: the static scale of the input (its largest magnitude / 127, from calibration): what lies outside is
            clipped. Without it each row of each step has a scale of its own, which costs little and clips nothing.

    Raises:
        UnsupportedError: `refusal(module)`, or there is no C++ compiler to build the kernel.
        InvalidInputError: `input_scale` is no positive number.
    """
    from perfkit.kernels.rnn_int8 import torch_op

    if reason := refusal(module):
        raise UnsupportedError(f"{type(module).__name__} cannot have int8 weights: {reason}")
    if input_scale is not None and not 0 < input_scale < float("inf"):
        raise InvalidInputError(f"input_scale is {input_scale!r}: expected a positive number, or None")
    torch_op.library()  # the first thing that can fail, before anything is changed
    directions = {suffix: _direction(module, suffix) for suffix in _suffixes(module)}
    for name in module._flat_weights_names:
        delattr(module, name)
    module._flat_weights_names, module._flat_weights, module._flat_weight_refs = [], [], []
    fields = torch_op.fields(module.mode)
    module._all_weights = [[f"{field}{suffix}" for field in fields] for suffix in directions]
    for suffix, direction in directions.items():
        for field in fields:
            module.register_buffer(f"{field}{suffix}", getattr(direction, field))
    module.register_buffer("input_scale", torch.tensor(input_scale or 0.0))
    _derive(module)


def _suffixes(module: nn.RNNBase) -> list[str]:
    """torch's names for the directions of the layers, in its order."""
    ways = ("", "_reverse") if module.bidirectional else ("",)
    return [f"_l{layer}{way}" for layer in range(module.num_layers) for way in ways]


@torch.no_grad()
def _direction(module: nn.RNNBase, suffix: str) -> Any:
    """The quantized weights of one direction of one layer."""
    from perfkit.kernels.rnn_int8.problem import GATES
    from perfkit.kernels.rnn_int8.torch_op import Direction
    from perfkit.kernels.rnn_int8.weights import pack, quantize

    gates, hidden = GATES[module.mode], module.hidden_size
    q_ih, scale_ih = quantize(getattr(module, f"weight_ih{suffix}").detach())
    q_hh, scale_hh = quantize(getattr(module, f"weight_hh{suffix}").detach())
    if module.bias:
        bias, bias_hh = (
            getattr(module, f"bias_ih{suffix}").detach().clone(),
            getattr(module, f"bias_hh{suffix}").detach(),
        )
    else:
        bias = bias_hh = torch.zeros(gates * hidden)
    bias_hn = None
    if module.mode == "GRU":  # its n gate multiplies this bias by r before the other one is added
        bias_hn, bias_hh = bias_hh[2 * hidden :].clone(), bias_hh.clone()
        bias_hh[2 * hidden :] = 0
    return Direction(pack(q_ih, gates), scale_ih, pack(q_hh, gates), scale_hh, bias + bias_hh, bias_hn)


def _derive(module: nn.RNNBase) -> None:
    """The class of a quantized module."""
    base = type(module)

    def forward(self, input, hx=None):
        return _forward(self, input, hx)

    def _apply(self, fn, recurse=True):
        """`.to(dtype)`, `.half()` and the like: scales and biases stay in float32, which the kernel reads."""
        before = {name: buffer for name, buffer in self._buffers.items() if buffer.is_floating_point()}
        nn.Module._apply(self, fn, recurse)
        for name, buffer in before.items():
            if self._buffers[name].dtype != torch.float32:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self

    def __reduce_ex__(self, protocol):
        """Classes made at run time cannot be found by pickle: the plain class is, and this one is made anew."""
        if type(self).__dict__.get("forward") is forward:
            return _restored, (base,), self.__getstate__()
        return base.__reduce_ex__(self, protocol)  # of a further subclass, that deepcopy must keep

    def flatten_parameters(self):
        """There are none."""

    derive(
        module,
        forward=forward,
        _apply=_apply,
        __reduce_ex__=__reduce_ex__,
        flatten_parameters=flatten_parameters,
        **{INTEGER_RNN: True},
    )


def _restored(base: type[nn.RNNBase]) -> nn.RNNBase:
    """An empty quantized module, for pickle and deepcopy to fill."""
    module = base.__new__(base)
    _derive(module)
    return module


def _forward(self: nn.RNNBase, given: Any, hx: Any) -> tuple[Any, Any]:
    """What nn.RNNBase's forwards do around their kernels: checks, unbatched input, packed sequences, states."""
    from perfkit.kernels.rnn_int8 import torch_op

    name = self._get_name()
    if self.training:
        raise UnsupportedError(f"this {name} has int8 weights, which cannot be trained: call .eval()")
    packed = isinstance(given, PackedSequence)
    x, batch_sizes, order, back = given if packed else (given, None, None, None)
    if not packed and x.dim() not in (2, 3):
        raise ValueError(f"{name}: Expected input to be 2D or 3D, got {x.dim()}D instead")
    if x.size(-1) != self.input_size:
        raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {x.size(-1)}")
    if not x.is_floating_point():
        raise ValueError(f"{name}: Expected a floating dtype, got {x.dtype}")
    batch_dim = 0 if self.batch_first else 1
    unbatched = not packed and x.dim() == 2
    if unbatched:
        x = x.unsqueeze(batch_dim)
    shape = self.get_expected_hidden_size(x, batch_sizes)
    if hx is None:
        initial = (x.new_zeros(shape, dtype=torch.float32), None) if packed else (None, None)
    else:
        states = hx if self.mode == "LSTM" else (hx,)
        initial = [_initial(state, shape, unbatched, order) for state in states]
    out, *final = torch_op.run(
        x.to(torch.float32),
        batch_sizes,
        initial[0],
        initial[1] if self.mode == "LSTM" else None,
        [self._buffers[name] for names in self._all_weights for name in names],
        self.mode,
        self.hidden_size,
        self.bidirectional,
        self.batch_first and not packed,
        self.input_scale,
    )
    final = [_permuted(state, back) for state in final[: 2 if self.mode == "LSTM" else 1]]
    if packed:
        out = PackedSequence(out, batch_sizes, order, back)
    elif unbatched:
        out, final = out.squeeze(batch_dim), [state.squeeze(1) for state in final]
    return out, tuple(final) if self.mode == "LSTM" else final[0]


def _initial(state: Tensor, shape: tuple[int, int, int], unbatched: bool, order: Tensor | None) -> Tensor:
    """An initial state as the operator takes it."""
    dims = 2 if unbatched else 3
    if state.dim() != dims:
        kind = "unbatched 2-D" if unbatched else "batched 3-D"
        raise RuntimeError(f"For {kind} input, hx should also be {dims}-D but got {state.dim()}-D tensor")
    state = state.unsqueeze(1) if unbatched else state
    if state.shape != shape:
        raise RuntimeError(f"Expected hidden size {shape}, got {list(state.shape)}")
    return _permuted(state, order).to(torch.float32)


def _permuted(state: Tensor, order: Tensor | None) -> Tensor:
    return state if order is None else state.index_select(1, order)
