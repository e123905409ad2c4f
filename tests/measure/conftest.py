"""What tests of measuring share."""

import pytest
from simulated_machine import Machine, use

from perfkit.measure import _hardware, environment


@pytest.fixture
def machine(monkeypatch):
    """A machine of even speed, whose clock is the one that timing reads."""
    return use(monkeypatch, Machine())


@pytest.fixture
def nothing_remembered():
    """What is looked up once per process is looked up again in each test, and forgotten after it."""
    cached = (
        _hardware.cpu,
        _hardware.accelerators,
        environment._quota_cores,
        environment._libraries,
        environment._version,
    )
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()
