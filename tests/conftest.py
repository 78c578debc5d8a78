"""Shared by all tests: offline, few threads, a fixed seed."""

import os

# Before transformers is imported anywhere: no test may look for a model on the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

# pytest-xdist runs several processes: one thread each unless told otherwise.
torch.set_num_threads(int(os.environ.get("MHC_TEST_THREADS", "1")))


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state."""
    torch.manual_seed(0)
    return 0
