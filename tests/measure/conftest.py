"""What tests of measuring share."""

import pytest
from simulated_machine import Machine, use


@pytest.fixture
def machine(monkeypatch):
    """A machine of even speed, whose clock is the one that timing reads."""
    return use(monkeypatch, Machine())
