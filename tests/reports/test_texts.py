"""The page of texts with shaded tokens."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from monteclora.reports.page import Page, render
from monteclora.reports.texts import text_sections, write_text_page


def record(prompt, *values):
    tokens = [
        {"text": text, "id": 1, "log_probability": -1.0, "total": total, "aleatoric": total - e, "epistemic": e}
        for text, total, e in values
    ]
    sequence = {"mean_log_probability": -1.0, "mean_total": 1.0, "mean_epistemic": 0.25}
    return {"prompt": prompt, "tokens": tokens, "sequence": sequence}


RECORDS = [record("Where?", (" In", 2.0, 0.5), ("\n<Rome>", 0.0, 0.0)), record("When?", (" now", 1.0, 0.1))]


def shades(html):
    return re.findall(r'<span class="shade-(\d+)" title="([^"]*)">([^<]*)</span>', html)


def test_every_token_is_shaded_by_its_share_of_the_most_on_the_page():
    found = shades(render(Page("x", sections=text_sections(RECORDS))))
    texts = [" In", "\n&lt;Rome&gt;"]
    assert [(int(step), text) for step, _, text in found] == [
        *zip((10, 0), texts, strict=True),  # total
        *zip((10, 0), texts, strict=True),  # epistemic
        (5, " now"),
        (2, " now"),
    ]
    assert found[0][1] == "total 2.00, epistemic 0.5000 nats, probability 0.37"


def test_without_draws_there_is_nothing_to_disagree():
    still = [record("Where?", (" In", 2.0, 0.0))]
    html = render(Page("x", sections=text_sections(still)))
    assert len(shades(html)) == 1
    assert "the draws disagree" not in html


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_the_first_texts_of_a_file(tmp_path, ending):
    records = [
        {**record(f"question {i}", (" a", 1.0, 0.1)), "answers": ["a", "b"], "agreement": 0.5} for i in range(14)
    ]
    records = [{**each, "answer": "a"} for each in records]
    path = tmp_path / f"out.{ending}"
    if ending == "jsonl":
        path.write_text("".join(json.dumps(each) + "\n" for each in records))
    else:
        pq.write_table(pa.Table.from_pylist(records), path)
    html = write_text_page(tmp_path / "page.html", path, title="a run", command="monteclora predict").read_text()
    assert f"The first 12 texts of out.{ending}" in html
    assert "question 11" in html
    assert "question 12" not in html
    assert "1 of 2 draws that wrote an answer of their own agree on: a" in html
