"""Several processes, or several devices of one, that work on one model together.

- `world.py`: who this process is among the others, and what all of them agree on; `torch_world.py`, `jax_world.py`.
- `environment.py`: what a launcher (torchrun, Slurm, `perfkit launch`) told this process about the others.
- `layout.py`: how many of them the recipes of a chain take along each axis; `gathering.py`: a workload among them;
  `spread.py`: what is spread how.
- `pipeline_plan.py`, `balance.py`: how a batch goes through a pipeline, and where a model is cut.

The messages themselves are the frameworks' own: torch.distributed, and XLA's collectives.
"""
