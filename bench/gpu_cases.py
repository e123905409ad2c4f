"""The ops' cases on a device's tensors, as subjects of checks and timings."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from bench.gpu_subject import Subject
from perfkit.kernels import conv2d, linear_int8, rnn
from perfkit.kernels.conv2d.cases import Case as ConvCase
from perfkit.kernels.conv2d.problem import options
from perfkit.kernels.conv2d.torch_problem import problem_of
from perfkit.kernels.linear_int8 import reference as linear_reference
from perfkit.kernels.linear_int8 import torch_op as linear_op
from perfkit.kernels.linear_int8.cases import Case as LinearCase
from perfkit.kernels.rnn.cases import ROUNDOFF, distance, numbers, tolerance
from perfkit.kernels.rnn.cases import Case as RnnCase


class Rnn(Subject):
    """A stack of recurrent layers. The weights are a torch module's own, in one piece, as cuDNN wants them."""

    def __init__(self, case: RnnCase, training: bool, device: str, name: str = ""):
        super().__init__(name or str(case), rnn.OP, training, device)
        self.case = case
        if device == "meta":
            return
        given = numbers(case)
        kind = {"RNN_TANH": "RNN", "RNN_RELU": "RNN"}.get(case.mode, case.mode)
        more = {"nonlinearity": case.mode[4:].lower()} if kind == "RNN" else {}
        layout = {"batch_first": case.batch_first, "bidirectional": case.bidirectional, "bias": case.bias}
        module = getattr(torch.nn, kind)(case.inputs, case.hidden, case.layers, **layout, **more)
        self.module = module.to(device, getattr(torch, case.dtype)).requires_grad_(training).train(training)
        with torch.no_grad():
            for mine, theirs in zip(self.module.all_weights, given.weights, strict=True):
                for weight, array in zip(mine, theirs, strict=True):
                    weight.copy_(torch.from_numpy(array))
        self.weights = [tuple(direction) for direction in self.module.all_weights]
        self.x = self._made(given.x).requires_grad_(training)
        self.rows = None if given.rows is None else torch.from_numpy(given.rows)
        states = [self._made(state) for state in (given.h0, given.c0) if state is not None]
        self.states = [state.requires_grad_(training) for state in states]
        self.leaves = {"x": self.x} | dict(zip(("h0", "c0"), self.states, strict=False))
        names = ("w_ih", "w_hh", "b_ih", "b_hh")
        for i, direction in enumerate(self.weights):
            self.leaves |= {f"{name} {i}": weight for name, weight in zip(names, direction, strict=False)}
        wanted = (given.d_y, given.d_hn, given.d_cn)
        self.gradients = [self._made(array) for array in wanted if array is not None]

    def _made(self, array: Any) -> Tensor:
        return torch.from_numpy(array).to(self.device, getattr(torch, self.case.dtype))

    @property
    def problem(self) -> Any:
        return self.case.problem("torch", self.device, self.training)

    def outputs(self, implementation: str | None) -> list[Tensor]:
        return self._run(self.x, self.weights, self.states, implementation)

    def _run(self, x, weights, states, implementation) -> list[Tensor]:
        mode, packed = self.case.mode, self.case.ragged == "packed"
        function = {"LSTM": rnn.lstm, "GRU": rnn.gru}.get(mode, rnn.rnn)
        more = {"nonlinearity": mode[4:].lower()} if mode.startswith("RNN") else {}
        y, *last = function(
            PackedSequence(x, self.rows) if packed else x,
            weights,
            *states,
            lengths=self.rows if self.case.ragged == "lengths" else None,
            batch_first=self.case.batch_first,
            bidirectional=self.case.bidirectional,
            implementation=implementation,
            **more,
        )
        return [y.data if packed else y, *last]

    def native(self) -> list[Tensor]:
        states = (tuple(self.states) if self.case.mode == "LSTM" else self.states[0],) if self.states else ()
        x, ragged, first = self.x, self.case.ragged, self.case.batch_first
        if ragged == "packed":
            x = PackedSequence(x, self.rows)
        if ragged == "lengths":
            x = torch.nn.utils.rnn.pack_padded_sequence(x, self.rows, first, enforce_sorted=False)
        y, last = self.module(x, *states)
        if ragged == "packed":
            y = y.data
        if ragged == "lengths":
            y, _ = torch.nn.utils.rnn.pad_packed_sequence(y, first, total_length=self.case.steps)
        return [y, *(last if self.case.mode == "LSTM" else (last,))]

    @functools.cached_property
    def expected(self) -> list[Tensor]:
        wide = {name: leaf.detach().double().requires_grad_(self.training) for name, leaf in self.leaves.items()}
        each, states = len(self.weights[0]), [wide[name] for name in ("h0", "c0") if name in wide]
        flat = list(wide.values())[1 + len(states) :]
        weights = [tuple(flat[i : i + each]) for i in range(0, len(flat), each)]
        with torch.set_grad_enabled(self.training):
            found = self._run(wide["x"], weights, states, "reference")
        if self.training:
            given = [gradient.double() for gradient in self.gradients]
            found = [*found, *torch.autograd.grad(found, list(wide.values()), given)]
        return [tensor.detach() for tensor in found]

    def wrong(self, implementation: str, found: list[Tensor]) -> str:
        count = 3 if self.case.mode == "LSTM" else 2
        names = [*("y", "hn", "cn")[:count], *(self.leaves if self.training else ())]
        told = []
        for i, (name, actual, expected) in enumerate(zip(names, found, self.expected, strict=True)):
            off = distance(self.case, actual.detach().double(), expected, gradient=i >= count)
            most = tolerance(self.case, gradient=i >= count)
            if not off <= most * self._rounding(implementation):
                told.append(f"{name} is off by {off:.1e}, and may be by {most * self._rounding(implementation):.1e}")
        return "; ".join(told)

    def _rounding(self, implementation: str) -> float:
        """How much more a library may round than the tolerance says.

        cuDNN multiplies float32 as TF32, of 11 bits for 24, where torch's settings let it: they do by default. In half
        precision libraries round gates and cells too, where kernels of ours hold them in float32: twice the roundings.
        """
        if implementation != "library":
            return 1.0
        if self.case.dtype != "float32":
            return 2.0
        tf32 = self.device == "cuda" and torch.backends.cudnn.rnn.fp32_precision == "tf32"
        return 2.0**13 if tf32 else 1.0


