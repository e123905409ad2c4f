"""The tensor peak is that of the calls which are really made, and not of those that a profiler is shown."""

import pytest

pytest.importorskip("torch")

import torch
from fused_torch import Net, batch
from int8_calls import kernels_pay

import perfkit
from perfkit.backends.torch_peak import peak_during
from perfkit.kernels import _native
from perfkit.quantization import torch_onednn

if _native.find_compiler() is None:
    pytest.skip("no C++ compiler is installed", allow_module_level=True)

ROWS, AT_ONCE = 100, 34
"""One thread takes 48 rows at most through all layers: a third of a hundred, here."""


@pytest.mark.parametrize(("recipe", "bytes_of"), [("fused_kernels", 4), ("int8+fused_kernels", 1)])
def test_layers_by_one_call_hold_what_they_hand_on_of_the_rows_under_way(recipe, bytes_of):
    if bytes_of == 1 and (why := torch_onednn.missing()):
        pytest.skip(why)
    torch.manual_seed(0)
    x, threads = batch(ROWS), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with kernels_pay(), torch.no_grad():
            model = perfkit.apply(Net().eval(), recipe, example_inputs=x, calibration=[x]).model
            model(x)  # what is found to be one call, is one from the next on
            peak = peak_during(lambda: model(x), "cpu")
    finally:
        torch.set_num_threads(threads)
    pooled, hidden, outputs = 8 * 5 * 5, 160, 10
    assert peak.value == AT_ONCE * bytes_of * (pooled + hidden) + ROWS * outputs * 4
