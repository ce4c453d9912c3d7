"""The page of a study, of a toy table whose statistics are worked out in tests/studies/test_summary.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from monteclora.errors import CheckpointError, DataError
from monteclora.reports import study_report
from monteclora.reports.figures import TrainingCurve
from monteclora.reports.formats import MINUS
from monteclora.reports.page import render
from monteclora.reports.run_report import training_curve
from monteclora.reports.study_figures import Dot, HeatMap, heat_map, loss_curves, scatter_plot, strip_plot
from monteclora.reports.study_report import study_page, watch_study_report, write_study_report
from monteclora.reports.study_verdict import Verdict, verdict
from monteclora.reports.svg import Svg
from monteclora.runs.run_folder import RunFolder
from monteclora.studies.folder import Outcome, StudyFolder
from monteclora.studies.study import StudyResult
from monteclora.studies.summary import summarise
from tests.studies.test_centring import made as centred_toy
from tests.studies.test_summary import TABLE, made


def result_of(
    table: dict[tuple[str, int, int], float | None], folder: Path, names: Mapping[str, str] | None = None
) -> StudyResult:
    plan, outcomes = made(table)
    trials = []
    for trial in plan.trials:
        run = folder / "trials" / trial.id
        settings = {**trial.settings, "training.batch_size": 8 * trial.settings["training.learning_rate"]}
        recipe = cast(Any, SimpleNamespace(folder=run, name=trial.id))
        trials.append(replace(trial, arm=(names or {}).get(trial.arm, trial.arm), settings=settings, recipe=recipe))
    study = cast(Any, SimpleNamespace(metric=None, name="toy", centre=None))
    plan = replace(plan, study=study, trials=tuple(trials))
    return StudyResult(folder, plan, outcomes, summarise(plan, outcomes))


def judged(found: StudyResult) -> Verdict:
    return verdict(found.plan, found.outcomes, found.summaries)


def test_verdict_claims_what_the_interval_over_seeds_shows(tmp_path: Path) -> None:
    cells = [(rate, seed) for rate in (1, 2, 3) for seed in (0, 1, 2)]
    narrow = {("n", rate, seed): 0.7 + 0.01 * rate for rate, seed in cells}
    wide = {("w", rate, seed): 0.4 + (0.1 + 0.01 * seed) * rate for rate, seed in cells}
    found = judged(result_of({**wide, **narrow}, tmp_path))
    assert found.sentences == ["n against w: more robust, judged by the spread."]
    # spreads 0.20, 0.22, 0.24 against 0.02: -0.18, -0.20, -0.22: s = 0.02, t = 4.3027, so 0.0497 to both sides
    (row,) = found.evidence
    assert (found.reference, row.arm, row.cells, row.seeds) == ("w", "n", 9, 3)
    assert row.spread is not None
    assert [row.spread.value, row.spread.low, row.spread.high] == pytest.approx([-0.2, -0.24968, -0.15032], abs=1e-5)
    assert judged(result_of({**narrow, **wide}, tmp_path)).sentences == [
        "w against n: less robust, judged by the spread."
    ]
    low = {("l", rate, seed): 0.3 + 0.01 * rate for rate, seed in cells}  # bad everywhere, and so with a small spread
    assert judged(result_of({**wide, **low}, tmp_path)).sentences == [
        "No trial of l beats the majority class: its spread tells nothing.",
        "l against w: more robust, judged by the spread; there it is worse on average.",
    ]


def test_verdict_makes_no_claim_it_cannot(tmp_path: Path) -> None:
    assert judged(result_of(TABLE, tmp_path)).sentences == [
        "b against a: 2 seeds, so no claim about which is the more robust."
    ]
    cells = [(arm, rate, seed) for arm in ("a", "b", "c") for rate in (1, 2) for seed in (0, 1, 2)]
    found = result_of({(a, r, s): 0.6 + 0.1 * r * (s == "abc".index(a)) for a, r, s in cells}, tmp_path)
    # the spreads differ by -0.1, 0.1 and 0; arms of which the same is to be said share a sentence
    assert judged(found).sentences == ["b; c against a: neither more nor less robust, as far as these seeds can tell."]
    one = result_of({key: value for key, value in TABLE.items() if key[2] == 0}, tmp_path)
    assert "one seed, so no claim" in judged(one).sentences[0]
    seeds_alone = {(arm, 1, seed): 0.6 + 0.1 * seed + 0.2 * (arm == "b") for arm in ("a", "b") for seed in (0, 1, 2)}
    found = result_of(seeds_alone, tmp_path)
    assert judged(found).sentences == ["b against a: one setting for each seed, so no spread to compare."]
    (row,) = judged(found).evidence
    assert row.spread is None
    assert row.difference.value == pytest.approx(0.2)
    assert "spread 0" not in render(study_page(found))
    alone = result_of({key: value for key, value in TABLE.items() if key[0] == "a"}, tmp_path)
    assert judged(alone) == Verdict(
        None, ["a: median accuracy 0.750, spread 0.300 over 6 trials, 1 of them collapsed."], []
    )


def test_verdict_says_first_where_nothing_was_learned(tmp_path: Path) -> None:
    cells = [(rate, seed) for rate in (1, 2) for seed in (0, 1, 2)]
    chance = {("c", *cell): 0.5 for cell in cells}  # the majority class of 100 rows, where a standard error is 0.05
    also = {("d", *cell): 0.54 if cell[1] else None for cell in cells}  # one seed diverged
    sentence = "No trial beats the majority class: nothing was learned, and no spread tells anything."
    assert judged(result_of({**chance, **also}, tmp_path)).sentences[0] == sentence
    learned = {("l", rate, seed): 0.6 + 0.1 * rate for rate, seed in cells}
    first, second = judged(result_of({**learned, **chance}, tmp_path)).sentences
    assert first == "No trial of c beats the majority class: its spread tells nothing."
    assert second.startswith("c against l: more robust")


def test_verdict_compares_with_the_first_arm_that_shares_cells(tmp_path: Path) -> None:
    cells = [(rate, seed) for rate in (1, 2) for seed in (0, 1, 2)]
    elsewhere = {("full", rate + 10, seed): 0.45 + 0.02 * rate for rate, seed in cells}  # rates of its own
    shared = {(arm, rate, seed): 0.6 + 0.1 * rate + 0.01 * seed for arm in ("a", "b") for rate, seed in cells}
    found = judged(result_of({**elsewhere, **shared}, tmp_path))
    assert found.sentences == [
        "No trial of full beats the majority class: its spread tells nothing.",
        "b against a: neither more nor less robust, as far as these seeds can tell.",
        "full: median accuracy 0.480, spread 0.020 over 6 trials, 6 of them collapsed.",
    ]
    assert (found.reference, [row.arm for row in found.evidence]) == ("a", ["b"])


def test_the_page_has_every_trial_and_escapes_names(tmp_path: Path) -> None:
    linked = tmp_path / "trials" / "a10"
    linked.mkdir(parents=True)
    (linked / "report.html").touch()
    (linked / "metrics.jsonl").write_text(
        '{"event": "train", "phase": "cooperative", "step": 10, "loss": 2.0}\n'
        '{"event": "train", "phase": "cooperative", "step": 20, "loss": 1.0}\n'
    )
    html = render(study_page(result_of(TABLE, tmp_path, {"b": "<b>bold</b>"})))
    assert "<b>bold" not in html
    assert "&lt;b&gt;bold" in html
    assert '<a href="trials/a10/report.html">a10</a>' in html
    assert all(f">{arm}{rate}{seed}<" in html for arm, rate, seed in TABLE)
    assert "<script" not in html
    assert f"0.300 ({MINUS}0.971 to 1.571)" in html  # the spread of a


def under(condition: int, result: StudyResult, outcomes: Mapping[str, Outcome]) -> StudyResult:
    """The same study with a second condition, whose trials have these outcomes by the ids of the first one's."""
    trials, found = [], dict(result.outcomes)
    for trial in result.plan.trials:
        name = f"{trial.id}-other"
        found[name] = replace(outcomes[trial.id], trial=name)
        trials += [
            replace(trial, conditions={"data.label_noise": 0}),
            replace(trial, id=name, conditions={"data.label_noise": condition}),
        ]
    plan = replace(result.plan, trials=tuple(trials))
    return StudyResult(result.folder, plan, found, summarise(plan, found))


