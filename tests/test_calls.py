"""How many Python calls a step costs in this package: counts, which no other program disturbs.

The bounds are what `python -m benchmarks.calls` counts, rounded up. A change that needs more calls
raises them and says why; one that needs fewer lowers them, or the gain is lost again unseen.
"""

import pytest

from benchmarks.calls import alone, total

TRANSFORM = 8_600
FIRST_FORWARD = {"plain call": 17_400, "compiled": 18_900}
FIRST_BACKWARD = {"plain call": 160, "compiled": 2_750}
STEADY_FORWARD = {"plain call": 205, "compiled": 120}
STEADY_BACKWARD = {"plain call": 155, "compiled": 90}


@pytest.mark.parametrize("form", ["plain call", "compiled"])
def test_four_sites_take_no_more_calls_than(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MHC_COMPILE_VERIFY")  # which costs calls of its own
    counts = {stage: total(calls) for stage, calls in alone(form).items()}
    bounds = {
        "transform": TRANSFORM,
        "first forward": FIRST_FORWARD[form],
        "first backward": FIRST_BACKWARD[form],
        "steady forward": STEADY_FORWARD[form],
        "steady backward": STEADY_BACKWARD[form],
    }
    assert counts.keys() == bounds.keys()
    assert {stage: n for stage, n in counts.items() if n > bounds[stage]} == {}
    # Nothing was left uncounted: four sites call two operators each, forward and backward.
    assert min(counts.values()) >= 4