class Conv(Subject):
    """A convolution and what follows it.

    With `integers` all numbers are small integers, of which every sum is exact in float32, in whatever order: results
    must be the reference's, bit for bit, with all ties that whole numbers make.
    """

    def __init__(self, case: ConvCase, dtype: str, channels_last: bool, integers: bool, training: bool, device: str):
        layout = "NHWC" if channels_last else "NCHW"
        super().__init__(f"{case.name} {layout} {dtype}", conv2d.OP, training, device)
        draw, self.case, self.integers = torch.Generator().manual_seed(0), case, integers
        dense = torch.channels_last if channels_last else torch.contiguous_format

        def made(*shape: int) -> Tensor:
            if device == "meta":
                return torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            found = torch.randint(-3, 4, shape, generator=draw) if integers else torch.randn(shape, generator=draw)
            return found.to(device, getattr(torch, dtype))

        self.x = made(*case.image).contiguous(memory_format=dense).requires_grad_(training)
        self.weight = made(*case.weight).requires_grad_(training)
        self.bias = made(case.outputs).requires_grad_(training) if case.bias else None
        self.leaves = {"x": self.x, "weight": self.weight} | ({"bias": self.bias} if case.bias else {})
        size = self.problem.out_size
        self.gradients = [made(case.batch, case.outputs, *size).contiguous(memory_format=dense)]

    @functools.cached_property
    def problem(self) -> Any:
        plain = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "activation": None, "pool": None}
        given = options(**(plain | self.case.options))
        return problem_of(self.x, self.weight, self.bias, given, self.training)

    def outputs(self, implementation: str | None) -> list[Tensor]:
        return [conv2d.conv2d(self.x, self.weight, self.bias, **self.case.options, implementation=implementation)]

    def native(self) -> list[Tensor]:
        made = self.problem
        top, bottom, left, right = made.padding
        x, padding = self.x, (top, left)
        if (top, left) != (bottom, right):
            x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
        y = F.conv2d(x, self.weight, self.bias, made.stride, padding, made.dilation, made.groups)
        y = F.relu(y) if made.activation == "relu" else y
        return [F.max_pool2d(y, made.pool) if made.pool > 1 else y]

    @functools.cached_property
    def expected(self) -> list[Tensor]:
        wide = {name: leaf.detach().double().requires_grad_(self.training) for name, leaf in self.leaves.items()}
        given = wide["x"], wide["weight"], wide.get("bias")
        with torch.set_grad_enabled(self.training):
            found = [conv2d.conv2d(*given, **self.case.options, implementation="reference")]
        if self.training:
            found += torch.autograd.grad(found, list(wide.values()), [self.gradients[0].double()])
        return [tensor.detach() for tensor in found]

    def wrong(self, implementation: str, found: list[Tensor]) -> str:
        """Of numbers that are no integers only y is compared: which places win among near ties is nobody's error."""
        names, told = ["y", *(self.leaves if self.training and self.integers else ())], []
        for name, actual, expected in zip(names, found, self.expected, strict=False):
            off = float((actual.detach().double() - expected.to(actual.dtype).double()).abs().max())
            most = self._most(implementation, expected)
            if not off <= most:
                told.append(f"{name} is off by {off:.1e}, and may be by {most:.1e}")
        return "; ".join(told)

    def _most(self, implementation: str, expected: Tensor) -> float:
        """Kernels of ours and the reference sum in float32. The library rounds parts of sums, and transforms tiles."""
        kind = str(self.x.dtype).removeprefix("torch.")
        size = float(expected.abs().max())
        tf32 = self.device == "cuda" and torch.backends.cudnn.conv.fp32_precision == "tf32" and kind == "float32"
        if implementation == "library":
            return 16 * size * (2.0**-11 if tf32 else ROUNDOFF[kind])
        if self.integers:
            return 0.0
        # sums of products of normal numbers are of the size sqrt(taps), their magnitudes' sum of the size taps
        terms = self.problem.taps + 2
        rounding = terms * ROUNDOFF["float32"] + (2 * 2.0**-11 if tf32 else 0.0)
        return size * 2 * ROUNDOFF[kind] + terms * rounding


