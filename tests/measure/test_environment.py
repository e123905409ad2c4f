"""The description of the machine, and what its fingerprint depends on."""

import subprocess
import sys
import types

import pytest

from perfkit._environment import Environment
from perfkit._errors import InvalidInputError
from perfkit.measure import _hardware
from perfkit.measure import environment as module
from perfkit.measure.environment import compilers, environment, has

pytestmark = pytest.mark.usefixtures("nothing_remembered")


def fixed_cpu():
    return "a processor", ("avx2",)


fixed_cpu.cache_clear = lambda: None


def test_has_answers_for_known_names_and_refuses_others(monkeypatch):
    monkeypatch.setattr(_hardware, "cpu", fixed_cpu)
    assert has("avx2")
    assert not has("amx_bf16")
    with pytest.raises(InvalidInputError, match=r"no instruction set 'avx512_bf61'; did you mean 'avx512_bf16'"):
        has("avx512_bf61")


# The fingerprint


def fingerprint(monkeypatch=None, **variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return environment().fingerprint


def test_environment_is_whole_and_repeats_itself():
    found = environment()
    assert isinstance(found, Environment)
    assert found == environment()
    assert len(found.fingerprint) == 12
    assert found.libraries["numpy"]
    assert found.memory_bytes.value > 2**28
    assert found.threads["usable cores"] == found.cores >= 1
    assert found.python == ".".join(map(str, sys.version_info[:3]))


@pytest.mark.parametrize(
    "name", ["OMP_NUM_THREADS", "XLA_FLAGS", "JAX_ENABLE_X64", "CUDA_VISIBLE_DEVICES", "KMP_BLOCKTIME"]
)
def test_settings_that_change_speed_change_the_fingerprint(monkeypatch, name):
    monkeypatch.delenv(name, raising=False)
    plain = fingerprint()
    assert fingerprint(monkeypatch, **{name: "3"}) != plain
    assert environment().settings[name] == "3"


def test_settings_that_do_not_change_speed_do_not(monkeypatch):
    plain = fingerprint()
    assert fingerprint(monkeypatch, TORCHINDUCTOR_CACHE_DIR="/somewhere", HOME="/elsewhere") == plain
    assert environment().settings["TORCHINDUCTOR_CACHE_DIR"] == "/somewhere"
    assert "HOME" not in environment().settings


def test_another_processor_or_library_has_another_fingerprint(monkeypatch):
    plain = fingerprint()
    monkeypatch.setattr(_hardware, "cpu", fixed_cpu)
    other = fingerprint()
    assert other != plain
    found = module._libraries()
    monkeypatch.setitem(found, "torch", "1.0")
    assert fingerprint() != other


def fake_torch(monkeypatch, threads):
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(get_num_threads=lambda: threads))


def test_torch_counts_once_it_was_told_to_use_other_threads_than_its_own(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    plain = environment()
    assert "torch" not in plain.threads
    fake_torch(monkeypatch, plain.cores)
    assert environment().threads["torch"] == plain.cores
    assert environment().fingerprint == plain.fingerprint
    fake_torch(monkeypatch, plain.cores + 1)
    assert environment().fingerprint != plain.fingerprint


def test_thread_settings_are_numbers(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("MKL_NUM_THREADS", "4,2")
    threads = environment().threads
    assert threads["OMP_NUM_THREADS"] == 3
    assert "MKL_NUM_THREADS" not in threads


@pytest.mark.parametrize(
    ("usable", "quota", "asked", "cores", "threads"),
    [
        (8, None, None, 8, 8),
        (8, 2, None, 2, 2),
        (8, 16, "4", 8, 4),
        (8, None, "64", 8, 8),
        (8, None, "4,2", 8, 8),
        (8, None, "0", 8, 1),
    ],
)
def test_threads_stay_within_cores_quota_and_what_is_asked(monkeypatch, usable, quota, asked, cores, threads):
    monkeypatch.setattr(_hardware, "usable_cores", lambda: usable)
    monkeypatch.setattr(module, "_quota_cores", lambda: quota)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert (module.cores_allowed(), module.threads_allowed()) == (cores, threads)


# Compilers


def test_compilers_are_all_named_and_those_that_are_not_there_are_none(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert compilers() == dict.fromkeys(("c++", "g++", "clang++", "nvcc", "ptxas"))


def test_versions_of_compilers(monkeypatch, tmp_path):
    for name, lines in (("g++", "g++ 12.2.0\nCopyright"), ("nvcc", "nvcc: NVIDIA\ntools, release 13.0, V13.0.88")):
        (tmp_path / name).write_text(f"#!/bin/sh\ncat <<'END'\n{lines}\nEND\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "ptxas").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "ptxas").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    found = compilers()
    assert found["g++"] == "g++ 12.2.0"
    assert found["nvcc"] == "tools, release 13.0, V13.0.88"
    assert found["ptxas"] is None


# Imports


def unwanted_imports(extra=""):
    """What is loaded after all of perfkit.measure was used, and should not be."""
    program = f"""
import importlib, sys
for name in "statistics timing memory fidelity environment".split():
    importlib.import_module("perfkit.measure." + name)
sys.modules["perfkit.measure.environment"].environment()
{extra}
print(*sorted({{"torch", "jax", "flax", "scipy", "psutil"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_measuring_imports_no_framework_and_nothing_perfkit_does_not_depend_on():
    assert unwanted_imports() == []


def test_that_would_be_noticed():
    assert unwanted_imports("sys.modules['torch'] = sys") == ["torch"]
