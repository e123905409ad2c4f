"""The int8 recurrent kernel on every instruction path; what the processor lacks is replaced by what its manual says."""

import ctypes
import platform
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("torch")

from byte_instructions import HEADERS, VARIANTS
from instruction_paths import QUICKLY_BUILT
from rnn_int8_calls import MODES, assert_is_the_reference

from perfkit.kernels import _native
from perfkit.kernels.rnn_int8 import torch_op
from perfkit.measure._hardware import cpu

if _native.find_compiler() is None:
    pytest.skip("no C++ compiler is installed", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.skipif("avx2" not in cpu()[1], reason="a CPU without AVX2")
@pytest.mark.parametrize("name", VARIANTS)
def test_every_instruction_set_gives_the_same_bits(name, tmp_path, monkeypatch):
    """Each path of the kernel as it stands, VNNI's one instruction replaced by what its manual says that it does; plain
    C++ without the processor's fused products and sums, too."""
    source = tmp_path / "variant" / "cpu_kernel.cpp"
    source.parent.mkdir()
    source.write_text(f'{VARIANTS[name]}\n#include "{torch_op.SOURCE}"\n')
    library = _native.load(source, (*QUICKLY_BUILT, HEADERS))
    library.perfkit_rnn_int8_instructions.restype = ctypes.c_char_p
    # Activations are signed: there is nothing that I8MM would add.
    built_for = library.perfkit_rnn_int8_instructions().decode()
    assert built_for == (name if name != "NEON-I8MM" else "NEON-DOTPROD")
    monkeypatch.setattr(torch_op, "library", lambda: library)
    for mode in MODES:
        for sizes in [(10, 50, 3, 5), (33, 130, 7, 3), (1, 1, 1, 1), (20, 70, 11, 3)]:
            assert_is_the_reference(mode, *sizes)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86 instructions")
@pytest.mark.parametrize("flags", [("-mavx512f", "-mavx512vnni"), ("-mavx2", "-mavxvnni")], ids=" ".join)
def test_the_vnni_paths_compile_to_their_instruction(flags, tmp_path):
    command = (*_native.find_compiler(), "-std=c++17", "-O0", "-ffp-contract=off", "-Wno-psabi", *flags)
    command += (f"-I{_native.HEADERS}", "-S", str(torch_op.SOURCE), "-o", str(tmp_path / "kernel.s"))
    done = subprocess.run(command, capture_output=True, text=True)
    if "unrecognized" in done.stderr or "unknown argument" in done.stderr:
        pytest.skip(f"the compiler is too old for {flags[-1]}")
    assert done.returncode == 0, done.stderr
    assert "vpdpbusd" in (tmp_path / "kernel.s").read_text()


def test_the_kernel_says_what_it_runs_on():
    assert torch_op.instructions() in VARIANTS
    assert Path(torch_op.SOURCE).exists()
