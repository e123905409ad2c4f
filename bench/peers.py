"""Other runtimes on the reference models in torch: what a kernel of ours is compared with.

ONNX Runtime and OpenVINO get the model through torch's ONNX export; `pip install 'perfkit[peers]'` brings them. A peer
that cannot take a model raises whatever it raises: the caller writes that down.

Each side of a comparison has a process of its own, and is stopped while the other has its turn: threads of ONNX Runtime
and of OpenMP spin for a while after their work, and two runtimes in one process slow each other by a factor of two.
"""

from __future__ import annotations

import io
import os
import signal
import statistics
import time
import warnings
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import nn

from perfkit import Comparison, reference
from perfkit.measure import timing
from perfkit.measure.calls import BLOCK_S, MOST_CALLS, quickest_s, timed, warm_up
from perfkit.measure.statistics import compare, pairs_needed

Call = Callable[[], Any]

MOST_PAIRS = 60
BUILDING_S = 300.0
"""A side that takes longer to build its model and call it once is taken to hang."""


# ---- Runtimes --------------------------------------------------------------------------------------------------------


def eager(model: nn.Module, inputs: tuple) -> Call:
    def call():
        with torch.inference_mode():
            return model(*inputs)

    return call


def torch_compile(model: nn.Module, inputs: tuple) -> Call:
    return eager(torch.compile(model), inputs)


def onnxruntime(model: nn.Module, inputs: tuple) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(_exported(model, inputs), options, providers=["CPUExecutionProvider"])
    fed = {found.name: tensor.numpy() for found, tensor in zip(session.get_inputs(), inputs, strict=True)}
    return lambda: session.run(None, fed)


def openvino(model: nn.Module, inputs: tuple, precision: str = "f32") -> Call:
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    core = openvino.Core()
    request = core.compile_model(core.read_model(_exported(model, inputs)), "CPU", settings).create_infer_request()
    fed = [tensor.numpy() for tensor in inputs]
    return lambda: list(request.infer(fed, share_inputs=True, share_outputs=True).values())


def openvino_bf16(model: nn.Module, inputs: tuple) -> Call:
    return openvino(model, inputs, "bf16")


PEERS = (torch_compile, onnxruntime, openvino, openvino_bf16)


def _exported(model: nn.Module, inputs: tuple) -> bytes:
    """The model as ONNX."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        torch.onnx.export(model.eval(), inputs, file, dynamo=False)
    return file.getvalue()


# ---- Comparisons -----------------------------------------------------------------------------------------------------


class Refused(Exception):
    """A runtime did not take the model; the message is what it said."""


def compared(model: str, batch_size: int, peer: Callable, budget_s: float) -> tuple[Comparison, float]:
    """A peer against eager float32, alternated, and how far its output is from eager's, over the largest magnitude.

    Args:
        model, batch_size: of `perfkit.reference.load`.
        peer: one of `PEERS`.
        budget_s: seconds of blocks; warm-up takes a fifth as long, and what a runtime takes to build comes before.

    Raises:
        Refused: the peer does not take the model.
    """
    sides = [Side(model, batch_size, runtime.__name__, budget_s / 10) for runtime in (eager, peer)]
    try:
        (expected, eager_s), (found, peer_s) = (side.ready() for side in sides)
        calls = [max(1, min(round(BLOCK_S / seconds), MOST_CALLS)) for seconds in (eager_s, peer_s)]
        medians: tuple[list[float], list[float]] = ([], [])
        end = time.monotonic() + budget_s
        for order in timing.orders(seed=0):
            for side in order:
                medians[side].append(statistics.median(sides[side].block_ms(calls[side])))
            enough = pairs_needed(timing.CONFIDENCE) if time.monotonic() > end else MOST_PAIRS
            if len(medians[0]) >= enough:
                break
    finally:
        for side in sides:
            side.close()
    names = {"baseline": "eager", "variant": peer.__name__}
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    return compare(*medians, **names, confidence=timing.CONFIDENCE), error


class Side:
    """A process in which one runtime has a reference model, and which runs only while it is asked something.

    Args:
        runtime: the name of a function of this module.
        warm_s: seconds of calls before the first block.
    """

    def __init__(self, model: str, batch_size: int, runtime: str, warm_s: float):
        spawn = get_context("spawn")
        self.runtime = runtime
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=_serve, args=(theirs, model, batch_size, runtime, warm_s), daemon=True)
        self.process.start()
        theirs.close()
        self.first = self._answer()
        os.kill(self.process.pid, signal.SIGSTOP)

    def ready(self) -> tuple[np.ndarray, float]:
        """Its output, and the seconds of its quickest call.

        Raises:
            Refused: it did not come so far.
        """
        if isinstance(self.first, str):
            raise Refused(self.first)
        return self.first

    def block_ms(self, calls: int) -> list[float]:
        """Milliseconds of so many calls, after one that is not timed."""
        os.kill(self.process.pid, signal.SIGCONT)
        self.pipe.send(calls)
        found = self._answer()
        os.kill(self.process.pid, signal.SIGSTOP)
        return found

    def _answer(self) -> Any:
        try:
            if self.pipe.poll(BUILDING_S):
                return self.pipe.recv()
            return f"no answer in {BUILDING_S:.0f} s"
        except EOFError:
            return "its process died"

    def close(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(pipe: Connection, model: str, batch_size: int, runtime: str, warm_s: float) -> None:
    """What the process does: the model built and warmed up, then blocks of calls as they are asked for."""
    try:
        loaded = reference.load(model, framework="torch", batch_size=batch_size)
        call = globals()[runtime](loaded.model, loaded.example_inputs)
        output = call()
        warm_up(call, budget_s=warm_s)
        quickest = quickest_s(call)
        first = output[0] if isinstance(output, (list, tuple)) else output
        pipe.send((np.array(first, np.float64), quickest))
    except Exception as error:  # whatever a runtime says of a model that it cannot take is the finding
        pipe.send(f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')[:200]}")
        return
    while True:
        try:
            calls = pipe.recv()
        except EOFError:
            return
        call()
        pipe.send([nanoseconds / 1e6 for nanoseconds in timed(call, calls)])
