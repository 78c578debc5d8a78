"""`explain` as text and as HTML: everything that was found is in both."""

import html.parser

import pytest
import torch

import mhc_compile
from mhc_compile import Reason
from mhc_compile.inspect.explain import Explanation
from mhc_compile.inspect.records import Add
from mhc_compile.inspect.report.html import page
from mhc_compile.inspect.report.text import table
from tests.zoo import own


class Reader(html.parser.HTMLParser):
    """The text and the tags of a page; the parser undoes the escapes."""

    def __init__(self, source: str):
        super().__init__()
        self.cells: list[str] = []
        self.opened: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.opened.append(tag)

    def handle_data(self, data: str) -> None:
        self.cells.append(data.strip())


@pytest.fixture(scope="module")
def explanation() -> Explanation:
    return mhc_compile.explain(own.NanoGPT(), torch.zeros(2, 8, dtype=torch.long))


def made(reason: Reason = Reason.POINTWISE_BRANCH, **changes: str) -> Explanation:
    fields = {"name": "a.b", "owner": "a", "location": "/home/me/model.py:7"} | changes
    accepted = Add(chain=0, reason="site 1 of 2 in chain 0", width=64, node="add", **fields)
    rejected = Add(chain=-1, reason=reason, width=0, node="add_1", **fields)
    return Explanation("Model", 4, [accepted, accepted], [rejected], [[accepted, accepted]])


def test_the_text_holds_every_add_with_its_reason_and_place(explanation):
    text = str(explanation)
    assert "6 sites in 1 chain, n = 4" in text
    for add in explanation.sites:
        line = next(line for line in text.splitlines() if f" {add.name} " in line)
        assert line.startswith("+") and add.reason in line
        assert line.endswith("/".join(add.location.split("/")[-2:]))
    for add in explanation.rejected:
        assert add.name in text and f"rejected: {add.reason}" in text


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_is_spelled_out(reason):
    explanation = made(reason)
    assert f"rejected: {reason}" in str(explanation)
    assert {reason.value, f"Rejected (1): {reason}"} <= set(Reader(page(explanation)).cells)


@pytest.mark.parametrize("width", [60, 100])
def test_the_text_keeps_to_its_width_and_cuts_no_name(width):
    name = "encoder.layers[0]." + "block." * 10 + "attention"
    text = table(made(name=name), width=width)
    assert max(map(len, text.splitlines())) <= width
    lines = text.split("rejected: ")[1].splitlines()[1:]
    assert "".join(line[3:].split("  ")[0] for line in lines) == name  # brackets are not markup


def test_the_text_has_no_escape_codes_even_where_colour_is_forced(explanation, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b" not in table(explanation)


def test_the_html_holds_every_add_with_its_reason_and_place(explanation, tmp_path):
    file = tmp_path / "report.html"
    explanation.to_html(file)
    read = Reader(file.read_text(encoding="utf-8"))
    for add in (*explanation.sites, *explanation.rejected):
        assert {add.name, str(add.reason), add.location} <= set(read.cells)
    assert read.opened.count("tr") == len(explanation.sites) + len(explanation.rejected) + (
        len(explanation.chains) + len({add.reason for add in explanation.rejected})
    )


def test_the_html_needs_no_other_file(explanation):
    source = page(explanation)
    assert not {"script", "link", "img", "iframe"} & set(Reader(source).opened)
    assert "http" not in source and "url(" not in source and "@import" not in source


def test_the_html_escapes_names_and_paths():
    hostile = "<script>alert('x')</script>&amp;"
    source = page(made(name=hostile, location=f"/tmp/{hostile}.py:3"))
    assert "<script>" not in source
    assert hostile in Reader(source).cells


def test_a_model_without_sites_has_a_report():
    nothing = Explanation("Linear", 4, [], [], [])
    assert str(nothing) == "Linear: 0 sites in 0 chains, n = 4; 0 adds rejected"
    assert "0 sites" in page(nothing)