class Linear(Subject):
    """A linear layer of int8 weights."""

    def __init__(self, case: LinearCase, device: str):
        super().__init__(case.name, linear_int8.OP, False, device)
        draw, self.case = torch.Generator().manual_seed(0), case

        def integers(*shape: int) -> Tensor:
            if device == "meta":
                return torch.empty(shape, dtype=torch.int8, device=device)
            return torch.randint(-127, 128, shape, dtype=torch.int8, generator=draw).to(device)

        def floats(*shape: int) -> Tensor:
            return torch.rand(shape, generator=draw).to(device)

        self.x = integers(case.rows, case.inputs)
        if case.x != "int8":
            self.x = self.x.to(getattr(torch, case.x)) / 40
        self.x_scale = None
        if case.x == "int8":
            self.x_scale = floats(case.rows) if case.scale == "row" else floats(1)
        self.weight, self.weight_scale = integers(case.outputs, case.inputs), floats(case.outputs) / 100
        self.bias = floats(case.outputs) if case.bias else None
        self.plain = (self.weight * self.weight_scale[:, None]).bfloat16()  # what the layer was before

    @functools.cached_property
    def problem(self) -> Any:
        given = self.x, self.weight, self.weight_scale, self.bias, self.x_scale
        return linear_op._problem(*given, self.case.activation, torch.float32)

    def outputs(self, implementation: str | None) -> list[Tensor]:
        more = {"x_scale": self.x_scale, "activation": self.case.activation, "implementation": implementation}
        return [linear_int8.linear_int8(self.x, self.weight, self.weight_scale, self.bias, **more)]

    def native(self) -> list[Tensor]:
        """The layer in bfloat16, unquantized: what is given up for int8."""
        y = F.linear(self.x.bfloat16(), self.plain, None if self.bias is None else self.bias.bfloat16())
        return [F.relu(y) if self.case.activation == "relu" else y]

    @functools.cached_property
    def expected(self) -> tuple[Tensor, Tensor]:
        """The result in float64, and how large its terms are together."""
        x, scale = self.x, self.x_scale
        if scale is None:
            x, scale = linear_reference.quantize(torch, x.float())
        sums = x.double() @ self.weight.double().t()
        y = sums * scale.double().reshape(-1, 1) * self.weight_scale.double()
        size = y.abs()
        if self.bias is not None:
            y, size = y + self.bias.double(), size + self.bias.double().abs()
        return (y.relu() if self.case.activation == "relu" else y), size

    def wrong(self, implementation: str, found: list[Tensor]) -> str:
        """Four roundings: the sum as float32, two scales, the bias."""
        expected, size = self.expected
        off = (found[0].double() - expected).abs()
        worst = float((off / (4 * ROUNDOFF["float32"] * size + 1e-37)).max())
        return "" if worst <= 1 else f"y is off by {worst:.1f} times what four roundings make"
