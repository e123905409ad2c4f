"""The kernels for bytes on every instruction path; what the processor lacks is replaced by what its manual says."""

import platform
import subprocess

import pytest

pytest.importorskip("torch")

from byte_instructions import HEADERS, VARIANTS
from instruction_paths import QUICKLY_BUILT
from int8_calls import assert_convolution_is_the_reference, assert_linear_is_the_reference

from perfkit.kernels import _int8, _int8_torch, _native
from perfkit.kernels.conv2d_int8 import cpu_kernel as convolution
from perfkit.kernels.conv2d_int8.cases import CASES
from perfkit.kernels.linear_int8_static import cpu_kernel as linear
from perfkit.kernels.linear_int8_static.cases import CASES as LINEAR
from perfkit.measure._hardware import cpu

if _native.find_compiler() is None:
    pytest.skip("no C++ compiler is installed", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("seeded")
KERNELS = {"linear": (linear, "perfkit_linear_int8_static"), "conv2d": (convolution, "perfkit_conv2d_int8")}


@pytest.mark.skipif("avx2" not in cpu()[1], reason="a CPU without AVX2")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_instruction_set_gives_the_same_bits(name, kernel, tmp_path, monkeypatch):
    if name == "AVX512-VNNI" and "avx512f" not in cpu()[1]:
        pytest.skip("a CPU without AVX-512")
    module, prefix = KERNELS[kernel]
    source = tmp_path / "variant" / "cpu_kernel.cpp"
    source.parent.mkdir()
    source.write_text(f'{VARIANTS[name]}\n#include "{module.SOURCE}"\n')
    load = _native.load
    flags = *QUICKLY_BUILT, f"-I{module.SOURCE.parent}", HEADERS
    monkeypatch.setattr(_native, "load", lambda *_: load(source, flags))
    for cached in (module.library, module.caller):
        cached.cache_clear()
    monkeypatch.setattr(_int8_torch, "_packed", type(_int8_torch._packed)())
    monkeypatch.setattr(_int8, "has", lambda _: True)
    try:
        assert getattr(module.library(), f"{prefix}_instructions")().decode() == name
        top = 127 if name == "AVX2" else 255
        for sizes in LINEAR if kernel == "linear" else ():
            assert_linear_is_the_reference(*sizes, top=top)
        for case in CASES if kernel == "conv2d" else ():
            assert_convolution_is_the_reference(case, top)
    finally:
        for cached in (module.library, module.caller):
            cached.cache_clear()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86 instructions")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "flags", [("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni"), ("-mavx2", "-mavxvnni")], ids=" ".join
)
def test_the_vnni_paths_compile_to_their_instruction(flags, kernel, tmp_path):
    source, out = KERNELS[kernel][0].SOURCE, tmp_path / "kernel.s"
    command = (*_native.find_compiler(), "-std=c++17", "-O0", "-ffp-contract=off", "-Wno-psabi", *flags)
    command += (f"-I{_native.HEADERS}", "-S", str(source), "-o", str(out))
    done = subprocess.run(command, capture_output=True, text=True)
    if "unrecognized" in done.stderr or "unknown argument" in done.stderr:
        pytest.skip(f"the compiler is too old for {flags[-1]}")
    assert done.returncode == 0, done.stderr
    assert "vpdpbusd" in out.read_text()
