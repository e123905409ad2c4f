"""Scripts in tests/parallel that are run in processes of their own, with as many CPU devices as a test wants."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent / "parallel"
TIMEOUT_S = 600


def on_devices(count: int) -> dict[str, str]:
    """The environment of a process that has so many CPU devices."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def start(script: str, devices: int, *arguments: object, **variables: str) -> subprocess.Popen:
    about = {
        **on_devices(devices),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{HERE.parents[1]}{os.pathsep}{HERE.parent}",
    }
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(HERE / script), *map(str, arguments)],
        env=os.environ | about | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(process: subprocess.Popen) -> dict:
    try:
        out, err = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
    assert process.returncode == 0, err[-4000:]
    return json.loads(out.splitlines()[-1])
