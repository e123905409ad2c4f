"""Ranges of activations, read from a model while it runs on calibration data."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import nn

from perfkit._errors import InvalidInputError, PerfkitError, UnsupportedError
from perfkit._workload import Inputs, Workload
from perfkit.backends.torch_state import keeping_state

_quantized = torch.ops.quantized_decomposed
BINS = 2048
CLIPS = np.linspace(0.3, 1.0, 36)


@dataclass(frozen=True)
class Affine:
    """A per-tensor grid of unsigned integers: `x ≈ scale * (q - zero)` for q in 0…top."""

    scale: float
    zero: int
    top: int

    @classmethod
    def spanning(cls, low: float, high: float, top: int) -> Affine:
        """The grid over [low, high], widened to hold 0 exactly."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = float(high - low) / top
        return cls(scale, round(float(-low) / scale), top)

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """`x` on the grid, in float32: the pair of operations that Inductor turns into integer kernels."""
        return self.floats(self.integers(x))

    def integers(self, x: torch.Tensor) -> torch.Tensor:
        """The q of `x`, uint8."""
        return _quantized.quantize_per_tensor.default(x.float(), *self._grid)

    def floats(self, q: torch.Tensor) -> torch.Tensor:
        """What q stands for, float32."""
        return _quantized.dequantize_per_tensor.default(q, *self._grid)

    @property
    def _grid(self) -> tuple[float, int, int, int, torch.dtype]:
        return self.scale, self.zero, 0, self.top, torch.uint8


@dataclass
class Observed:
    """What one layer was given while it was watched.

    Args:
        low, high: smallest and largest value; 0 where it was never called.
        calls: how often it was called.
        counts: histogram of the values over [low, high].
    """

    low: float = 0.0
    high: float = 0.0
    calls: int = 0
    counts: np.ndarray | None = None

    @property
    def dead(self) -> str:
        """Why no range can be read from it; empty where one can."""
        if not self.calls:
            return "it was never called on the calibration data: its weight is read directly, or it is not used"
        if self.low == self.high == 0.0:
            return "its inputs were 0 throughout the calibration data"
        return ""

    def grid(self, top: int) -> tuple[Affine, float]:
        """The grid with the least squared error over what was seen, and the share of values that it clips."""
        edges = np.linspace(self.low, self.high, BINS + 1)
        centres = (edges[:-1] + edges[1:]) / 2
        clips = [Affine.spanning(self.low * clip, self.high * clip, top) for clip in CLIPS]
        best = min(clips, key=lambda affine: _squared_error(affine, centres, self.counts))
        beyond = np.abs(_on_grid(best, centres) - centres) > best.scale
        return best, float(self.counts[beyond].sum() / max(self.counts.sum(), 1))


def _on_grid(affine: Affine, values: np.ndarray) -> np.ndarray:
    return affine.scale * (np.clip(np.round(values / affine.scale) + affine.zero, 0, affine.top) - affine.zero)


def _squared_error(affine: Affine, values: np.ndarray, counts: np.ndarray) -> float:
    return float((counts * np.square(_on_grid(affine, values) - values)).sum())


def calibrate(work: Workload, watched: Mapping[str, nn.Module]) -> tuple[dict[str, Observed], int]:
    """What each layer is given on the calibration data (else on the example inputs), and the number of samples.

    The data is run twice: for the extremes, then for the histograms between them.

    Args:
        watched: layers by name; the first input of each is read.

    Raises:
        InvalidInputError: a batch does not run, or brings NaN or infinite values to a layer.
        UnsupportedError: a layer is given a tensor that does not show its numbers.
    """
    batches = work.calibration or (work.inputs,)
    seen = {name: Observed() for name in watched}
    for see in (_extremes, _histogram):
        with _watching(watched, lambda name, x, see=see: see(seen, name, x)):
            for number, inputs in enumerate(batches, 1):
                _run(work, inputs, number)
    return seen, sum(work.backend.batch_size(work, inputs) or 1 for inputs in batches)


def linked(work: Workload, layers: Mapping[str, nn.Module]) -> Links:
    """Which of the model's layers take whose output, from one run."""
    links = Links(work.model, layers)
    with links.watching():
        _run(work, (work.calibration or (work.inputs,))[0], 1)
    links.made.clear()
    return links


