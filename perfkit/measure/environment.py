"""The machine and the libraries that a measurement was taken with. Imports neither torch nor jax to find out."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys

from perfkit._environment import Environment
from perfkit._errors import InvalidInputError, nearest
from perfkit.measure import _hardware

LIBRARIES = (
    "torch",
    "torchao",
    "triton",
    "jax",
    "jaxlib",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "libtpu",
    "flax",
    "optax",
    "numpy",
)
"""Those whose version changes how fast models run."""

SETTINGS = (
    "OMP_",
    "GOMP_",
    "KMP_",
    "MKL_",
    "ONEDNN_",
    "DNNL_",
    "OPENBLAS_",
    "ATEN_",
    "TORCH_",
    "TORCHINDUCTOR_",
    "PYTORCH_",
    "CUBLAS_",
    "CUDA_",
    "CUDNN_",
    "NVIDIA_TF32_OVERRIDE",
    "TRITON_",
    "XLA_",
    "JAX_",
    "TF_XLA_",
    "MALLOC_",
    "GLIBC_TUNABLES",
    "LD_PRELOAD",
)
"""Beginnings of the names of environment variables that change speed."""

PLACES = ("_DIR", "_PATH", "_HOME", "_ROOT", "_FILE")
"""Ends of the names that only say where something lies: shown, but no part of the fingerprint."""


def environment() -> Environment:
    """Describe the machine, the libraries and the settings that timings depend on.

    What cannot change while the process runs is looked up once. `accelerators` are the GPUs that NVML tells of; where
    there are none, `settings["NVML"]` says why.

    Example:
        >>> environment().cores
        2
    """
    cpu, instructions = _hardware.cpu()
    accelerators, no_accelerators = _hardware.accelerators()
    settings = {name: value for name, value in os.environ.items() if name.startswith(SETTINGS)}
    threads = _threads()
    comparable = (
        cpu,
        instructions,
        accelerators,
        platform.system(),
        platform.machine(),
        platform.python_version_tuple()[:2],
        _libraries(),
        _chosen(threads),
        {name: value for name, value in settings.items() if not name.endswith(PLACES)},
    )
    if no_accelerators:
        settings["NVML"] = no_accelerators
    return Environment(
        fingerprint=hashlib.sha256(json.dumps(comparable, sort_keys=True).encode()).hexdigest()[:12],
        cpu=cpu,
        cores=threads["usable cores"],
        instruction_sets=instructions,
        memory_bytes=_hardware.memory_bytes(),
        accelerators=accelerators,
        os=_system(),
        python=platform.python_version(),
        libraries=dict(_libraries()),
        threads=threads,
        settings=settings,
    )


def has(instruction: str) -> bool:
    """Whether the processor has an instruction set, named as in Linux' /proc/cpuinfo, or "neon".

    Raises:
        InvalidInputError: no instruction set of that name is looked for.

    Example:
        >>> has("avx2")
        True
    """
    if instruction not in _hardware.INSTRUCTIONS:
        raise InvalidInputError(f"no instruction set {instruction!r}; {nearest(instruction, _hardware.INSTRUCTIONS)}")
    return instruction in _hardware.cpu()[1]


def cores_allowed() -> int:
    """Processors that this process can keep busy: those that it may run on, within the container's quota."""
    usable, quota = _hardware.usable_cores(), _quota_cores()
    return usable if quota is None else min(usable, quota)


def threads_allowed() -> int:
    """Threads that the process may compute with: one for each core, unless OMP_NUM_THREADS asks for fewer."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cores_allowed(), int(asked))) if asked.isdecimal() else cores_allowed()


def compilers() -> dict[str, str | None]:
    """The version line of each compiler that the frameworks may call; None where it is not there."""
    found = {name: _version(name) for name in ("c++", "g++", "clang++")}
    # NVIDIA's tools print their version last: "Cuda compilation tools, release 12.4, V12.4.131".
    return found | {name: _version(name, containing="release") for name in ("nvcc", "ptxas")}


def _threads() -> dict[str, int]:
    threads = {"usable cores": _hardware.usable_cores()}
    quota = _quota_cores()
    if quota is not None:
        threads["CPU quota"] = quota
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        if os.environ.get(name, "").isdecimal():
            threads[name] = int(os.environ[name])
    if (torch := sys.modules.get("torch")) and hasattr(torch, "get_num_threads"):
        threads["torch"] = torch.get_num_threads()
    return threads


def _chosen(threads: dict[str, int]) -> dict[str, int]:
    """The threads without what torch chooses on its own, which follows from the rest.

    The fingerprint must not depend on whether torch happens to be loaded, only on whether it was told otherwise.
    """
    default = threads.get("OMP_NUM_THREADS", threads["usable cores"])
    return {name: count for name, count in threads.items() if (name, count) != ("torch", default)}


@functools.cache
def _quota_cores() -> int | None:
    return _hardware.quota_cores()


@functools.cache
def _libraries() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def _system() -> str:
    """The system's name, its version and the kernel's: "Debian GNU/Linux 12 (bookworm), Linux 6.18"."""
    kernel = f"{platform.system()} {platform.release()}"
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {kernel}"
    except (OSError, KeyError):
        return kernel


@functools.cache
def _version(tool: str, containing: str = "") -> str | None:
    path = shutil.which(tool)
    return None if path is None else _hardware.first_line([path, "--version"], containing)