@pytest.mark.parametrize(
    "lacking",
    [
        Outcome("", "failed", "OSError: no such disk"),
        Outcome("", "diverged", "not finite"),
        Outcome("", "finished", metrics={"nll": 0.5, "ece": 0.1}, seconds=2.0),
        Outcome("", "finished", metrics={"accuracy": float("nan"), "ece": float("nan")}, seconds=2.0),
    ],
    ids=["failed", "diverged", "another metric", "not finite"],
)
def test_a_condition_without_values_leaves_the_rest_of_the_page(tmp_path: Path, lacking: Outcome) -> None:
    first = result_of(TABLE, tmp_path)
    page = study_page(under(5, first, {trial.id: lacking for trial in first.plan.trials}))
    whole, other = [each for each in page.sections if each.title.startswith("With")]
    assert (whole.title, other.title) == ("With label noise 0", "With label noise 5")
    (alone,) = [each for each in study_page(first).sections if each.title == "Results"]
    assert [(len(f.panels), f.caption) for f in whole.figures] == [(len(f.panels), f.caption) for f in alone.figures]
    assert list(whole.paragraphs) == []
    assert list(other.paragraphs) == ["No trial has a value of accuracy yet."]
    assert list(other.figures) == []
    assert "No trial has a value of accuracy yet." in render(page)


