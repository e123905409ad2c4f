"""Runs a script, `to_its_end.py SCRIPT ARGUMENTS…`, and ends its process as soon as that is done.

gloo's threads outlive the groups of DDP models: one that wants Python's lock while Python is taken down aborts the
process, rarely.
"""

import os
import runpy
import sys

from perfkit.parallel import torch_world

sys.argv = sys.argv[1:]
code = None
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    code = end.code
if code:
    sys.exit(code)
torch_world.leave()
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
