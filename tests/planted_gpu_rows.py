"""Rows for the runner of `bench.gpu` that end well, raise, die and hang, where another process can import them."""

import os
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace


def rows():
    return [SimpleNamespace(part="check", name=run.__name__, run=run, make=None) for run in (well, raises, dies, hangs)]


def pair():
    """Two rows that both end well where they run at the same time."""
    return [SimpleNamespace(part="check", name=name, run=partial(meets, name), make=None) for name in ("one", "other")]


def meets(name, device, budget_s):
    folder, end = Path(os.environ["PERFKIT_CACHE"]), time.monotonic() + budget_s
    (folder / name).touch()
    while len(list(folder.iterdir())) < 2:
        if time.monotonic() > end:
            return {"failed": "nobody came"}
        time.sleep(0.01)
    return {"outcomes": {}}


def well(device, budget_s):
    return {"process": os.getpid(), "device": device, "cache": os.environ["PERFKIT_CACHE"]}


def raises(device, budget_s):
    raise ValueError("planted\nand more")


def dies(device, budget_s):
    os._exit(7)


def hangs(device, budget_s):
    time.sleep(600)
