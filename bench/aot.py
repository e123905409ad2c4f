"""`python -m bench.aot`: compile every shipped Triton kernel for the GPUs we name, without one, and refuse spills.

Each `Compilation` of each op's `triton_kernel.compilations()` is compiled to machine code for sm_80, sm_90, sm_100 and
gfx942. What goes wrong silently on a GPU fails here: registers that spill to memory, more shared memory than a device
has, tensor cores that were promised and are not used, and float32 that is rounded to TF32 although the kernel was told
not to. Kept in results/aot.json where everything was compiled.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import functools
import io
import json
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from perfkit import kernels
from perfkit.kernels._triton import Compilation

PATH = Path(__file__).parent / "results" / "aot.json"


@dataclass(frozen=True)
class Target:
    """A GPU to compile for.

    Args:
        backend, arch, warp_size: Triton's names for it.
        assembly: the form of the program in which instructions are counted.
        tensor_cores: what its tensor-core instructions begin with; longer names are cut off there.
        rounded: what stands in those that round float32 first.
        shared_bytes: the most shared memory that one program can have.
    """

    backend: str
    arch: int | str
    warp_size: int
    assembly: str
    tensor_cores: str
    rounded: str
    shared_bytes: int


_NVIDIA = r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", r"\b(?:mma|mma_async)\..*\btf32\b"
TARGETS = {
    "sm_80": Target("cuda", 80, 32, "ptx", *_NVIDIA, 163 * 1024),
    "sm_90": Target("cuda", 90, 32, "ptx", *_NVIDIA, 227 * 1024),
    "sm_100": Target("cuda", 100, 32, "ptx", *_NVIDIA, 227 * 1024),
    "gfx942": Target("hip", "gfx942", 64, "amdgcn", r"\b(v_mfma)_", r"\bv_mfma_\w*xf32", 64 * 1024),
}
"""A100, H100, B200 and MI300.

Source: CUDA C++ programming guide, technical specifications per compute capability; AMD's CDNA3 instruction set guide
"""


@dataclass(frozen=True)
class Figures:
    """What a compiled kernel takes.

    Args:
        registers: of each thread; on AMD, vector registers.
        spilled: to memory: bytes stored and loaded on NVIDIA; vector registers, and bytes of scratch memory, on AMD.
        in_lanes: scalar registers that AMD's compiler keeps in lanes of vector registers: slower, but not in memory.
        shared_bytes: of one program.
        tensor_cores: how often each tensor-core instruction stands in the program.
        rounded: how many of them round float32 to TF32.
    """

    registers: int
    spilled: int
    in_lanes: int
    shared_bytes: int
    tensor_cores: dict[str, int]
    rounded: int


def main(arguments: list[str] | None = None) -> int:
    """Compile what was asked for; 0 where all of it is as it should be, 1 where not, 2 without Triton."""
    options = _parser().parse_args(arguments)
    if find_spec("triton") is None:
        print("Triton is not installed: pip install 'perfkit[triton]'", file=sys.stderr)
        return 2
    jobs = _jobs(options)
    if not jobs:
        print("nothing to compile: no kernel's name has that text, or it is not for that target", file=sys.stderr)
        return 2
    rows = []
    for row in _done(jobs, options.jobs):
        rows.append(row)
        print(_line(row), flush=True)
    failed = [row for row in rows if row["faults"]]
    print(f"{len(rows)} kernels compiled, {len(failed)} not as they should be")
    for row in failed:
        print(f"FAILED {row['target']:7} {row['name']}: {'; '.join(row['faults'])}")
    everything = options.ops is options.targets is options.match is None and not options.first
    if everything and not failed:
        PATH.write_text(_document(rows))
        print(f"wrote {PATH}")
    return 1 if failed else 0


def compiled(compilation: Compilation, target: str) -> Figures:
    """Compile one kernel to machine code, past every cache.

    Args:
        target: a name of `TARGETS`.

    Raises:
        Whatever Triton raises of a kernel that it cannot compile.
    """
    device, (assembly, shared_bytes, log) = TARGETS[target], assembled(compilation, target)
    registers = _nvidia(log) if device.backend == "cuda" else _amd(assembly)
    cores = Counter(re.findall(device.tensor_cores, assembly))
    rounded = len(re.findall(device.rounded, assembly))
    return Figures(*registers, shared_bytes, dict(sorted(cores.items())), rounded)


def assembled(compilation: Compilation, target: str) -> tuple[str, int, str]:
    """The program as the target's assembly, its shared memory in bytes, and what the assembler told."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    device, knobs, log = TARGETS[target], triton.knobs, io.StringIO()
    names = compilation.kernel.arg_names
    source = ASTSource(
        compilation.kernel,
        {name: compilation.signature.get(name, "constexpr") for name in names},
        dict(compilation.constants),
        {(names.index(name),): _attributes(compilation, name, device) for name in compilation.signature},
    )
    gpu = GPUTarget(device.backend, device.arch, device.warp_size)
    with tempfile.TemporaryDirectory() as cache, knobs.cache.scope(), knobs.nvidia.scope():
        knobs.cache.dir, knobs.nvidia.dump_ptxas_log = cache, True
        with contextlib.redirect_stdout(log):
            kernel = triton.compile(source, target=gpu, options=dict(compilation.options))
        return kernel.asm[device.assembly], kernel.metadata.shared, log.getvalue()


