"""Runs a script's `main` and ends its process as soon as that is done.

    to_its_end.py SCRIPT ARGUMENTS…             in this process, which torchrun started
    to_its_end.py --forks N SCRIPT ARGUMENTS…   in N, forked when all is imported, that know what torchrun would tell

gloo's threads outlive the groups of DDP models: one that wants Python's lock while Python is taken down aborts the
process, rarely.
"""

from __future__ import annotations

import gc
import importlib
import os
import runpy
import signal
import sys
import traceback
from typing import NoReturn

from perfkit.parallel import torch_world


def end(main) -> NoReturn:
    try:
        code = main()
    except BaseException:
        traceback.print_exc()
        code = 1
    if not code:
        torch_world.leave()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def fork(count: int, main) -> int:
    """The first failing process's exit code, which ends the others; 0 where all go to their end.

    Torch is imported once for all of them, and its compiler, which optimizers ask too. It has no threads before its
    first operation. Like torchrun this process keeps the store at which they meet, so that it is known to be there.
    """
    importlib.import_module("torch._dynamo")
    import torch.distributed as dist

    assert len(os.listdir("/proc/self/task")) == 1, "a thread would be missing in the forked processes"
    gc.freeze()  # else each process would have a copy of all that is imported as soon as it collects
    ports, children = [], {}
    for rank in range(count):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(write)
            about = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            about |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.read(read, 16).decode()}
            about |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
            os.environ.update({name: str(value) for name, value in about.items()})
            end(main)
        os.close(read)
        ports.append(write)
        children[child] = rank
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for port in ports:
        os.write(port, str(store.port).encode())
        os.close(port)
    code = 0
    while children:
        child, status = os.wait()
        rank = children.pop(child)
        if status and not code:
            code = os.waitstatus_to_exitcode(status)
            print(f"rank {rank} ended with {code}", file=sys.stderr, flush=True)
            for other in children:
                os.kill(other, signal.SIGKILL)
    return code


if __name__ == "__main__":
    forks = int(sys.argv[2]) if sys.argv[1] == "--forks" else 0
    sys.argv = sys.argv[3 if forks else 1 :]
    main = runpy.run_path(sys.argv[0])["main"]
    os._exit(fork(forks, main)) if forks else end(main)
