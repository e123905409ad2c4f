"""C++ kernels as custom calls of XLA's, for JAX on CPU: built as `_native.py` builds all of them, registered once.

A source of this kind includes "xla/ffi/api/ffi.h" and defines its handlers with XLA_FFI_DEFINE_HANDLER_SYMBOL; XLA
calls them from compiled programs, on a thread of its own and without Python's lock.

Kernels that take long to build are libraries of their own, the same for both frameworks: what binds one to XLA is given
the addresses of its functions.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from pathlib import Path

import jax.ffi
import jaxlib

from perfkit.kernels import _native

_lock = threading.Lock()


def register(
    source: Path, handlers: tuple[str, ...], kernel: ctypes.CDLL | None = None, functions: tuple[str, ...] = ()
) -> None:
    """Build `source` if that was not done on this machine yet, and make `handlers` known to XLA.

    Args:
        source: a C++ file; see `_native.load`.
        handlers: the symbols of its handlers, each a target of `jax.ffi.ffi_call` by the same name from now on.
        kernel: the library that they call, None where all is in `source`.
        functions: those of it that they call: `perfkit_use` of `source` is told their addresses.

    Raises:
        UnsupportedError: no C++ compiler, or it fails, or the result cannot be kept or loaded.

    Example:
        >>> register(Path("kernels/rounding/cpu_ffi.cpp"), ("perfkit_rounding_xla",))
        >>> jax.ffi.ffi_call("perfkit_rounding_xla", jax.ShapeDtypeStruct((3, 2), jnp.bfloat16))(x, threads=1)

    Source: https://docs.jax.dev/en/latest/ffi.html
    """
    with _lock:  # XLA refuses a name that comes twice from different places
        _register(source, handlers, kernel, functions)


@functools.cache
def _register(source: Path, handlers: tuple[str, ...], kernel: ctypes.CDLL | None, functions: tuple[str, ...]) -> None:
    # The version is part of what a built kernel is kept under: another jaxlib in the same folder has other headers.
    library = _native.load(source, (f"-isystem{jax.ffi.include_dir()}", f'-DPERFKIT_JAXLIB="{jaxlib.__version__}"'))
    if kernel is not None:
        library.perfkit_use(*(ctypes.cast(getattr(kernel, function), ctypes.c_void_p) for function in functions))
    for handler in handlers:
        jax.ffi.register_ffi_target(handler, jax.ffi.pycapsule(getattr(library, handler)), platform="cpu")
