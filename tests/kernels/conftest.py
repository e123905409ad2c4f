"""What tests of kernels set around them."""

import pytest


@pytest.fixture
def threads():
    """Sets how many threads torch has; afterwards it has as many as before."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def seeded():
    """Random numbers of torch's that are the same in each run."""
    import torch

    torch.manual_seed(0)