def faults(compilation: Compilation, target: str, figures: Figures) -> list[str]:
    """What is wrong with a compiled kernel, for people; empty where nothing is."""
    found, most = [], TARGETS[target].shared_bytes
    if figures.spilled:
        found.append(f"registers spill to memory ({figures.spilled}): smaller tiles, or more warps")
    if figures.shared_bytes > most:
        found.append(f"{figures.shared_bytes} bytes of shared memory, and a program has {most} at most")
    if compilation.tensor_cores and not figures.tensor_cores:
        found.append("no tensor-core instruction, and one was promised")
    if figures.rounded and compilation.constants.get("PRECISION") == "ieee":
        found.append(f"{figures.rounded} products round float32 to TF32, and PRECISION is 'ieee'")
    return found


@functools.cache
def listed(op: str) -> tuple[Compilation, ...]:
    """What an op ships."""
    return tuple(import_module(f"perfkit.kernels.{op}.triton_kernel").compilations())


# An op, the number of a compilation among those it lists, and a target: what a process can be sent.
Job = tuple[str, int, str]


def _jobs(options: argparse.Namespace) -> list[Job]:
    """What was asked for; with `first` no kernel twice for the same target."""
    found, seen = [], set()
    for op in options.ops or kernels.OPS:
        for number, compilation in enumerate(listed(op)):
            if options.match and options.match not in compilation.name:
                continue
            for target in compilation.targets:
                kernel = op, compilation.kernel.__name__, target
                if target in (options.targets or TARGETS) and not (options.first and kernel in seen):
                    found.append((op, number, target))
                    seen.add(kernel)
    return found


def _done(jobs: list[Job], processes: int) -> Iterator[dict[str, Any]]:
    """The rows, in the order of the jobs."""
    if processes == 1:
        yield from map(_row, jobs)
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), _compiling) as pool:
        yield from pool.map(_row, jobs)


def _compiling() -> None:
    """Kernels that are defined to be interpreted cannot be compiled."""
    os.environ.pop("TRITON_INTERPRET", None)


def _row(job: Job) -> dict[str, Any]:
    op, number, target = job
    compilation = listed(op)[number]
    row = {"op": op, "name": compilation.name, "target": target}
    try:
        with _complaints() as complaints:
            figures = compiled(compilation, target)
    except Exception as error:  # of whatever kind: it is one row's, and the others are still to be seen
        told = [line for line in complaints if "error: " in line or "Assertion" in line] + str(
            error
        ).strip().splitlines()
        return row | {"faults": [f"does not compile: {type(error).__name__}: {told[0] if told else ''}"]}
    return row | vars(figures) | {"faults": faults(compilation, target, figures)}


@contextlib.contextmanager
def _complaints() -> Iterator[list[str]]:
    """What the compiler writes to standard error inside, line by line, once it is left: whole programs, at times."""
    lines: list[str] = []
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines += file.read().splitlines()


def _attributes(compilation: Compilation, name: str, device: Target) -> list[list[Any]]:
    """What Triton finds an argument to be when a kernel is launched; tensors on AMD are taken to be below 2 GB."""
    divisible = [["tt.divisibility", 16]] if name in compilation.divisible else []
    pointer = device.backend == "hip" and compilation.signature[name].startswith("*")
    return divisible + ([["tt.pointer_range", 32]] if pointer else [])


def _nvidia(log: str) -> tuple[int, int, int]:
    """Registers, bytes spilled, and no lanes, of what ptxas tells; a kernel's functions together."""
    registers = [int(found) for found in re.findall(r"Used (\d+) registers", log)]
    spilled = [int(found) for found in re.findall(r"(\d+) bytes spill (?:stores|loads)", log)]
    if not registers or not spilled:
        raise ValueError(f"ptxas told nothing of registers or spills: {log!r}")
    return max(registers), sum(spilled), 0


def _amd(assembly: str) -> tuple[int, int, int]:
    """Vector registers, what is spilled, and scalars in lanes, of the assembly's metadata."""
    names = ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size", "sgpr_spill_count")
    found = {name: re.search(rf"^\s*\.{name}:\s+(\d+)", assembly, re.MULTILINE) for name in names}
    if missing := [name for name in names if found[name] is None]:
        raise ValueError(f"the assembly does not tell {', '.join(missing)}")
    registers, vectors, scratch, scalars = (int(found[name].group(1)) for name in names)
    return registers, vectors + scratch, scalars


def _line(row: dict[str, Any]) -> str:
    if "registers" not in row:
        return f"{row['target']:7} {row['name']}: {row['faults'][0]}"
    cores = ", ".join(f"{count} {name}" for name, count in row["tensor_cores"].items()) or "no tensor cores"
    told = f"{row['registers']} registers, {row['spilled']} spilled, {row['shared_bytes']} bytes shared, {cores}"
    return f"{row['target']:7} {row['name']}: {told}{', FAILED' if row['faults'] else ''}"


def _document(rows: list[dict[str, Any]]) -> str:
    """The file's text: one kernel a line, so that a change is seen where it is."""
    about = {"date": dt.date.today().isoformat(), "triton": version("triton"), "torch": version("torch")}
    lines = [json.dumps({key: value for key, value in row.items() if key != "faults"}) for row in rows]
    return f'{{"environment": {json.dumps(about)},\n "rows": [\n  ' + ",\n  ".join(lines) + "\n ]}\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=kernels.OPS, help="only these")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), help="only these")
    parser.add_argument("--match", metavar="TEXT", help="only kernels whose name has this text")
    parser.add_argument("--first", action="store_true", help="only the first configuration of each kernel and target")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="processes that compile")
    return parser


if __name__ == "__main__":
    sys.exit(main())
