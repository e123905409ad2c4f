"""What tests of backends set around them."""

import pytest


@pytest.fixture
def set_to_three():
    """What torch is set to: neither what a test run gives it, nor a number that is tried."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)
