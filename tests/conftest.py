"""Shared by all tests: offline, few threads, a fixed seed, the core, `--order-seed`, `--one-in`."""

import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# Shapes and dtypes are propagated again behind every pass.
os.environ["MHC_COMPILE_VERIFY"] = "1"
# Before transformers is imported anywhere: no test may look for a model on the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

# pytest-xdist runs several processes: one thread each unless told otherwise.
torch.set_num_threads(int(os.environ.get("MHC_TEST_THREADS", "1")))

TESTS = Path(__file__).resolve().parent
NOT_CORE = (
    *("fuzz", "zoo", "kernels", "mutations.py", "test_mutations.py", "test_scale.py"),
    *("test_layers.py", "test_comparisons.py", "test_packaging.py", "test_retrofit.py"),
    *("test_calls.py", "test_benchmarks.py"),
)
CORE = ("kernels/test_eager.py", "kernels/ops", "kernels/gpu/test_post_res.py")
"""`pytest -m core`, which `make newest` and `make versions` run, is all but NOT_CORE, and CORE:
what depends on the versions of torch, triton and transformers. A new file belongs to it unless it
is named here."""


def is_core(file: Path) -> bool:
    def within(names: tuple[str, ...]) -> bool:
        return any(file.is_relative_to(TESTS / name) for name in names)

    return within(CORE) or not within(NOT_CORE)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--order-seed", type=int, metavar="N", help="run the tests in a random order, that of N"
    )
    parser.addoption(
        "--one-in", type=int, default=1, metavar="K", help="of each test only every Kth case"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """No test may depend on those before it. Every process of pytest-xdist shuffles alike."""
    for item in items:
        if is_core(item.path):
            item.add_marker(pytest.mark.core)
    number = config.getoption("order_seed")
    if number is not None:
        random.Random(number).shuffle(items)
    chosen = list(some(items, config.getoption("one_in")))
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


def some(items: list[pytest.Item], share: int) -> Iterator[pytest.Item]:
    """The first of every ``share`` cases of each test function: of none all are left out."""
    seen: Counter[str] = Counter()
    for item in items:
        function = item.nodeid.split("[")[0]
        if seen[function] % share == 0:
            yield item
        seen[function] += 1


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state."""
    torch.manual_seed(0)
    return 0
