"""Groups of links, as forwards hand them over (`torch_conv_forwards.py`), in perfkit's kernels where these take them.

A group looks at what it was given each time it runs: what it knows runs together, anything else (hooks, a norm that
trains, another padding, a module that was replaced since) as it was written.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from perfkit.backends import torch_fused_conv as convolutions
from perfkit.backends import torch_fused_int8 as integers
from perfkit.backends import torch_fused_linear as linears
from perfkit.backends import torch_fused_rnn as recurrent
from perfkit.backends.torch_fused_sequence import Layers, run
from perfkit.backends.torch_surgery import WHOLE
from perfkit.kernels import linear as linear_op
from perfkit.kernels._torch import lowered
from perfkit.kernels.conv2d.problem import options
from perfkit.kernels.conv2d.torch_run import picked
from perfkit.kernels.linear.problem import Problem
from perfkit.kernels.linear.torch_call import linear
from perfkit.measure.environment import has

LEAST_WORK = 1 << 18
"""Multiply-adds of a linear layer that is too little for a call of its own, up to which it goes along with others."""


def group(links: tuple, x: Any) -> Any:
    """Run the links, outermost first, on `x`: together what can be, of the layers that are marked for it."""
    compiles = torch.compiler.is_compiling()
    if not compiles:
        x = _own(x)
        if (y := run(links, x, layers)) is not None:
            return y
    for part in parts(links):
        alone = not compiles and len(part) < len(links) and integers.is_integer(part[-1])
        y = run(part, x, layers) if alone else None
        x = _part(part, x) if y is None else y
    return x


def _own(x: Any) -> Any:
    """Images that are a part of others, as `chunk` gives them, as a tensor of their own: calls of such are known."""
    if type(x) is not Tensor or x.dim() != 4 or x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def parts(links: tuple) -> Iterator[tuple]:
    """The links in runs that begin with a layer each, in the order in which they run; without those that do nothing."""
    links = (*(link for link in links[:-1] if convolutions.step_of(link)[0] != "nothing"), links[-1])
    end = len(links)
    for at in range(len(links) - 2, -1, -1):
        if isinstance(links[at], (nn.Conv2d, nn.Linear)):
            yield links[at + 1 : end]
            end = at + 1
    yield links[:end]


def _part(links: tuple, x: Any) -> Any:
    layer = links[-1]
    read = integers.reading(links, x) if integers.is_fused(layer) and not torch.compiler.is_compiling() else None
    pays = read is not None and integers.pays(read.problem, recorded=True)
    if pays and (y := integers.together(layer, read, x)) is not None:
        return apart(links[: read.rest], y)
    if isinstance(layer, nn.Linear):
        if linears.is_fused(layer) and rectified(links):
            x, links = linear(x, layer.weight, layer.bias, "relu"), links[:-2]
    elif torch.compiler.is_compiling() and getattr(type(layer), WHOLE, False):
        pass  # with what follows it, it becomes a call of the kernels (`torch_compile_integers.py`)
    elif convolutions.is_fused(layer) and not isinstance(read := convolutions.reading(links, x), str):
        x = convolutions.together(layer, read, x)
        links = links[: read.rest]
    return apart(links, x)


def apart(links: tuple, x: Any) -> Any:
    """Run the links as they were written."""
    for link in reversed(links):
        x = link[0](x, *link[1], **link[2]) if isinstance(link, tuple) else link(x)
    return x


def rectified(links: tuple) -> bool:
    """Whether a run begins with a linear layer and a ReLU, and nobody sees what is between them."""
    return len(links) > 1 and convolutions.step_of(links[-2])[0] == "relu" and not convolutions.seen(links[-1])


def layers(links: tuple, x: Tensor) -> tuple[Layers | None, Any]:
    """Run the links on `x`, a plain tensor, and tell what layers they are; None where some of it is no kernel's."""
    found: Layers | None = []
    for part in parts(links):
        if found is not None:
            problem = _problem(part, x)
            found = None if problem is None else [*found, (part[-1], problem)]
        x = _part(part, x)
    return found, x


def _problem(links: tuple, x: Tensor) -> Any:
    """What a layer and all that follows it compute of x in a kernel; None where they do not."""
    layer = links[-1]
    if isinstance(layer, nn.RNNBase):
        return recurrent.last_problem(links, x)
    if integers.is_integer(layer):
        return integer_problem(links, x)
    if isinstance(layer, nn.Linear):
        rest = len(links) - 1 - rectified(links)
        problem = linear_problem(links, x) if linears.is_fused(layer) else None
    else:
        read = convolutions.reading(links, x) if convolutions.is_fused(layer) else ""
        if isinstance(read, str) or read.norm is not None or read.rounds is not None:
            return None
        rest, given = read.rest, options(*convolutions.options_of(layer, read))
        tensors = lowered("cpu", x, layer.weight, layer.bias)
        problem, choice = picked(*tensors, given, False, None, recorded=False)
        problem = None if choice.implementation != "cpu" or problem.channels_last else problem
    return problem if all(convolutions.step_of(link)[0] == "rows" for link in links[:rest]) else None


def integer_problem(links: tuple, x: Tensor) -> Any:
    """The same of a layer on integers."""
    read = integers.reading(links, x) if integers.is_fused(links[-1]) else None
    if read is None or (read.rounds is not None and read.rounds(x) is not x):
        return None
    if not integers.pays(read.problem) and read.problem.work > LEAST_WORK:
        return None
    if integers.packed(links[-1], read.problem) is None:
        return None
    rest = links[: read.rest]
    return read.problem if all(convolutions.step_of(link)[0] == "rows" for link in rest) else None


def linear_problem(links: tuple, x: Tensor) -> Problem | None:
    """What a linear layer, and a ReLU behind it, compute in the kernel: where it pays, or is too little to matter."""
    layer = links[-1]
    dtypes = {each.dtype for each in lowered("cpu", x, layer.weight, layer.bias) if each is not None}
    if len(dtypes) > 1 or not x.is_cpu or x.dim() == 0 or x.size(-1) != layer.weight.size(1):
        return None
    dtype, activation = str(*dtypes).removeprefix("torch."), "relu" if rectified(links) else None
    made = Problem("cpu", dtype, prod(x.shape[:-1]), layer.weight.size(1), layer.weight.size(0), activation)
    if linear_op.OP.named(made, "cpu").why_not(made):
        return None
    little = made.work <= LEAST_WORK and has("avx512f")  # without, it was not measured
    return made if little or linear_op.OP.choose(made, recorded=False).implementation == "cpu" else None
