"""What the machine is made of, as the operating system tells it. Readers take the path of what they read."""

from __future__ import annotations

import functools
import math
import os
import platform
import subprocess
from pathlib import Path

from perfkit._quantity import Quantity

# As Linux names them in /proc/cpuinfo, "neon" apart.
X86_INSTRUCTIONS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512_bf16",
    "avx512_fp16",
    "avx512_vnni",
    "avx_vnni",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "amx_fp16",
)
ARM_INSTRUCTIONS = ("neon", "fphp", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2", "sme")
INSTRUCTIONS = X86_INSTRUCTIONS + ARM_INSTRUCTIONS

_APPLE = {
    "hw.optional.AdvSIMD": "neon",
    "hw.optional.arm.FEAT_FP16": "fphp",
    "hw.optional.arm.FEAT_DotProd": "asimddp",
    "hw.optional.arm.FEAT_BF16": "bf16",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.arm.FEAT_SME": "sme",
    "hw.optional.avx2_0": "avx2",
    "hw.optional.avx512f": "avx512f",
}
# ARM's processors have no name in /proc/cpuinfo: (implementer, part).
_ARM_PARTS = {
    ("0x41", "0xd08"): "Cortex-A72",
    ("0x41", "0xd0b"): "Cortex-A76",
    ("0x41", "0xd0c"): "Neoverse-N1",
    ("0x41", "0xd40"): "Neoverse-V1",
    ("0x41", "0xd49"): "Neoverse-N2",
    ("0x41", "0xd4f"): "Neoverse-V2",
    ("0x41", "0xd84"): "Neoverse-V3",
    ("0x61", "0x022"): "Apple M1",
    ("0x61", "0x023"): "Apple M1",
    ("0x61", "0x032"): "Apple M2",
    ("0x61", "0x033"): "Apple M2",
}


@functools.cache
def cpu(cpuinfo: str = "/proc/cpuinfo") -> tuple[str, tuple[str, ...]]:
    """The processor's name, and which of `INSTRUCTIONS` it has.

    A virtual machine may hide the number in the name: family and model then tell processors of one name apart.
    """
    fields: dict[str, str] = {}
    try:
        for line in Path(cpuinfo).read_text().splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip().lower(), value.strip())
    except OSError:
        return _apple_cpu() if platform.system() == "Darwin" else (platform.processor() or platform.machine(), ())
    flags = set((fields.get("flags") or fields.get("features") or "").split())
    if "asimd" in flags:
        flags.add("neon")
    name = fields.get("model name")
    if name and not any(map(str.isdigit, name)) and {"cpu family", "model"} <= fields.keys():
        name += f" family {fields['cpu family']} model {fields['model']}"
    if not name and "cpu part" in fields:
        part = fields.get("cpu implementer", ""), fields["cpu part"]
        name = _ARM_PARTS.get(part, "ARM implementer {} part {}".format(*part))
    return name or platform.machine(), tuple(item for item in INSTRUCTIONS if item in flags)


def _apple_cpu() -> tuple[str, tuple[str, ...]]:
    names = ["machdep.cpu.brand_string", *_APPLE]
    found = {}
    for name in names:
        line = first_line(["sysctl", "-n", name])
        if line is not None:
            found[name] = line
    has = {instruction for name, instruction in _APPLE.items() if found.get(name) == "1"}
    return found.get(names[0], platform.machine()), tuple(item for item in INSTRUCTIONS if item in has)


def memory_bytes() -> Quantity:
    """The machine's memory; a container may be allowed less."""
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError) as error:
        return Quantity.missing("B", f"this platform does not tell its memory: {error}")
    return Quantity(float(size), "B", method="physical pages (sysconf)")


def usable_cores() -> int:
    """Processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def quota_cores(cgroups: str | Path = "/sys/fs/cgroup", own: str | Path = "/proc/self/cgroup") -> int | None:
    """Whole processors that the container's CPU quota amounts to, rounded up; None where there is no quota."""
    try:
        lines = Path(own).read_text().splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        number, controllers, group = line.split(":", 2)
        if number != "0" and "cpu" not in controllers.split(","):
            continue
        root = Path(cgroups) if number == "0" else Path(cgroups, "cpu")
        # The tightest quota up the tree holds. Inside a container, its own group is mounted as the root.
        parts = Path(group).parts[1:]
        folders = [root.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]
        quotas += [quota for folder in folders if (quota := _quota(folder)) is not None]
    return max(1, math.ceil(min(quotas))) if quotas else None


def _quota(folder: Path) -> float | None:
    """Processors' worth of time that a cgroup (version 2 or 1) may use; None for no limit."""
    try:
        if (folder / "cpu.max").exists():
            limit, period = (folder / "cpu.max").read_text().split()
        else:
            limit, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    except (OSError, ValueError):
        return None
    return None if limit in ("max", "-1") else int(limit) / int(period)


@functools.cache
def accelerators() -> tuple[tuple[str, ...], str]:
    """The GPUs that NVML tells of, one line each; and why there are none, empty where there are."""
    try:
        import pynvml
    except ImportError:
        return (), "GPUs are not looked for: pip install nvidia-ml-py"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return (), f"NVML does not start: {error}"
    try:
        count = pynvml.nvmlDeviceGetCount()
        return tuple(_gpu(pynvml, index) for index in range(count)), "" if count else "NVML finds no GPU"
    except pynvml.NVMLError as error:
        return (), f"NVML does not tell of GPUs: {error}"
    finally:
        pynvml.nvmlShutdown()


def _gpu(nvml, index: int) -> str:
    """One GPU; what it does not tell is said in its place."""

    def ask(label: str, question, shown=str) -> str:
        try:
            return shown(question())
        except nvml.NVMLError as error:
            return f"{label}: {error}"

    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
    except nvml.NVMLError as error:
        return f"GPU {index}: {error}"
    switch = ("off", "on")
    return ", ".join(
        [
            ask("name", lambda: nvml.nvmlDeviceGetName(handle)),
            ask("memory", lambda: nvml.nvmlDeviceGetMemoryInfo(handle).total, lambda size: f"{size / 2**30:.0f} GiB"),
            ask(
                "compute capability",
                lambda: nvml.nvmlDeviceGetCudaComputeCapability(handle),
                lambda pair: "compute capability {}.{}".format(*pair),
            ),
            ask("driver", nvml.nvmlSystemGetDriverVersion, lambda version: f"driver {version}"),
            ask(
                "power limit",
                lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle),
                lambda milliwatts: f"power limit {milliwatts / 1e3:.0f} W",
            ),
            ask("ECC", lambda: nvml.nvmlDeviceGetEccMode(handle)[0], lambda mode: f"ECC {switch[bool(mode)]}"),
            ask("MIG", lambda: nvml.nvmlDeviceGetMigMode(handle)[0], lambda mode: f"MIG {switch[bool(mode)]}"),
        ]
    )


def first_line(command: list[str], containing: str = "") -> str | None:
    """The first line with `containing` in it that a command prints; None where it is not there, fails or has none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next((line.strip() for line in done.stdout.splitlines() if containing in line), None)
