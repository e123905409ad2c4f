"""`python -m bench.tpu_aot`: really compile the recurrent Pallas kernels for TPUs, without one; needs libtpu installed.

Both passes of a layer, as programs of their own, for each kind of TPU, up to the most hidden units that `refusal` lets
through there: more VMEM than a device has fails here. Kept in results/tpu_aot.json, each kind of TPU for itself, where
everything was compiled for it.
"""

from __future__ import annotations

import argparse
import datetime as dt
import functools
import json
import os
import sys
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PATH = Path(__file__).parent / "results" / "tpu_aot.json"
MIB = 1 << 20
TARGETS = {"v4": ("v4:2x2x1", 16), "v5e": ("v5e:2x2", 128), "v5p": ("v5p:2x2x1", 64), "v6e": ("v6e:2x2", 128)}
"""A topology of each kind of TPU, and how many MiB of VMEM a core has.

Source: https://docs.cloud.google.com/tpu/docs/system-architecture-tpu-vm, jax.experimental.pallas.tpu.get_tpu_info
"""

MODES = ("LSTM", "GRU", "RNN_TANH")
SHAPES = ((28, 64, 50), (13, 3, 129), (64, 256, 256), (64, 64, 512))
"""T, B and H; of the last, H is taken to its limit too."""


def main(arguments: list[str] | None = None) -> int:
    """Compile; 0 where all of it could be, 1 where not, 2 without libtpu."""
    options = _parser().parse_args(arguments)
    missing = [name for name in ("jax", "libtpu") if find_spec(name) is None]
    if missing:
        print(f"{' and '.join(missing)} must be installed: pip install {' '.join(missing)}", file=sys.stderr)
        return 2
    _prepare()
    failed = 0
    for target in options.targets or TARGETS:
        rows = []
        for job in _jobs(target):
            rows.append(_row(target, *job))
            print(target, _line(rows[-1]), flush=True)
        errors = sum(row["error"] is not None for row in rows)
        print(f"{target}: {len(rows)} programs, {errors} not compiled", flush=True)
        failed += errors
        if not errors:
            _keep(target, rows)
    return 1 if failed else 0


def _keep(target: str, rows: list[dict[str, Any]]) -> None:
    """Write down what was compiled, beside the other targets."""
    document = json.loads(PATH.read_text()) if PATH.exists() else {}
    document[target] = {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "libtpu")},
        "programs": rows,
    }
    PATH.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    print(f"wrote {PATH}", flush=True)


def _prepare() -> None:
    """What libtpu wants to know where there is no TPU to ask; before JAX looks for one."""
    import libtpu

    os.environ.update(
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE="v5litepod-4",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_LIBRARY_PATH=str(Path(libtpu.__file__).with_name("libtpu.so")),
        TPU_MIN_LOG_LEVEL="3",
        TF_CPP_MIN_LOG_LEVEL="3",
    )


def _jobs(target: str) -> list[tuple[str, str, bool, int, int, int]]:
    """Mode, dtype, with lengths, T, B, H."""
    from perfkit.kernels.rnn import pallas_tpu

    jobs = []
    for mode in MODES:
        for dtype in ("float32", "bfloat16"):
            fit = functools.partial(pallas_tpu.blocks, mode, dtype, vmem_bytes=TARGETS[target][1] * MIB)
            steps, batch, most = SHAPES[-1]
            while fit(batch, steps, most + pallas_tpu.LANES):
                most += pallas_tpu.LANES
            for i, (*sizes, hidden) in enumerate((*SHAPES, (steps, batch, most))):
                if fit(*sizes[::-1], -(-hidden // pallas_tpu.LANES) * pallas_tpu.LANES):
                    jobs.append((mode, dtype, i % 2 == 1, *sizes, hidden))
    return jobs


def _row(target: str, mode: str, dtype: str, ragged: bool, steps: int, batch: int, hidden: int) -> dict[str, Any]:
    """Compile both passes, and say what they take."""
    from perfkit.kernels.rnn import pallas_tpu

    size = -(-hidden // pallas_tpu.LANES) * pallas_tpu.LANES
    blocks = pallas_tpu.blocks(mode, dtype, batch, steps, size, TARGETS[target][1] * MIB)
    began, error = time.perf_counter(), None
    try:
        _compile(target, mode, dtype, ragged, steps, batch, hidden)
    except Exception as refused:  # a compiler's, of whatever kind
        error = f"{type(refused).__name__}: {str(refused)[:400]}"
    return {
        "mode": mode,
        "dtype": dtype,
        "lengths": ragged,
        "steps": steps,
        "batch": batch,
        "hidden": hidden,
        "block_rows": blocks.rows,
        "block_steps": blocks.steps,
        "estimated_vmem_mib": round(pallas_tpu.needed(mode, dtype, blocks.rows, blocks.steps, size) / MIB, 2),
        "seconds": round(time.perf_counter() - began, 2),
        "error": error,
    }


def _compile(target: str, mode: str, dtype: str, ragged: bool, steps: int, batch: int, hidden: int) -> None:
    """A layer with its loss and every gradient."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from perfkit.kernels.rnn.jax_layer import Direction, layer
    from perfkit.kernels.rnn.pallas_kernel import Pallas
    from perfkit.kernels.rnn.problem import GATES

    topology, vmem = TARGETS[target]
    device = topologies.get_topology_desc(topology, "tpu").devices[0]
    of = functools.partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))
    direction = Direction(Pallas("tpu", vmem_bytes=vmem * MIB), mode, ragged, False)
    channels = GATES[mode] * hidden
    weights = tuple(of(shape, dtype) for shape in ((channels, hidden), (channels, hidden), (channels,), (channels,)))
    state, lengths = of((batch, hidden), dtype), of((batch,), "int32") if ragged else None

    def loss(x, weights, h0, c0, lengths):
        y, h, c = layer(direction, x, weights, h0, c0, lengths)
        return sum((out.astype(jnp.float32) ** 2).sum() for out in (y, h, c))

    program = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))
    traced = program.trace(of((steps, batch, hidden), dtype), weights, state, state, lengths)
    text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2, "a pass is missing"


def _line(row: dict[str, Any]) -> str:
    name = f"{row['mode']} {row['dtype']} T{row['steps']} B{row['batch']} H{row['hidden']}"
    ragged = " lengths" if row["lengths"] else ""
    blocks = f"blocks of {row['block_rows']} rows, {row['block_steps']} steps"
    told = row["error"] or f"{blocks}, {row['estimated_vmem_mib']} MiB of VMEM, {row['seconds']} s"
    return f"{name}{ragged}: {told}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.tpu_aot", description=__doc__)
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], help="kinds of TPU; all of them by default")
    return parser


if __name__ == "__main__":
    sys.exit(main())
