"""The page of a study: its verdict with the evidence, and every trial."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np

from monteclora.errors import CheckpointError
from monteclora.metrics.registry import METRICS, Metric
from monteclora.reports.figures import TrainingCurve
from monteclora.reports.formats import decimals, duration
from monteclora.reports.page import Cell, Column, Figure, Link, Page, Row, Section, Table, write_page
from monteclora.reports.run_report import training_curve
from monteclora.reports.study_figures import Dot, HeatMap, heat_map, loss_curves, scatter_plot, strip_plot
from monteclora.reports.study_tables import evidence_table, statistics_table
from monteclora.reports.study_verdict import verdict
from monteclora.runs.run_folder import RunFolder
from monteclora.studies.centring import describe_window
from monteclora.studies.folder import Outcome, StudyFolder
from monteclora.studies.plan import Trial
from monteclora.studies.study import StudyResult, read_study
from monteclora.studies.summary import by_condition, primary_metric, trial_values
from monteclora.studies.wording import key_in_words, values_in_words

__all__ = ["STUDY_PAGE", "study_page", "watch_study_report", "write_study_report"]

STUDY_PAGE = "report.html"
_POLL = 5  # seconds
_RATE = "training.learning_rate"


def write_study_report(folder: Path) -> Path:
    """Write ``report.html`` into a study's folder, of what is done of it so far.

    Raises:
        CheckpointError: not a study, nothing of it is done, a file of it is damaged, or the page cannot be written.
        ConfigError: its recipe is wrong.
        DataError: its data are not there or wrong.
    """
    result = read_study(folder)
    if not result.outcomes:
        raise CheckpointError(
            f"nothing of {folder} is done yet", f"Run monteclora study {quote(str(folder / 'study.yaml'))}."
        )
    return write_page(folder / STUDY_PAGE, study_page(result))


def watch_study_report(folder: Path) -> Iterator[tuple[Path, int]]:
    """Write the page anew whenever a trial is done, until none is left; a browser that shows it loads it again.

    Yields:
        The page, each time it was written, and how many trials have no outcome yet.

    Raises as :func:`write_study_report`, but waits where nothing is done yet.
    """
    seen: frozenset[tuple[str, int]] = frozenset()
    while True:
        found = StudyFolder(folder).outcome_versions()
        if found != seen:  # reading a study reads its data too
            seen, result = found, read_study(folder)
            page = replace(study_page(result), refresh=_POLL if result.left else 0)
            yield write_page(folder / STUDY_PAGE, page), result.left
            if not result.left:
                return
        time.sleep(_POLL)


def study_page(result: StudyResult) -> Page:
    """The page of a study that has results. Raises DataError where a curve cannot be drawn."""
    plan, outcomes = result.plan, result.outcomes
    metric = primary_metric(plan, outcomes)
    groups = by_condition(plan, outcomes)
    warnings = [f"{result.left} of {len(plan.trials)} trials are not done yet."] if result.left else []
    failed = [t.label for t in plan.trials if t.id in outcomes and outcomes[t.id].status == "failed"]
    warnings += [f"{len(failed)} trials failed and have no value: {'; '.join(failed[:3])} …"] if failed else []
    sections = [_section(result, group, metric) for group in groups]
    found = verdict(plan, outcomes, result.summaries)
    evidence = [Section(f"Against {found.reference}", tables=[evidence_table(found)])] if found.evidence else []
    return Page(
        title=plan.study.name,
        subtitle=f"{len(outcomes)} of {len(plan.trials)} trials, {len(_arms(result))} arms",
        summary=found.sentences,
        warnings=warnings + list(plan.notes),
        sections=[
            *evidence,
            _how(result, metric),
            *sections,
            *_centred(result),
            _curves(result),
            _trials(result, metric),
        ],
        reproduce=[
            f"monteclora study {quote(str(result.folder / 'study.yaml'))} --out {quote(str(result.folder))}",
            f"monteclora report {quote(str(result.folder))}",
        ],
    )


def _arms(result: StudyResult) -> list[str]:
    return list(dict.fromkeys(trial.arm for trial in result.plan.trials))


def _how(result: StudyResult, metric: Metric) -> Section:
    """What was varied, and how the numbers are to be read."""
    values: dict[str, list[Any]] = {}
    for trial in result.plan.trials:
        for key, value in {**trial.conditions, **trial.settings, "seed": trial.seed}.items():
            values.setdefault(key, []).append(value)
    varied = "; ".join(f"{key_in_words(key)} {', '.join(map(_short, _levels(found)))}" for key, found in values.items())
    better = "higher" if metric.greater_is_better else "lower"
    return Section(
        "How to read this",
        [
            f"Each trial is one training run with one choice of settings. Varied: {varied}.",
            f"An arm is robust where its trials lie close together and none falls off: the spread is the distance from "
            f"its best to its worst trial in {metric.label} ({better} is better), taken over the settings of one seed "
            "and averaged over seeds. In brackets are 95 % intervals over seeds (Student's t). A diverged trial counts "
            "as a prediction that does not look at its row; a cross marks it.",
        ],
    )


def _section(result: StudyResult, group: Sequence[Trial], metric: Metric) -> Section:
    """The figures and the table of one condition."""
    outcomes = result.outcomes
    arms = _arms(result)
    values = trial_values(group, outcomes, metric)
    skill = [o.no_skill[metric.name] for t in group if metric.name in (o := outcomes[t.id]).no_skill]
    strips = {
        arm: [
            Dot(values[t.id], diverged=outcomes[t.id].status == "diverged")
            for t in group
            if t.arm == arm and t.id in values
        ]
        for arm in arms
    }
    summaries = [summary for summary in result.summaries if summary.condition == group[0].conditions]
    spreads = {
        s.arm: s.statistics["spread"].value for s in summaries if s.metric == metric.name and "spread" in s.statistics
    }
    figures: list[Figure] = []
    paragraphs: list[str] = []
    if any(np.isfinite(value) for value in values.values()):
        figures.append(
            Figure(
                [strip_plot(strips, metric.label, spreads, skill[0] if skill else None)],
                "Every trial is a dot; the bar reaches from the worst to the best of all seeds, the tick is the median"
                + (", and the dashed line is what the class frequencies alone are worth." if skill else "."),
            )
        )
    else:
        paragraphs.append(f"No trial has a value of {metric.label} yet.")
    if maps := _heat_maps(group, outcomes, values, arms, metric):
        figures.append(
            Figure(
                maps,
                f"Mean {metric.label} over seeds at each pair of settings, on one scale of colours: an arm whose cells "
                "look alike is robust. A cross marks a cell in which a trial diverged.",
            )
        )
    figures += _against(group, outcomes, arms, metric)
    condition = values_in_words(group[0].conditions)
    table = statistics_table(summaries)
    return Section(f"With {condition}" if condition else "Results", paragraphs, figures, [table] if table.rows else [])


def _heat_maps(
    group: Sequence[Trial],
    outcomes: Mapping[str, Outcome],
    values: Mapping[str, float],
    arms: Sequence[str],
    metric: Metric,
) -> list[Any]:
    """A map for each arm over the learning rate and the setting with the most values besides."""
    maps = []
    for arm in arms:
        own = [t for t in group if t.arm == arm and t.id in values]
        levels = {key: _levels([t.settings[key] for t in own]) for t in own[:1] for key in t.settings}
        axes = sorted((k for k, v in levels.items() if len(v) > 1), key=lambda k: (k != _RATE, -len(levels[k])))[:2]
        if len(axes) < 2:
            continue
        x, y = axes
        shape = (len(levels[y]), len(levels[x]))
        means, diverged = np.full(shape, np.nan), np.zeros(shape, dtype=bool)
        for row, column in np.ndindex(shape):
            cell = [t for t in own if t.settings[x] == levels[x][column] and t.settings[y] == levels[y][row]]
            if cell:
                means[row, column] = np.mean([values[t.id] for t in cell])
                diverged[row, column] = any(outcomes[t.id].status == "diverged" for t in cell)
        columns, rows = ([_short(value) for value in levels[key]] for key in axes)
        if np.isfinite(means).any():
            maps.append(HeatMap(arm, key_in_words(x), key_in_words(y), columns, rows, means, diverged))
    if not maps:
        return []
    everything = np.concatenate([m.values[np.isfinite(m.values)] for m in maps])
    return [heat_map(_oriented(m, metric), float(everything.min()), float(everything.max())) for m in maps]


def _oriented(grid: HeatMap, metric: Metric) -> HeatMap:
    """The title says which end is good."""
    return grid if metric.greater_is_better else replace(grid, title=f"{grid.title} (lower is better)")


def _levels(values: Sequence[Any]) -> list[Any]:
    """Each value once, numbers in their order."""
    found = [value for number, value in enumerate(values) if value not in values[:number]]
    return sorted(found) if all(isinstance(value, int | float) for value in found) else found


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _against(
    group: Sequence[Trial], outcomes: Mapping[str, Outcome], arms: Sequence[str], metric: Metric
) -> list[Figure]:
    """The metric against calibration, and cost against it, of trials that have a value of it."""
    finished = {
        arm: [o for t in group if t.arm == arm and np.isfinite((o := outcomes[t.id]).metrics.get(metric.name, np.nan))]
        for arm in arms
    }
    panels = []
    dots = {
        arm: [Dot(o.metrics[metric.name], o.metrics["ece"]) for o in found if np.isfinite(o.metrics.get("ece", np.nan))]
        for arm, found in finished.items()
    }
    if metric.name != "ece" and any(dots.values()):
        panels.append(scatter_plot(dots, METRICS["ece"].label, metric.label))
    costs = {arm: [Dot(o.metrics[metric.name], o.seconds) for o in found] for arm, found in finished.items()}
    if any(dot.x > 0 for dots in costs.values() for dot in dots):
        panels.append(scatter_plot(costs, "seconds of training", metric.label, logarithmic=True))
    caption = (
        "Left: further left is better calibrated. Right: further left is cheaper; times depend on the machine and on "
        "what else ran on it."
    )
    return [Figure(panels, caption)] if panels else []


def _centred(result: StudyResult) -> list[Section]:
    """The second view of the results; none where the study has none, or nothing of it is done."""
    found, summaries = result.centred, result.centred_summaries
    notes = [*(f"{describe_window(window)}." for window in found.windows), *(f"{note}." for note in found.notes)]
    if not summaries and not notes:
        return []
    intro = (
        "On one grid an arm can look robust only because its best value lies in the middle. Here every arm has as many "
        "values: its best one, chosen by the validation rows, and those nearest to it."
    )
    if not summaries:
        return [Section("Each arm around its own best value", [intro, *notes])]
    told = verdict(found.plan, result.outcomes, summaries, result.plan)
    tables = [evidence_table(told)] if told.evidence else []
    tables.append(statistics_table(summaries, conditions=any(summary.condition for summary in summaries)))
    return [Section("Each arm around its own best value", [intro, *told.sentences, *notes], tables=tables)]


def _curves(result: StudyResult) -> Section:
    """Training loss of every run whose folder is here, however many ways it is evaluated in."""
    found: dict[str, list[tuple[TrainingCurve, bool]]] = {}
    for trials in result.plan.runs:
        done = [trial for trial in trials if trial.id in result.outcomes]
        run = RunFolder(trials[0].recipe.folder)
        if done and run.metrics.path.is_file():
            drawn = training_curve(run), any(result.outcomes[trial.id].status == "diverged" for trial in done)
            for arm in dict.fromkeys(trial.arm for trial in done):  # of a study that compares ways to predict
                found.setdefault(arm, []).append(drawn)
    arms = _arms(result)
    starts = [c.loss[0] for curve in found.values() for c, _ in curve if len(c.loss) and np.isfinite(c.loss[0])]
    if not starts:
        return Section("Learning curves", ["The folders of the runs are not here."])
    highest = 1.5 * float(np.median(starts))
    panels = [loss_curves(arm, found[arm], arms.index(arm), highest) for arm in arms if arm in found]
    return Section(
        "Learning curves",
        figures=[
            Figure(
                panels,
                "Training loss of every run whose folder is here. Losses above the frame are cut; a cross ends a "
                "diverged one.",
            )
        ],
    )


def _trials(result: StudyResult, metric: Metric) -> Section:
    """Every trial that is done, with a link to its page."""
    keys = list(dict.fromkeys(key for t in result.plan.trials for key in {**t.conditions, **t.settings}))
    names = [name for name in dict.fromkeys((metric.name, "nll", "ece")) if name in METRICS]
    rows = []
    for trial in result.plan.trials:
        outcome = result.outcomes.get(trial.id)
        if outcome is None:
            continue
        folder = Path("trials") / trial.recipe.folder.name
        there = (result.folder / folder / "report.html").is_file()
        identity: Cell = Link(trial.id, f"{folder.as_posix()}/report.html") if there else trial.id
        settings: list[Cell] = [
            _short(v) if (v := {**trial.conditions, **trial.settings}.get(key)) is not None else None for key in keys
        ]
        numbers: list[Cell] = [outcome.metrics.get(name) for name in names]
        rows.append(Row([trial.arm, *settings, trial.seed, outcome.status, *numbers, outcome.seconds, identity]))
    columns = [
        Column("Arm"),
        *(Column(key_in_words(key)) for key in keys),
        Column("Seed"),
        Column("Status"),
        *(Column(METRICS[name].label, decimals(3)) for name in names),
        Column("Time", duration),
        Column("Trial"),
    ]
    caption = "A trial's own page is linked where it was written: monteclora report " + str(result.folder / "trials/ID")
    return Section("Every trial", tables=[Table(columns, rows, caption)])
