import re
from dataclasses import replace

import pytest

from monteclora.errors import DataError
from monteclora.reports.page import Page, render, write_page
from monteclora.reports.results import Example, RunReport
from monteclora.reports.runs import demo_page, run_page
from tests.reports.test_page import Document

UNFINISHED = "interrupted at step 120 of 400"


def demo(runs: list[RunReport]) -> Page:
    return demo_page(
        runs,
        title="LoRA beside MonteCLoRA",
        subtitle="minilm on helpdesk",
        compared=["Two adapters."],
        environment={"Python": "3.11"},
        reproduce=["monteclora demo"],
    )


@pytest.fixture(scope="module")
def page(runs) -> Page:
    return demo(runs)


@pytest.fixture(scope="module")
def unfinished(runs) -> Page:
    """The same page, but the second run stopped early."""
    return demo([runs[0], replace(runs[1], status=UNFINISHED)])


def titles(page: Page) -> list[str]:
    return [section.title for section in page.sections]


def cells(page: Page) -> list[list[str]]:
    """The results table as shown, without spaces that only keep numbers together."""
    html = render(page).replace("\N{NO-BREAK SPACE}", " ")
    table = html[html.index("<h2>Results") :].partition("</table>")[0]
    rows = re.findall(r'<tr role="row".*?</tr>', table, flags=re.DOTALL)
    return [
        [re.sub(r"<[^>]+>", "", cell).strip() for cell in re.findall(r"<t[hd].*?</t[hd]>", row, flags=re.DOTALL)]
        for row in rows
    ]


def test_every_section_in_reading_order(page):
    assert titles(page) == [
        "What was compared",
        "Results",
        "Calibration",
        "Training",
        "Uncertainty",
        "Most uncertain examples",
    ]
    assert page.warnings == []
    assert "unfinished" not in re.sub(r"<style>.*?</style>", "", render(page), flags=re.DOTALL).lower()


def test_the_table_holds_the_metrics_and_the_costs(runs, page):
    header, plain, bayesian = cells(page)
    assert header == [
        *["Run", "Accuracy", "F1", "MCC", "NLL (nats)", "Brier", "ECE"],
        *["Time", "Memory", "Parameters"],
    ]
    assert plain[0] == "LoRA"
    assert plain[1] == f"{runs[0].evaluation.metrics['accuracy']:.3f}"
    assert bayesian[4] == f"{runs[1].evaluation.metrics['nll']:.3f}"
    assert bayesian[7:] == ["50 s", "1.10 GB", "1 024"]


def test_repetitions_show_their_spread(runs):
    repeated = [replace(run, name=f"{run.name}, seed {seed}") for run in runs for seed in (0, 1)]
    page = demo(repeated)
    assert "Spread over runs" in titles(page)
    (calibration,) = [section for section in page.sections if section.title == "Calibration"]
    assert len(calibration.figures[0].panels) == 4  # beside each other: four overlaid can't be told apart


class TestUnfinished:
    def test_the_page_says_so_before_any_number(self, unfinished):
        html = render(unfinished)
        banner = html.index(f"MonteCLoRA: {UNFINISHED}")
        assert re.search(r"0\.\d{3}", html[html.index("<body>") :]).start() + html.index("<body>") > banner

    def test_each_place_with_its_numbers_says_so(self, unfinished):
        by_title = {section.title: section for section in unfinished.sections}
        assert [row.unfinished for row in by_title["Results"].tables[0].rows] == [False, True]
        for section in ("Calibration", "Training"):
            assert all("unfinished: MonteCLoRA" in panel for panel in by_title[section].figures[0].panels)
        assert by_title["Uncertainty"].figures[1].caption.startswith("unfinished: MonteCLoRA")
        assert by_title["Most uncertain examples"].tables[0].caption.startswith("unfinished: MonteCLoRA")

    def test_it_does_not_count_as_a_repetition(self, runs):
        again = replace(runs[0], name="LoRA, seed 1", status=UNFINISHED)
        assert "Spread over runs" not in titles(demo([runs[0], again]))


def test_what_is_noted_of_a_run_stands_before_its_numbers(runs):
    noted = replace(runs[1], notes=["the run went on from step 4 with training.max_steps 8 -> 12"])
    page = demo([runs[0], noted])
    assert page.warnings == ["MonteCLoRA: the run went on from step 4 with training.max_steps 8 -> 12."]
    html = render(page)
    assert html.index("went on from step 4") < html.index("Results")
    # both runs came to their end
    assert "unfinished" not in html[html.index("<body>") :].lower()


def test_a_run_that_failed_before_it_measured_anything(runs):
    failed = RunReport("MonteCLoRA", "MonteCLoRA", "diverged at step 3")
    page = demo([runs[0], failed])
    assert cells(page)[2][1:] == ["\N{EN DASH}"] * 9
    assert titles(demo([failed])) == ["What was compared"]


def test_a_plain_run_has_no_epistemic_panel(page):
    (uncertainty,) = [section for section in page.sections if section.title == "Uncertainty"]
    assert [len(figure.panels) for figure in uncertainty.figures] == [1, 2]


def test_one_run(runs):
    page = run_page(runs[1], subtitle="s", trained=["One adapter."], environment={}, reproduce=["monteclora report"])
    assert page.title == "MonteCLoRA"
    assert titles(page)[:2] == ["What was trained", "Results"]
    assert len(page.summary) == 1
    assert "as the best" not in render(page)


@pytest.mark.parametrize("choose", [lambda runs: [], lambda runs: [runs[0], runs[0]]])
def test_runs_are_told_apart_by_name(runs, choose):
    with pytest.raises(DataError, match="expected at least one, and no name twice"):
        demo(choose(runs))


def test_the_page_is_deterministic(runs, page):
    assert render(demo(runs)) == render(page)


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"


def test_what_comes_out_of_data_and_recipes_stays_text(runs, tmp_path):
    """A label, a text, a file name and a recipe's name are no markup, wherever the page shows them."""
    example = Example(HOSTILE, HOSTILE, HOSTILE, 0.3, 1.0, 0.2)
    uncertainty = {HOSTILE: runs[1].uncertainty["in-scope"]}
    hostile = replace(runs[1], name=HOSTILE, method=HOSTILE, uncertain_examples=[example], uncertainty=uncertainty)
    about = {
        "subtitle": f"{HOSTILE}.csv",
        "environment": {"data": f"{HOSTILE}.csv"},
        "reproduce": [f"monteclora train '{HOSTILE}.yaml'"],
    }
    for run in (hostile, replace(hostile, status=HOSTILE)):
        for page in (
            run_page(run, trained=[HOSTILE], **about),
            demo_page([runs[0], run], title=HOSTILE, compared=[HOSTILE], **about),
        ):
            document = Document(write_page(tmp_path / "report.html", page).read_text("utf-8"))
            assert not {"script", "img"} & set(document.tags)
            assert not any(name.startswith("on") for name, _ in document.attributes)
            assert any("<script>alert(1)</script>" in text for text in document.texts)
