"""The list of deliberate mistakes (`make mutants` makes them) fits the sources as they are."""

from tests.mutations import MUTATIONS, ROOT


def test_every_mistake_can_still_be_made():
    """A text that is gone or stands twice needs a new entry in `tests/mutations.py`."""
    assert [m.name for m in MUTATIONS if not m.is_applicable] == []
    assert len({m.name for m in MUTATIONS}) == len(MUTATIONS)
    assert all((ROOT / m.tests).exists() and m.new != m.old for m in MUTATIONS)
    assert {m.file for m in MUTATIONS} >= {
        "open_form/defer_norm.py",
        "fusion/fuse_coefficients.py",
        "fusion/replace.py",
    }
