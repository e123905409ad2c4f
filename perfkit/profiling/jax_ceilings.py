"""The ceilings' products and stream in JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from perfkit.measure.environment import environment
from perfkit.profiling.ceilings import Bench, Call, Unsupported, float16_missing, last_cache_bytes


def bench(device: str) -> Bench:
    return JaxBench(device)


class JaxBench(Bench):
    def __init__(self, device: str):
        self.device = device
        self.sizes = (512, 1024) if device == "cpu" else (2048, 4096)

    def name(self) -> str:
        return jax.devices()[0].device_kind

    def cache_bytes(self) -> int:
        return last_cache_bytes() if self.device == "cpu" else 2**28

    def product(self, dtype: str, size: int) -> Call:
        if self.device == "cpu" and dtype == "int8":
            raise Unsupported("XLA has no kernels for integer products on a processor")
        if self.device == "cpu" and dtype == "float16" and (reason := float16_missing(environment().instruction_sets)):
            raise Unsupported(reason)
        a = jnp.linspace(-1, 1, size * size).reshape(size, size)
        a = (100 * a).astype(jnp.int8) if dtype == "int8" else a.astype(dtype)
        wanted = jnp.int32 if dtype == "int8" else None
        multiply = jax.jit(lambda a, b: jax.lax.dot(a, b, preferred_element_type=wanted))
        try:
            multiply(a, a).block_until_ready()
        except (RuntimeError, NotImplementedError) as error:
            raise Unsupported(f"XLA cannot on this device: {str(error).splitlines()[0]}") from None
        return lambda: multiply(a, a).block_until_ready()

    def triad(self, elements: int) -> Call:
        """b = s·b + c in place, by donating b: the bytes of a triad, and no new array at each call."""
        step = jax.jit(lambda b, c: 0.5 * b + c, donate_argnums=0)
        held = [jnp.ones(elements), jnp.ones(elements)]

        def call() -> None:
            held[0] = step(*held)
            held[0].block_until_ready()

        return call
