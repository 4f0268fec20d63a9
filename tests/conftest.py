"""Fixtures shared by all tests."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Tests that draw without a generator of their own draw the same numbers in any order."""
    torch.manual_seed(0)
