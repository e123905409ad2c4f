"""The description of the machine: fake /proc files, fake NVML, and what the fingerprint depends on."""

import os
import re
import subprocess
import sys
import types

import pytest

from perfkit._environment import Environment
from perfkit._errors import InvalidInputError
from perfkit.measure import _hardware
from perfkit.measure import environment as module
from perfkit.measure.environment import compilers, environment, has

SAPPHIRE_RAPIDS = """\
processor	: 0
model name	: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz
flags		: fpu sse2 avx2 fma f16c avx512f avx512_vnni avx512_bf16 avx512_fp16 avx_vnni amx_bf16 amx_tile amx_int8

processor	: 1
model name	: another
flags		: fpu
"""

GRAVITON = """\
processor	: 0
BogoMIPS	: 2100.00
Features	: fp asimd crc32 fphp asimdhp asimddp sve bf16 i8mm
CPU implementer	: 0x41
CPU part	: 0xd40
"""


@pytest.fixture(autouse=True)
def nothing_remembered():
    """What is looked up once per process is looked up again in each test, and forgotten after it."""
    cached = (_hardware.cpu, _hardware.accelerators, module._quota_cores, module._libraries, module._version)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


# The processor


def test_an_intel_processor(tmp_path):
    name, instructions = _hardware.cpu(write(tmp_path / "cpuinfo", SAPPHIRE_RAPIDS))
    assert name == "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz"
    assert set(instructions) == {
        "avx2",
        "fma",
        "f16c",
        "avx512f",
        "avx512_vnni",
        "avx512_bf16",
        "avx512_fp16",
        "avx_vnni",
        "amx_bf16",
        "amx_tile",
        "amx_int8",
    }


def test_an_arm_processor(tmp_path):
    name, instructions = _hardware.cpu(write(tmp_path / "cpuinfo", GRAVITON))
    assert name == "Neoverse-V1"
    assert instructions == ("neon", "fphp", "asimdhp", "asimddp", "bf16", "i8mm", "sve")


def test_processors_of_one_name_are_told_apart(tmp_path):
    hidden = re.sub("model name.*", "cpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC", SAPPHIRE_RAPIDS)
    name, _ = _hardware.cpu(write(tmp_path / "cpuinfo", hidden))
    assert name == "AMD EPYC family 26 model 2"


def test_an_arm_processor_without_a_known_name(tmp_path):
    name, _ = _hardware.cpu(write(tmp_path / "cpuinfo", GRAVITON.replace("0xd40", "0xfff")))
    assert name == "ARM implementer 0x41 part 0xfff"


def test_a_mac(tmp_path, monkeypatch):
    answers = {"machdep.cpu.brand_string": "Apple M2", "hw.optional.AdvSIMD": "1", "hw.optional.arm.FEAT_BF16": "1"}
    monkeypatch.setattr(_hardware.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(_hardware, "first_line", lambda command: answers.get(command[-1]))
    assert _hardware.cpu(str(tmp_path / "none")) == ("Apple M2", ("neon", "bf16"))


def test_a_platform_that_tells_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(_hardware.platform, "system", lambda: "Windows")
    name, instructions = _hardware.cpu(str(tmp_path / "none"))
    assert name
    assert instructions == ()


def test_has_answers_for_known_names_and_refuses_others(monkeypatch):
    monkeypatch.setattr(_hardware, "cpu", fixed_cpu)
    assert has("avx2")
    assert not has("amx_bf16")
    with pytest.raises(InvalidInputError, match=r"no instruction set 'avx512_bf61'; did you mean 'avx512_bf16'"):
        has("avx512_bf61")


def fixed_cpu():
    return "a processor", ("avx2",)


fixed_cpu.cache_clear = lambda: None

# The share of it that this process may use


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "150000 100000"}, 2),
        ("0::/\n", {"cpu.max": "max 100000"}, None),
        ("0::/\n", {}, None),
        ("0::/a/b\n", {"cpu.max": "max 100000", "a/cpu.max": "100000 100000", "a/b/cpu.max": "800000 100000"}, 1),
        ("4:cpu,cpuacct:/a\n0::/\n", {"cpu/a/cpu.cfs_quota_us": "400000", "cpu/a/cpu.cfs_period_us": "100000"}, 4),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ("4:cpuset:/\n", {"cpuset/cpu.cfs_quota_us": "100000", "cpuset/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_cpu_quota_of_the_container(tmp_path, own, files, cores):
    for name, text in files.items():
        write(tmp_path / "cgroup" / name, text)
    assert _hardware.quota_cores(tmp_path / "cgroup", write(tmp_path / "own", own)) == cores


def test_no_quota_where_there_are_no_control_groups(tmp_path):
    assert _hardware.quota_cores(tmp_path, tmp_path / "none") is None


def test_cores_are_those_that_the_process_may_run_on(monkeypatch):
    monkeypatch.setattr(_hardware.os, "sched_getaffinity", lambda _: {0, 3, 5}, raising=False)
    assert environment().cores == 3
    monkeypatch.delattr(_hardware.os, "sched_getaffinity")
    assert environment().cores == os.cpu_count()


# Accelerators


class FakeNvml(types.ModuleType):
    """One H100 whose power limit may not be read."""

    class NVMLError(Exception):
        pass

    def __init__(self, broken=()):
        super().__init__("pynvml")
        self.broken = broken
        self.running = False

    def __getattr__(self, name):
        answers = {
            "nvmlDeviceGetCount": 1,
            "nvmlDeviceGetHandleByIndex": "handle",
            "nvmlDeviceGetName": "NVIDIA H100",
            "nvmlDeviceGetMemoryInfo": types.SimpleNamespace(total=80 * 2**30),
            "nvmlDeviceGetCudaComputeCapability": (9, 0),
            "nvmlSystemGetDriverVersion": "580.1",
            "nvmlDeviceGetEnforcedPowerLimit": 700_000,
            "nvmlDeviceGetEccMode": (1, 1),
            "nvmlDeviceGetMigMode": (0, 0),
        }
        if name.startswith("__"):
            raise AttributeError(name)

        def answer(*_):
            if name in self.broken:
                raise self.NVMLError("Not Supported")
            if name in ("nvmlInit", "nvmlShutdown"):
                self.running = name == "nvmlInit"
                return None
            return answers[name]

        return answer


def test_a_gpu_is_described_and_what_it_does_not_tell_is_said(monkeypatch):
    nvml = FakeNvml(broken={"nvmlDeviceGetEnforcedPowerLimit"})
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    found = environment()
    assert found.accelerators == (
        "NVIDIA H100, 80 GiB, compute capability 9.0, driver 580.1, power limit: Not Supported, ECC on, MIG off",
    )
    assert "NVML" not in found.settings
    assert not nvml.running


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ("nvmlInit", "NVML does not start: Not Supported"),
        ("nvmlDeviceGetCount", "NVML does not tell of GPUs: Not Supported"),
    ],
)
def test_nvml_that_does_not_work_is_a_reason(monkeypatch, broken, told):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(broken={broken}))
    found = environment()
    assert found.accelerators == ()
    assert found.settings["NVML"] == told


def test_a_gpu_that_cannot_be_opened_is_one_with_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(broken={"nvmlDeviceGetHandleByIndex"}))
    assert environment().accelerators == ("GPU 0: Not Supported",)


def test_no_nvml_is_a_reason_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pip install nvidia-ml-py" in environment().settings["NVML"]


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
