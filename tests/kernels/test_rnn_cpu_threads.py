"""The recurrent CPU kernel in several threads, of its own and of Python's, and after a fork."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch
from rnn_cpu_calls import CASES, SHARED, Case, by_kernel, make

from perfkit.kernels import _native

if _native.find_compiler() is None:
    pytest.skip("no C++ compiler is installed", allow_module_level=True)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("case", [*SHARED, CASES[5], Case(6, 70, 9, 40, 2, 2, "lengths")], ids=str)
def test_a_call_repeats_itself_bit_for_bit(case, count, threads):
    """Also with more threads than the machine has: some are late, and others do their part."""
    layer = make("LSTM", case, torch.float32)
    threads(count)
    first = by_kernel(layer)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, by_kernel(layer), strict=True))


def test_python_threads_may_call_it_at_once(threads):
    layers = [make("LSTM", case, torch.float32) for case in (SHARED[0], CASES[2], CASES[5])]
    threads(2)
    expected = [by_kernel(layer) for layer in layers]
    same = []

    def call(i):
        torch.set_num_threads(2)
        for _ in range(5):
            same.append(all(torch.equal(a, b) for a, b in zip(expected[i], by_kernel(layers[i]), strict=True)))

    callers = [threading.Thread(target=call, args=(i % 3,)) for i in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert same == [True] * 30


FORKED = """
import os, warnings, torch
warnings.simplefilter("ignore")
from perfkit.kernels.rnn import cpu_kernel, cpu_source
from perfkit.kernels.rnn.problem import Problem
torch.set_num_threads(2)
module, x, h = torch.nn.LSTM(64, 64), torch.randn(20, 64, 64), torch.zeros(1, 64, 64)
weights = [tuple(weight.detach() for weight in module.all_weights[0])]
problem = Problem("torch", "cpu", "float32", "LSTM", 20, 64, 64, 64)
run = lambda: cpu_kernel.forward(problem, x, None, h, h, weights, False, None, None, None)[0]
expected = run()
child = os.fork()
found = run()
threads = len(os.listdir("/proc/self/task"))
same = (found.numpy() == expected.numpy()).all()  # torch.equal would wait for threads of OpenMP, which a fork leaves
if child == 0:
    os._exit(0 if same and threads == 2 else 1)
assert same and os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_a_forked_child_gets_threads_of_its_own():
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=120)
