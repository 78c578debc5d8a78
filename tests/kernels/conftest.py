"""Shared by the tests of kernels."""

from collections.abc import Iterator

import pytest

from .interpreter import Interpreter


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Interpreter]:
    """`interpreted(function, *args)`: the same call where kernels run in Triton's interpreter."""
    with Interpreter() as interpreter:
        yield interpreter