def _run(work: Workload, inputs: Inputs, number: int) -> None:
    work.backend.seed(work.seed)
    try:
        with torch.no_grad(), keeping_state(work.model):
            work.model(*inputs.args, **inputs.kwargs)
    except PerfkitError:
        raise
    except Exception as error:
        raise InvalidInputError(
            f"{work.backend.model_name(work)} does not run on calibration batch {number} "
            f"({work.backend.describe(inputs)}): {type(error).__name__}: {error}"
        ) from error


def _extremes(observed: dict[str, Observed], name: str, x: torch.Tensor) -> None:
    seen = observed[name]
    low, high = (float(value) for value in x.detach().aminmax())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InvalidInputError(f"the calibration data brings NaN or infinite values to layer {name!r}")
    seen.low, seen.high = (min(seen.low, low), max(seen.high, high)) if seen.calls else (low, high)
    seen.calls += 1


def _histogram(observed: dict[str, Observed], name: str, x: torch.Tensor) -> None:
    seen = observed[name]
    if seen.low < seen.high:
        counts = torch.histc(x.detach().float(), BINS, seen.low, seen.high).double().cpu().numpy()
    else:
        counts = np.zeros(BINS)
        counts[-1] = x.numel()
    seen.counts = counts if seen.counts is None else seen.counts + counts


@contextmanager
def _watching(watched: Mapping[str, nn.Module], see: Any) -> Iterator[None]:
    """Within it, `see(name, first input)` is called whenever a watched layer is."""

    def hook(name: str):
        def before(_, args, kwargs):
            x = next(
                (value for value in itertools.chain(args, kwargs.values()) if isinstance(value, torch.Tensor)), None
            )
            if x is not None and (kind := _unread(x)):
                raise UnsupportedError(
                    f"layer {name!r} is given {kind}, of which no range is read: exclude the layer, or let the model "
                    "call it on a plain tensor"
                )
            if x is not None and x.is_floating_point() and x.numel():
                see(name, x)

        return before

    handles = [module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, module in watched.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _unread(x: torch.Tensor) -> str:
    """What a tensor is that does not show its numbers; empty where it does."""
    if x.is_nested:
        return "a nested tensor"
    transformed = torch._C._functorch.is_functorch_wrapped_tensor(x)
    return "a tensor of torch.func's (vmap, grad, jacrev)" if transformed else ""


class Links:
    """Which layer takes whose output, told by the memory that the output lies in.

    Args:
        norms: by each batch norm's name, the convolution whose output it takes.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]):
        def of(*kinds: type) -> dict[str, nn.Module]:
            return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}

        self.layers = layers
        self.pools = {name: pool for name, pool in of(nn.MaxPool2d).items() if not pool.return_indices}
        self.convs = of(nn.Conv1d, nn.Conv2d, nn.Conv3d)
        self.batch_norms = of(nn.modules.batchnorm._BatchNorm)
        self.made: dict[int, tuple[str, torch.Tensor, int]] = {}
        self.taken: dict[str, set[str]] = {name: set() for name in self.pools}
        self.norms: dict[str, str] = {}

    @property
    def followers(self) -> dict[str, str]:
        """By each pool's name, the layer that takes its output as it is, or in another shape; pools with one only."""
        return {pool: next(iter(layers)) for pool, layers in self.taken.items() if len(layers) == 1}

    @contextmanager
    def watching(self) -> Iterator[None]:
        made = [module.register_forward_hook(self._makes(name)) for name, module in (self.pools | self.convs).items()]
        try:
            with _watching(self.layers, self._take), _watching(self.batch_norms, self._normalize):
                yield
        finally:
            for handle in made:
                handle.remove()

    def _makes(self, name: str):
        def after(_module, _args, output):
            # The tensor is kept, so that its memory is not given to another one meanwhile.
            self.made[output.untyped_storage().data_ptr()] = (name, output, output._version)

        return after

    def _maker(self, x: torch.Tensor) -> str | None:
        name, output, version = self.made.get(x.untyped_storage().data_ptr(), (None, None, None))
        return name if output is not None and output._version == version else None

    def _take(self, layer: str, x: torch.Tensor) -> None:
        if (maker := self._maker(x)) in self.taken:
            self.taken[maker].add(layer)

    def _normalize(self, norm: str, x: torch.Tensor) -> None:
        if (maker := self._maker(x)) in self.convs:
            self.norms[norm] = maker
