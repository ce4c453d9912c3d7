import xml.etree.ElementTree as ElementTree

import matplotlib
import pytest

from monteclora.reports.svg import INK, SERIES, Svg, house_style, label, new_figure, to_svg

NAMESPACE = "{http://www.w3.org/2000/svg}"


@house_style()
def drawing(text: str = "text", description: str = "a line", colour: str = SERIES[1]) -> Svg:
    figure = new_figure(2.0)
    axes = figure.add_subplot(title=text)
    axes.plot([0, 1], [0, 1], color=colour, gid="line")
    return to_svg(figure, description)


def texts(svg: Svg) -> list[str]:
    return [element.text for element in ElementTree.fromstring(svg).iter(f"{NAMESPACE}text")]


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "$5 & $6", "a_1^2 ‖π‖²", "客户 🙂", 'id="x" url(#y)'])
def test_text_stays_that_text(text, recwarn):
    svg = drawing(text, description=text).with_id_prefix("a-")
    assert text in texts(svg)
    assert ElementTree.fromstring(svg).get("aria-label") == text
    assert "<script" not in svg
    assert not recwarn.list


def test_colours_follow_the_page():
    svg = drawing()
    assert f"var(--series-1, {SERIES[1]})" in svg
    assert "currentColor" in svg
    assert INK not in svg


def test_a_colour_named_in_text_is_left_alone():
    svg = drawing(SERIES[0], description=SERIES[0])
    assert SERIES[0] in texts(svg)
    assert ElementTree.fromstring(svg).get("aria-label") == SERIES[0]


def test_nothing_reaches_outside_the_element():
    svg = drawing()
    assert svg.startswith("<svg ")
    assert svg.endswith("</svg>")
    for forbidden in ("<style", "<metadata", "<!--", "<image", "<script"):
        assert forbidden not in svg


def test_prefixed_ids_are_unique_and_every_reference_still_resolves():
    both = ElementTree.fromstring(f"<div>{drawing().with_id_prefix('a-')}{drawing().with_id_prefix('b-')}</div>")
    ids = [element.get("id") for element in both.iter() if element.get("id")]
    references = [element.get("{http://www.w3.org/1999/xlink}href") for element in both.iter()]
    references += [(element.get("clip-path") or "")[4:-1] for element in both.iter()]
    references = [reference for reference in references if reference]
    assert len(ids) == len(set(ids))
    assert references
    assert {reference.removeprefix("#") for reference in references} <= set(ids)


def test_the_callers_matplotlib_configuration_neither_matters_nor_changes():
    expected = drawing()
    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9, "svg.fonttype": "path"}):
        before = dict(matplotlib.rcParams)
        assert drawing() == expected
        assert dict(matplotlib.rcParams) == before


def test_a_label_is_one_short_line():
    assert label("a\nb\x00c\td") == "a b c d"
    assert label("LoRA") == "LoRA"
    assert len(label("x" * 500)) == 32
    assert label("x" * 500).endswith("…")
    assert label("\ud83d").strip() == ""  # half of a surrogate pair
