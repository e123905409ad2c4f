"""Processors and accelerators, from fake /proc files and a fake NVML."""

import os
import re
import sys
import types

import pytest

from perfkit.measure import _hardware
from perfkit.measure.environment import environment

pytestmark = pytest.mark.usefixtures("nothing_remembered")

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


def test_an_apple_processor_under_linux(tmp_path):
    """Its cores are of two kinds, of which the slower ones come first."""
    text = GRAVITON.replace("0x41", "0x61").replace(" sve bf16 i8mm", "")
    cores = (text.replace("0xd40", part) for part in ("0x022", "0x023"))
    name, instructions = _hardware.cpu(write(tmp_path / "cpuinfo", "\n\n".join(cores)))
    assert name == "Apple M1"
    assert instructions == ("neon", "fphp", "asimdhp", "asimddp")


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
