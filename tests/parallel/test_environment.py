"""What launchers tell a process about the others."""

import pytest

from perfkit import InvalidInputError
from perfkit.parallel.environment import Launched, first_host, launched

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "gpu01",
    "MASTER_PORT": "1234",
}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "3",
}


def test_torchrun():
    assert launched(TORCHRUN) == Launched(5, 8, 1, 4, "gpu01", 1234, "torchrun")


def test_a_rank_and_a_size_are_enough():
    assert launched({"RANK": "1", "WORLD_SIZE": "2"}) == Launched(1, 2, 1, 2, "127.0.0.1", 29500, "torchrun")


def test_slurm():
    found = launched(SLURM)
    assert (found.rank, found.size, found.local_rank, found.local_size) == (5, 8, 1, 4)
    assert (found.address, found.launcher) == ("gpu07", "Slurm")


def test_steps_of_one_slurm_job_have_ports_of_their_own():
    ports = {launched(SLURM | {"SLURM_STEP_ID": str(step)}).port for step in range(10)}
    assert len(ports) == 10
    assert launched(SLURM | {"MASTER_PORT": "4321", "MASTER_ADDR": "login"}).port == 4321
    assert launched(SLURM | {"MASTER_ADDR": "login"}).address == "login"


def test_torchrun_within_slurm_is_torchrun():
    assert launched(SLURM | TORCHRUN).launcher == "torchrun"


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"WORLD_SIZE": "2"},
        {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "8"},  # a batch script itself: srun has not started it
        SLURM | {"SLURM_NTASKS": "1"},
    ],
)
def test_a_process_on_its_own(variables):
    assert launched(variables) is None


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "expected a rank from 0 to 1"),
        (SLURM | {"SLURM_STEP_NODELIST": ""}, "MASTER_ADDR"),
    ],
)
def test_what_cannot_be_read_is_refused(variables, said):
    with pytest.raises(InvalidInputError, match=said):
        launched(variables)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu07", "gpu07"), ("gpu[07-09,12],cpu3", "gpu07"), ("gpu[3,5]", "gpu3"), ("a-1,b-2", "a-1")],
)
def test_the_first_of_slurms_machines(nodes, first):
    assert first_host(nodes) == first
