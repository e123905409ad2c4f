"""What torch has no plan for: convolutions in parts, and the same random numbers in all processes."""

from __future__ import annotations

from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from perfkit.backends.torch_surgery import around_call, derive


class ChannelParallel(ParallelStyle):
    """A convolution by its output channels: each process computes some, and they are gathered."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, held in list(module.named_parameters(recurse=False)):
            spread = distribute_tensor(held, device_mesh, [Shard(0)], src_data_rank=self.src_data_rank)
            module.register_parameter(name, nn.Parameter(spread, requires_grad=held.requires_grad))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            # Each process computes a part of the input's gradient: they are added up.
            whole = DTensor.from_local(x, device_mesh, [Replicate()], run_check=False)
            x = whole.to_local(grad_placements=[Partial()])
            bias = None if self.bias is None else self.bias.to_local()
            y = self._conv_forward(x, self.weight.to_local(), bias)
            channels = Shard(y.dim() - len(self.kernel_size) - 1)
            y = DTensor.from_local(y, device_mesh, [channels], run_check=False)
            return y.redistribute(placements=[Replicate()]).to_local()

        derive(module, forward=forward)
        return module


def drop_alike(dropout: nn.Module, mesh: DeviceMesh) -> None:
    """A dropout between two halves of a pair draws for the whole, and keeps its part."""
    base = type(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not (isinstance(x, DTensor) and self.training):
            return base.forward(self, x)
        drawn = F.dropout(torch.ones(x.shape, dtype=x.dtype, device=x.device), self.p, training=True)
        return x * distribute_tensor(drawn, mesh, x.placements, src_data_rank=None)

    derive(dropout, forward=forward)


def draw_alike(model: nn.Module, mesh: DeviceMesh, device: str) -> None:
    """Every call begins with the random state of the group's rank 0: what is not split is the same everywhere."""
    group = mesh.get_group()
    first = dist.get_global_rank(group, 0)

    @contextmanager
    def together():
        state = random_state(device).to(device)
        dist.broadcast(state, first, group=group)
        _set_random_state(device, state.cpu())
        yield

    around_call(model, together)


def random_state(device: str) -> torch.Tensor:
    """That of the CPU, and behind it that of the accelerator."""
    state = torch.get_rng_state()
    return torch.cat([state, torch.cuda.get_rng_state()]) if device == "cuda" else state


def _set_random_state(device: str, state: torch.Tensor) -> None:
    own = torch.get_rng_state().numel()
    torch.set_rng_state(state[:own])
    if device == "cuda":
        torch.cuda.set_rng_state(state[own:])
