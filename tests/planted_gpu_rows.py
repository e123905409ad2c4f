"""Rows for the runner of `bench.gpu` that end well, raise, die and hang, where another process can import them."""

import os
import time
from types import SimpleNamespace


def rows():
    return [SimpleNamespace(part="check", name=run.__name__, run=run, make=None) for run in (well, raises, dies, hangs)]


def well(device, budget_s):
    return {"process": os.getpid(), "device": device, "cache": os.environ["PERFKIT_CACHE"]}


def raises(device, budget_s):
    raise ValueError("planted\nand more")


def dies(device, budget_s):
    os._exit(7)


def hangs(device, budget_s):
    time.sleep(600)
