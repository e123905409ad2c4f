"""Threads of the int8 recurrent kernel, of the caller's and after a fork."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch
from rnn_int8_calls import MODES, make, run

from perfkit.kernels import _native

if _native.find_compiler() is None:
    pytest.skip("no C++ compiler is installed", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", [3, 64, 150])
def test_threads_change_no_bit(mode, batch, threads):
    layer, x = make(mode, 20, 40), torch.randn(6, batch, 20)
    lengths = torch.linspace(6, 1, batch).long()
    sizes = torch.stack([(lengths > t).sum() for t in range(6)])
    found = []
    for count in (1, 2, 5):
        threads(count)
        states = torch.zeros(2, batch, 40)
        padded, packed = run(layer, x, None, *states), run(layer, x.flatten(0, 1)[: sizes.sum()], sizes, *states)
        found.append((padded[0], padded[1], packed[0], packed[1]))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_python_threads_may_call_it_at_once(threads):
    threads(2)
    layer, x, states = make("LSTM", 20, 40), torch.randn(20, 64, 20), torch.zeros(2, 64, 40)
    expected = run(layer, x, None, *states)[0]
    same = []
    callers = [
        threading.Thread(
            target=lambda: same.extend(torch.equal(run(layer, x, None, *states)[0], expected) for _ in range(5))
        )
        for _ in range(4)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert same == [True] * 20


FORKED = """
import os, warnings, torch
warnings.simplefilter("ignore")
from perfkit.quantization.torch_rnn_int8 import quantize_rnn
torch.set_num_threads(2)
model, x = torch.nn.LSTM(4, 8).eval(), torch.randn(5, 64, 4)
quantize_rnn(model)
with torch.no_grad():
    expected = model(x)[0]
    child = os.fork()
    same = torch.equal(model(x)[0], expected)
if child == 0:
    os._exit(0 if same and len(os.listdir("/proc/self/task")) == 2 else 1)
assert same and os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_a_forked_child_gets_threads_of_its_own():
    """A fork takes none along: with the parent's pool it would work alone, or wait for a lock that nobody has."""
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=120)
