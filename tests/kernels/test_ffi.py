"""C++ as a custom call of XLA's: built once, registered once, called from compiled programs."""

import threading

import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp

from perfkit import UnsupportedError
from perfkit.kernels import _ffi, _native

if _native.find_compiler() is None:
    pytest.skip("no C++ compiler is installed", allow_module_level=True)

SOURCE = """
#include "xla/ffi/api/ffi.h"
namespace ffi = xla::ffi;
static ffi::Error add(std::int64_t number, ffi::Buffer<ffi::F32> x, ffi::ResultBuffer<ffi::F32> y) {
    if (number < 0) return ffi::Error::InvalidArgument("a negative number");
    for (std::size_t i = 0; i < x.element_count(); ++i) y->typed_data()[i] = x.typed_data()[i] + number;
    return ffi::Error::Success();
}
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    perfkit_test_add, add,
    ffi::Ffi::Bind().Attr<std::int64_t>("number").Arg<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::F32>>());
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("adding") / "cpu_ffi.cpp"
    path.write_text(SOURCE)
    return path


def add(x, number):
    return jax.ffi.ffi_call("perfkit_test_add", jax.ShapeDtypeStruct(x.shape, x.dtype))(x, number=number)


def test_a_handler_runs_inside_jit(source):
    """Registered by several threads at once, as happens where several trace."""
    errors = []

    def register():
        try:
            _ffi.register(source, ("perfkit_test_add",))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=register) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    x = jnp.arange(3, dtype=jnp.float32)
    assert (jax.jit(lambda x: add(2 * x, 5))(x) == 2 * x + 5).all()
    with pytest.raises(jax.errors.JaxRuntimeError, match="a negative number"):
        add(x, -1).block_until_ready()


CALLING = """
#include "xla/ffi/api/ffi.h"
namespace ffi = xla::ffi;
static float (*run)(float);
extern "C" void perfkit_use(void* kernel) { run = reinterpret_cast<decltype(run)>(kernel); }
static ffi::Error call(ffi::Buffer<ffi::F32> x, ffi::ResultBuffer<ffi::F32> y) {
    *y->typed_data() = run(*x.typed_data());
    return ffi::Error::Success();
}
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    perfkit_test_call, call, ffi::Ffi::Bind().Arg<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::F32>>());
"""


def test_a_handler_calls_the_kernel_of_another_library(tmp_path):
    (tmp_path / "cpu_kernel.cpp").write_text('extern "C" float perfkit_test_twice(float x) { return 2 * x; }\n')
    (tmp_path / "cpu_ffi.cpp").write_text(CALLING)
    kernel = _native.load(tmp_path / "cpu_kernel.cpp")
    for _ in range(2):  # as each trace of a call does
        _ffi.register(tmp_path / "cpu_ffi.cpp", ("perfkit_test_call",), kernel, ("perfkit_test_twice",))
    y = jax.jit(jax.ffi.ffi_call("perfkit_test_call", jax.ShapeDtypeStruct((), jnp.float32)))(jnp.float32(1.5))
    assert y == 3


def test_what_the_compiler_says_is_told(tmp_path):
    path = tmp_path / "cpu_ffi.cpp"
    path.write_text("int answer( { }\n")
    with pytest.raises(UnsupportedError, match=r"cannot build cpu_ffi\.cpp"):
        _ffi.register(path, ("answer",))
