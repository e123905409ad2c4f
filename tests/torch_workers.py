"""Scripts in tests/parallel that are run by several of torch's processes together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent / "parallel"
TIMEOUT_S = 600


def together(script: str, processes: int, *arguments: object) -> Any:
    """What the script tells in the last line that it prints, as JSON: one process prints it for all."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    about = {
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONPATH": f"{HERE.parents[1]}{os.pathsep}{HERE.parent}",
    }
    done = subprocess.run(
        [*command, *map(str, (HERE / "to_its_end.py", HERE / script, *arguments))],
        env=os.environ | about,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, f"{done.stderr[:6000]}\n…\n{done.stderr[-2000:]}"  # what failed first stands first
    return json.loads(done.stdout.splitlines()[-1])
