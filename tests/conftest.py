"""Shared by all tests: offline, few threads, a fixed seed; `--order-seed` shuffles them."""

import os
import random

# Before transformers is imported anywhere: no test may look for a model on the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

# pytest-xdist runs several processes: one thread each unless told otherwise.
torch.set_num_threads(int(os.environ.get("MHC_TEST_THREADS", "1")))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--order-seed", type=int, metavar="N", help="run the tests in a random order, that of N"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """No test may depend on those before it. Every process of pytest-xdist shuffles alike."""
    number = config.getoption("order_seed")
    if number is not None:
        random.Random(number).shuffle(items)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state."""
    torch.manual_seed(0)
    return 0
