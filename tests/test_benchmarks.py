"""The pages that benchmarks write say what the stored results say.

The pages on registers and traffic are in tests/kernels.
"""

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks import calls, harness, kernels, overhead, recognize, rotation, scale, zoo


@pytest.mark.parametrize(
    "name, page, document",
    [
        ("calls", "calls", calls.document),
        ("kernels-cpu", "speed", kernels.document),
        ("overhead", "overhead", overhead.document),
        ("recognize", "recognize", recognize.document),
        ("rotation", "models", rotation.document),
        ("scale", "scale", scale.document),
        ("zoo", "zoo", zoo.document),
    ],
)
def test_a_page_is_what_its_script_makes_of_the_results(
    name: str, page: str, document: Callable[[Any], str]
) -> None:
    written = (harness.DOCS / f"{page}.md").read_text(encoding="utf-8")
    assert document(harness.read(name)) == written, f"write docs/{page}.md again"
