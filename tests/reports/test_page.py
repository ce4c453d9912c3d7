import os
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from monteclora.errors import CheckpointError
from monteclora.reports.figures import accuracy_bars
from monteclora.reports.formats import decimals
from monteclora.reports.page import Column, Figure, Page, Passage, Row, Section, Shaded, Table, render, write_page

HOSTILE = "<script>alert('x')</script>"
VOID = {"meta", "link", "br", "hr", "img", "input"}


class Document(HTMLParser):
    """Checks that elements nest, and keeps the tags, attributes and texts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append(data.strip())


@pytest.fixture(scope="module")
def page() -> Page:
    table = Table(
        [Column("Run"), Column("Accuracy", decimals(3)), Column("ECE", decimals(3))],
        [
            Row(["LoRA", 0.8704, 0.1]),
            Row(["MonteCLoRA", 0.8701, 0.05]),
            Row(["Diverged", 0.99, 0.0], unfinished=True),
        ],
        caption="What the columns mean.",
    )
    svg = accuracy_bars({"LoRA": [0.8, 0.9]})
    return Page(
        title="A title",
        subtitle="A subtitle",
        summary=["First finding.", "Second finding."],
        warnings=["The run stopped."],
        sections=[Section("Results", ["A paragraph."], [Figure([svg, svg], "Two bars.")], [table])],
        environment={"Python": "3.11"},
        reproduce=["make demo", "monteclora demo"],
    )


def test_it_is_well_formed_html_with_everything_in_it(page):
    html = render(page)
    document = Document(html)
    text = "\n".join(document.texts)
    for expected in (
        "A title",
        "A subtitle",
        "First finding.",
        "Second finding.",
        "The run stopped.",
        "A paragraph.",
        "Two bars.",
        "What the columns mean.",
        "3.11",
        "make demo\nmonteclora demo",
    ):
        assert expected in text
    assert document.tags.count("svg") == 2
    assert html.index("The run stopped.") < html.index("First finding.")


def test_a_page_of_nothing_but_a_title_is_well_formed():
    document = Document(render(Page("Alone")))
    assert document.texts.count("Alone") == 2  # the title bar and the heading
    assert "section" not in document.tags


def test_ids_are_unique(page):
    ids = [value for name, value in Document(render(page)).attributes if name == "id"]
    assert ids
    assert len(ids) == len(set(ids))


def test_text_is_never_markup():
    table = Table([Column(HOSTILE)], [Row([HOSTILE])], caption=HOSTILE)
    figure = Figure([accuracy_bars({HOSTILE: [0.5]})], HOSTILE)
    passage = Passage(HOSTILE, [Shaded(HOSTILE, 0.5, HOSTILE)], HOSTILE)
    page = Page(
        title=HOSTILE,
        subtitle=HOSTILE,
        summary=[HOSTILE],
        warnings=[HOSTILE],
        sections=[Section(HOSTILE, [HOSTILE], [figure], [table], [passage])],
        environment={HOSTILE: HOSTILE},
        reproduce=[HOSTILE],
    )
    document = Document(render(page))
    assert "script" not in document.tags
    assert sum(HOSTILE in text for text in document.texts) == 18
    assert ("data-header", HOSTILE) in document.attributes


def test_only_our_own_drawings_are_embedded(page):
    forged = replace(page, sections=[Section("Results", figures=[Figure(["<svg></svg>"], "")])])
    with pytest.raises(TypeError, match="only Svg is embedded"):
        render(forged)


def test_nothing_is_loaded_from_anywhere(page):
    html = render(page)
    document = Document(html)
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(document.tags)
    loading = [
        value for name, value in document.attributes if name in {"src", "href", "xlink:href", "action", "srcset"}
    ]
    assert all(value.startswith("#") for value in loading)
    assert not re.search(r"@import|url\((?!#)", html)
    identifiers = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names, not addresses
    assert set(re.findall(r"https?://[^\"'\s<]+", html)) <= identifiers
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in document.attributes


def test_the_same_page_is_the_same_bytes(page, tmp_path):
    first = write_page(tmp_path / "a.html", page).read_bytes()
    assert write_page(tmp_path / "b.html", page).read_bytes() == first
    assert first.decode("utf-8") == render(page)


class TestTables:
    def test_no_number_is_marked_as_the_best(self, page):
        (table,) = page.sections[0].tables
        assert "<strong" not in render(Page("", sections=[Section("", tables=[table])]))

    def test_unfinished_rows_say_so(self, page):
        assert render(page).count('<em class="badge">unfinished</em>') == 1

    def test_no_value_is_a_dash(self):
        html = render(Page("", sections=[Section("", tables=[Table([Column("a")], [Row([None])])])]))
        assert "<span>\N{EN DASH}</span>" in html

    def test_rows_must_fit_the_columns(self):
        with pytest.raises(ValueError, match=r"shorter|longer"):
            render(Page("", sections=[Section("", tables=[Table([Column("a")], [Row(["b", "c"])])])]))


class TestWriting:
    def test_it_makes_the_folder_and_leaves_nothing_else(self, page, tmp_path):
        path = write_page(tmp_path / "runs" / "one" / "report.html", page)
        assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]

    @pytest.mark.parametrize("step", ["fsync", "replace"])
    @pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
    def test_a_failure_leaves_the_old_report(self, page, tmp_path, monkeypatch, step, failure):
        path = tmp_path / "report.html"
        path.write_text("old")

        def fail(*_: object) -> None:
            raise failure

        monkeypatch.setattr(os, step, fail)
        expected = CheckpointError if isinstance(failure, OSError) else KeyboardInterrupt
        with pytest.raises(expected):
            write_page(path, page)
        assert path.read_text() == "old"
        assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]

    def test_a_page_that_cant_be_rendered_leaves_the_old_report(self, page, tmp_path):
        path = tmp_path / "report.html"
        path.write_text("old")
        with pytest.raises(TypeError):
            write_page(path, replace(page, sections=[Section("", figures=[Figure(["not a drawing"], "")])]))
        assert path.read_text() == "old"

    def test_a_folder_in_the_way_is_named(self, page, tmp_path):
        (tmp_path / "report.html").mkdir()
        with pytest.raises(CheckpointError, match=r"cannot write .*report\.html") as caught:
            write_page(tmp_path / "report.html", page)
        assert caught.value.hint

    def test_half_a_surrogate_pair_does_not_stop_it(self, tmp_path):
        assert "?" in write_page(tmp_path / "report.html", Page("broken \ud83d emoji")).read_text("utf-8")
