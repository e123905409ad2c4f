"""A training loop in two processes: run by test_steps.py, which reads the reports it writes."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from perfkit.profiling import steps

dist.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1))
with steps(Path(sys.argv[1], "steps.json"), warmup=1, every=2) as profiler:
    for x in profiler.batches([torch.ones(2, 4)] * 5):
        loss = model(x).sum()
        loss.backward()
        profiler.step(loss)
dist.monitored_barrier()  # gloo may end a process whose neighbour leaves while it still works
dist.destroy_process_group()
os._exit(0)  # gloo's threads outlive the group of a DDP model: one that wants the GIL now aborts the process, rarely
