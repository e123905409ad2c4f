"""Other runtimes on the same torch model and inputs, as plain callables: what a kernel of ours is compared with.

ONNX Runtime and OpenVINO get the model through torch's ONNX export; `pip install 'perfkit[peers]'` brings them. A peer
that cannot take a model raises whatever it raises: the caller writes that down.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Call = Callable[[], Any]


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
    return lambda: request.infer(fed, share_inputs=True, share_outputs=True)


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
