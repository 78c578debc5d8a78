"""Shared by the tests of kernels."""

from collections.abc import Iterator

import numpy as np
import pytest
import triton
from packaging.version import Version

from .interpreter import Interpreter


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Interpreter]:
    """`interpreted(function, *args)`: the same call where kernels run in Triton's interpreter."""
    if Version(triton.__version__) < Version("3.7") and Version(np.__version__) >= Version("2.3"):
        pytest.fail("Triton 3.6's interpreter needs an older numpy: pip install 'numpy<2.3'", False)
    with Interpreter() as interpreter:
        yield interpreter
