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


def together(script: str, processes: int, *arguments: object, torchrun: bool = False) -> Any:
    """What the script tells in the last line that it prints, as JSON: one process prints it for all.

    Args:
        torchrun: started as users start them; else forked, which spares each process the imports, where torch can be.
    """
    torchrun = torchrun or sys.platform != "linux"
    by = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes] if torchrun else []
    about = {
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONPATH": f"{HERE.parents[1]}{os.pathsep}{HERE.parent}{os.pathsep}{HERE}",
    }
    command = [*by, HERE / "to_its_end.py", *([] if torchrun else ["--forks", processes]), HERE / script, *arguments]
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=os.environ | about, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, f"{done.stderr[:6000]}\n…\n{done.stderr[-2000:]}"  # what failed first stands first
    return json.loads(done.stdout.splitlines()[-1])