def test_trials_without_the_leading_metric_are_no_dots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = result_of(TABLE, tmp_path)
    outcomes = {name: replace(outcome, seconds=10.0) for name, outcome in found.outcomes.items()}
    others = {"a10": {"nll": 0.5, "ece": 0.1}, "a20": {"accuracy": float("nan"), "ece": 0.1}}
    others |= {"a30": {"accuracy": 0.5, "ece": float("nan")}, "b10": {"accuracy": 0.7, "ece": 0.2}}
    outcomes |= {name: replace(outcomes[name], metrics=metrics) for name, metrics in others.items()}
    drawn: list[Mapping[str, Sequence[Dot]]] = []

    def draw(arms: Mapping[str, Sequence[Dot]], *labels: str, **options: bool) -> Svg:
        drawn.append(arms)
        return scatter_plot(arms, *labels, **options)

    monkeypatch.setattr("monteclora.reports.study_report.scatter_plot", draw)
    study_page(StudyResult(found.folder, found.plan, outcomes, summarise(found.plan, outcomes)))
    calibration, cost = drawn
    assert calibration == {"a": [], "b": [Dot(0.7, 0.2)]}
    assert cost["a"] == [Dot(accuracy, 10.0) for accuracy in (0.5, 0.8, 0.7, 0.6)]
    assert len(cost["b"]) == 5  # one diverged


def test_a_study_whose_trials_all_failed_has_a_page(tmp_path: Path) -> None:
    found = result_of(TABLE, tmp_path)
    failed = {name: Outcome(name, "failed", "OSError: no such disk") for name in found.outcomes}
    result = StudyResult(found.folder, found.plan, failed, summarise(found.plan, failed))
    html = render(study_page(result))
    assert "12 trials failed and have no value" in html
    assert "No trial has a value of accuracy yet." in html


def test_a_run_that_is_evaluated_in_several_ways_is_read_and_drawn_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = result_of(TABLE, tmp_path)
    first, second = (trial for trial in found.plan.trials if trial.id in ("a10", "a20"))
    trials = [replace(trial, id=f"{trial.id}-{way}") for trial in (first, second) for way in ("mean", "posterior")]
    trials.append(replace(first, id="another arm", arm="b"))  # which predicts in another way
    outcomes = {trial.id: Outcome(trial.id, "finished", metrics={"accuracy": 0.5}) for trial in trials}
    for trial in (first, second):
        trial.recipe.folder.mkdir(parents=True)
        line = '{"event": "train", "phase": "cooperative", "step": 10, "loss": 2.0}\n'
        (trial.recipe.folder / "metrics.jsonl").write_text(line)
    read: list[Path] = []

    def curve(run: RunFolder) -> TrainingCurve:
        read.append(run.path)
        return training_curve(run)

    monkeypatch.setattr("monteclora.reports.study_report.training_curve", curve)
    plan = replace(found.plan, trials=tuple(trials))
    page = study_page(StudyResult(found.folder, plan, outcomes, summarise(plan, outcomes)))
    (section,) = [section for section in page.sections if section.title == "Learning curves"]
    (figure,) = section.figures
    assert read == [first.recipe.folder, second.recipe.folder]
    assert [panel.count('id="curve-') for panel in figure.panels] == [2, 1]
    assert figure.caption.startswith("Training loss of every run whose folder is here.")


