"""The ceilings' products and stream in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from perfkit.measure.environment import environment
from perfkit.profiling.ceilings import Bench, Call, Unsupported, float16_missing, last_cache_bytes

INTEGER_CPU = ("avx512_vnni", "avx_vnni", "amx_int8", "i8mm")


def bench(device: str) -> Bench:
    return TorchBench(device)


class TorchBench(Bench):
    def __init__(self, device: str):
        self.device = device
        self.sizes = (256, 512, 1024) if device == "cpu" else (2048, 4096)

    def name(self) -> str:
        return torch.cuda.get_device_name() if self.device == "cuda" else self.device

    def cache_bytes(self) -> int:
        if self.device == "cuda":
            return torch.cuda.get_device_properties().L2_cache_size
        return last_cache_bytes() if self.device == "cpu" else 0

    def product(self, dtype: str, size: int) -> Call:
        if reason := self._refused(dtype):
            raise Unsupported(reason)
        a, b = (self._matrix(dtype, size) for _ in range(2))
        if dtype == "int8":
            return self._done(partial(torch._int_mm, a, b))
        return self._done(partial(torch.mm, a, b, out=torch.empty_like(a)))

    def _refused(self, dtype: str) -> str:
        instructions = environment().instruction_sets
        if self.device == "cpu" and dtype == "float16":
            return float16_missing(instructions)
        if self.device == "cpu" and dtype == "int8" and not set(instructions) & set(INTEGER_CPU):
            return "this processor has no 8-bit product instructions"
        return ""

    def _matrix(self, dtype: str, size: int) -> torch.Tensor:
        random = torch.Generator().manual_seed(0)
        if dtype == "int8":
            return torch.randint(-100, 100, (size, size), generator=random, dtype=torch.int8).to(self.device)
        return torch.randn(size, size, generator=random).to(self.device, getattr(torch, dtype))

    def triad(self, elements: int) -> Call:
        a, b, c = (torch.ones(elements, device=self.device) for _ in range(3))
        return self._done(lambda: torch.add(b, c, alpha=0.5, out=a))

    def _done(self, call: Callable[[], torch.Tensor]) -> Call:
        """The call, with no gradients, and over when it returns."""

        def done() -> None:
            with torch.no_grad():
                call()
            if self.device != "cpu":
                torch.accelerator.synchronize()

        try:
            done()
        except (RuntimeError, NotImplementedError) as error:
            raise Unsupported(f"torch cannot on this device: {str(error).splitlines()[0]}") from None
        return done
