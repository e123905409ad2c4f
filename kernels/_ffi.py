"""C++ kernels as custom calls of XLA's, for JAX on CPU: built as `_native.py` builds all of them, registered once.

A source of this kind includes "xla/ffi/api/ffi.h" and defines its handlers with XLA_FFI_DEFINE_HANDLER_SYMBOL; XLA
calls them from compiled programs, on a thread of its own and without Python's lock.
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


def register(source: Path, handlers: tuple[str, ...], flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """Build `source` if that was not done on this machine yet, and make `handlers` known to XLA.

    Args:
        source: a C++ file; see `_native.load`.
        handlers: the symbols of its handlers, each a target of `jax.ffi.ffi_call` by the same name from now on.
        flags: for the compiler.

    Returns:
        The library, for what else there is in it.

    Raises:
        UnsupportedError: no C++ compiler, or it fails, or the result cannot be kept or loaded.

    Example:
        >>> register(Path("kernels/rnn/cpu_ffi.cpp"), ("perfkit_rnn_forward",))
        >>> jax.ffi.ffi_call("perfkit_rnn_forward", jax.ShapeDtypeStruct((3, 2), jnp.float32))(x, steps=3)

    Source: https://docs.jax.dev/en/latest/ffi.html
    """
    with _lock:  # XLA refuses a name that comes twice from different places
        return _register(source, handlers, flags)


@functools.cache
def _register(source: Path, handlers: tuple[str, ...], flags: tuple[str, ...]) -> ctypes.CDLL:
    # The version is part of what a built kernel is kept under: another jaxlib in the same folder has other headers.
    headers = (f"-isystem{jax.ffi.include_dir()}", f'-DPERFKIT_JAXLIB="{jaxlib.__version__}"')
    library = _native.load(source, (*flags, *headers))
    for handler in handlers:
        jax.ffi.register_ffi_target(handler, jax.ffi.pycapsule(getattr(library, handler)), platform="cpu")
    return library