def test_the_page_has_the_view_around_each_arms_best_value(tmp_path: Path) -> None:
    plan, outcomes = centred_toy()
    folder = tmp_path / "trials"
    named = [replace(t, recipe=cast(Any, SimpleNamespace(folder=folder / t.id, name=t.id))) for t in plan.trials]
    plan = replace(plan, trials=tuple(named), study=cast(Any, SimpleNamespace(**vars(plan.study), name="toy")))
    result = StudyResult(tmp_path, plan, outcomes, summarise(plan, outcomes))
    page = study_page(result)
    (section,) = [section for section in page.sections if section.title == "Each arm around its own best value"]
    _, headline, *windows = section.paragraphs
    assert headline == "b against a: 2 seeds, so no claim about which is the more robust."
    assert windows == [
        "a (x 1): 3 values of learning rate around 1.0, from 0.1 to 10.0, chosen by validation accuracy.",
        "b (x 1): 3 values of learning rate around 0.01, from 0.001 to 0.1, chosen by validation accuracy.",
    ]
    evidence, table = section.tables
    # by the distance from the best: the spreads are 0.49 and 0.39 of a, 0.2 and 0.2 of b
    (row,) = evidence.rows
    assert row.cells[:4] == ["x 1", "b", 6, 2]
    assert str(row.cells[4]).replace(MINUS, "-").startswith("-0.240 (")
    assert [row.cells[:3] for row in table.rows] == [["x 1", "a", "accuracy"], ["x 1", "b", "accuracy"]]
    spread = [column.header for column in table.columns].index("Spread")
    assert [str(row.cells[spread])[:5] for row in table.rows] == ["0.440", "0.200"]
    assert "Each arm around its own best value" in render(page)
    one = replace(plan, trials=tuple(t for t in plan.trials if t.settings["training.learning_rate"] == 0.001))
    done = {trial.id: outcomes[trial.id] for trial in one.trials}
    page = study_page(StudyResult(tmp_path, one, done, summarise(one, done)))
    (section,) = [section for section in page.sections if section.title == "Each arm around its own best value"]
    assert section.paragraphs[1:] == ["not centred (x 1): an arm has a single learning rate."]
    assert not section.tables
    page = study_page(result_of(TABLE, tmp_path))  # a study without this view
    assert not [section for section in page.sections if section.title == "Each arm around its own best value"]


def test_figures_mark_diverged_trials_and_hold_their_numbers() -> None:
    strip = strip_plot({"a": [Dot(0.5), Dot(0.9, diverged=True)], "empty": []}, "accuracy", {"a": 0.35}, reference=0.3)
    assert 'id="diverged-0"' in strip
    assert 'id="reference"' in strip
    assert "spread 0.350" in strip  # what the table says, over the settings of a seed
    assert "spread" not in strip_plot({"a": [Dot(0.5), Dot(0.9)]}, "accuracy", {})
    values = np.array([[0.25, np.nan], [0.5, 0.75]])
    grid = HeatMap("a", "rate", "batch", ["1", "2"], ["8", "32"], values, np.array([[False, False], [False, True]]))
    drawn = heat_map(grid, 0.25, 0.75)
    assert "<image" not in drawn  # which the page would not load
    assert all(text in drawn for text in (">0.250<", ">\N{EN DASH}<", ">0.500<", "0.750 \N{MULTIPLICATION SIGN}"))
    assert "1000" in scatter_plot({"a": [Dot(0.5, 10.0), Dot(0.6, 1000.0)]}, "seconds", "accuracy", logarithmic=True)


def test_nothing_to_draw_is_said() -> None:
    for draw in (
        lambda: strip_plot({"a": []}, "accuracy", {}),
        lambda: scatter_plot({"a": [Dot(float("nan"))]}, "x", "y"),
        lambda: loss_curves("a", [], 0, 1.0),
    ):
        with pytest.raises(DataError, match="there is no"):
            draw()


def test_a_folder_that_is_no_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no study"):
        write_study_report(tmp_path)


def test_a_watched_page_is_written_when_a_trial_is_done_and_then_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = result_of(TABLE, tmp_path)
    names = list(whole.outcomes)

    def after(count: int) -> StudyResult:
        outcomes = {name: whole.outcomes[name] for name in names[:count]}
        return replace(whole, outcomes=outcomes, summaries=summarise(whole.plan, outcomes))

    states = iter([after(4), whole])
    folder = StudyFolder(tmp_path)
    written = iter([["a"], [], ["b"]])

    def run_on(seconds: float) -> None:
        """Trials that are done while the page waits."""
        for name in next(written):
            folder.write_outcome(Outcome(name, "finished"))

    monkeypatch.setattr(study_report, "read_study", lambda folder: next(states))
    monkeypatch.setattr(study_report.time, "sleep", run_on)
    seen = [(left, page.read_text(encoding="utf-8")) for page, left in watch_study_report(tmp_path)]
    assert [left for left, _ in seen] == [len(names) - 4, 0]
    assert ['http-equiv="refresh"' in html for _, html in seen] == [True, False]
    assert f">{names[3]}<" in seen[0][1]
