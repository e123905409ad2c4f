"""CPU kernels built for other instructions than this processor's."""

import contextlib
import ctypes
import platform
from pathlib import Path
from types import ModuleType

import pytest

from perfkit.kernels import _native
from perfkit.measure._hardware import cpu

X86 = platform.machine() in ("x86_64", "AMD64")
EMULATED = f'#include "{Path(__file__).with_name("emulated_instructions.hpp")}"'
"""What comes before a kernel for AVX512-BF16 and AMX, whatever the processor has."""
QUICKLY_BUILT = ("-O1",)
"""What is written for other instructions is tested; what compilers make of it at -O3, with this processor's own."""


def built(kernel: ModuleType, folder: Path, before: str = "", flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """A kernel's library as it is for other instructions.

    Args:
        kernel: an op's `cpu_kernel`.
        folder: for the source that is put together.
        before: what that begins with.
        flags: for the compiler, beside the kernel's own.
    """
    return _native.load(_source(kernel, folder, before), (*kernel.FLAGS, *QUICKLY_BUILT, *flags))


@contextlib.contextmanager
def in_place(kernel: ModuleType, folder: Path, before: str = "", flags: tuple[str, ...] = ()):
    """Within it the op runs on such a library."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "SOURCE", _source(kernel, folder, before))
        patch.setattr(kernel, "FLAGS", (*kernel.FLAGS, *QUICKLY_BUILT, *flags))
        _forget(kernel)
        yield
    _forget(kernel)


def need(feature: str) -> None:
    """Skip the test where the processor has not what its kernel is built for all the same; "" is any of x86."""
    if not X86 or (feature and feature not in cpu()[1]):
        pytest.skip(f"a CPU without {feature or 'x86 instructions'}")


def _source(kernel: ModuleType, folder: Path, before: str) -> Path:
    source = folder / "variant" / "cpu_kernel.cpp"
    source.parent.mkdir(exist_ok=True)
    source.write_text(f'{before}\n#include "{kernel.SOURCE}"\n')
    return source


def _forget(kernel: ModuleType) -> None:
    for cached in (kernel.library, kernel.caller):
        cached.cache_clear()
