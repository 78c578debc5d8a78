"""Shared by all tests: offline, few threads, a fixed seed; `--order-seed` shuffles them."""

import os
import random
from pathlib import Path

# Before transformers is imported anywhere: no test may look for a model on the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

# pytest-xdist runs several processes: one thread each unless told otherwise.
torch.set_num_threads(int(os.environ.get("MHC_TEST_THREADS", "1")))

ROOT = Path(__file__).resolve().parent.parent
CORE = tuple(
    """
    test_torch.py test_versions.py test_config.py test_backend.py test_errors.py test_report.py
    test_ownership.py test_guard.py test_hooks.py test_check.py test_persistence.py
    test_partitioned.py test_graph_modules.py test_recognize.py test_huggingface.py test_modes.py
    passes kernels/test_eager.py kernels/test_ops.py
    """.split()
)
"""The files of `pytest -m core`, which `make newest` and `make versions` run: what depends on the
versions of torch and transformers, in five minutes on two cores."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--order-seed", type=int, metavar="N", help="run the tests in a random order, that of N"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the core; shuffle: no test may depend on those before it."""
    for item in items:
        if any(item.path.is_relative_to(ROOT / "tests" / name) for name in CORE):
            item.add_marker(pytest.mark.core)
    number = config.getoption("order_seed")
    if number is not None:  # every process of pytest-xdist shuffles alike
        random.Random(number).shuffle(items)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state."""
    torch.manual_seed(0)
    return 0
