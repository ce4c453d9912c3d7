"""When a run's answers can be trusted: sections of its page, each left out where nothing was measured for it.

Every figure and table has a sentence that takes no knowledge of Bayesian statistics.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from monteclora.data.corruption import STRENGTHS
from monteclora.evaluation.corrupted import TITLES
from monteclora.evaluation.error_detection import ERROR_SCORES
from monteclora.evaluation.result import EvaluationResult
from monteclora.evaluation.shift import COVERAGE, SCORES
from monteclora.metrics.registry import METRICS, Metric
from monteclora.metrics.selective import risk_coverage
from monteclora.prediction.predictions import Predictions
from monteclora.reports.formats import count, decimals
from monteclora.reports.page import Column, Figure, Row, Section, Table
from monteclora.reports.trust_figures import accuracy_by_coverage, corruption_lines, scale_curve

__all__ = ["scale_section", "trust_sections"]

_SHOWN = ("accuracy", "subset_accuracy", "rmse", "nll", "brier", "ece")
_DRAWN = ("accuracy", "subset_accuracy", "rmse", "nll")
_NUMBER = decimals(3)


def trust_sections(result: EvaluationResult) -> list[Section]:
    """Ranking of its own answers, outside texts, corrupted texts, as far as an evaluation measured them."""
    found = (_answers(result), _outside(result), _corrupted(result))
    return [section for section in found if section is not None]


def _answers(result: EvaluationResult) -> Section | None:
    found = result.scored.predictions
    if not isinstance(found, Predictions) or found.labels is None:
        return None
    right = found.probs.argmax(1) == found.labels
    curve = risk_coverage(found.probs.max(1), right)
    share, best, every = 100 * COVERAGE, 100 * curve.accuracy_at(COVERAGE), 100 * right.mean()
    caption = (
        f"If it answers all rows, {every:.0f} of 100 answers are right. If it answers only the {share:.0f} of 100 rows "
        f"that it is most confident of, {best:.0f} of 100 are. The dashed line is what rows at random would give."
    )
    tables = []
    if result.error_detection is not None:
        rows = [Row([ERROR_SCORES[name].capitalize(), value]) for name, value in result.error_detection.items()]
        words = (
            "Take one wrong and one right answer at random: how often the score finds the wrong one more doubtful. "
            "0.5 is guessing, 1 never errs."
        )
        tables = [Table([Column("Score"), Column("AUROC", _NUMBER)], rows, words)]
    return Section("Which answers to trust", figures=[Figure([accuracy_by_coverage(curve)], caption)], tables=tables)


def _outside(result: EvaluationResult) -> Section | None:
    ood = result.shift.ood
    if ood is None:
        return None
    rows = [Row([SCORES[name].capitalize(), of["auroc"], of["fpr95"]]) for name, of in ood["scores"].items()]
    caption = (
        "AUROC: take one of these texts and one row of the split at random: how often the score finds the strange text "
        "stranger; 0.5 is guessing. FPR95: the share of the strange texts that slip through when 95 of 100 ordinary "
        "rows are let through."
    )
    about = f"{count(ood['rows'])} texts that the model was not made for ({ood['file']}), and how well it notices them."
    columns = [Column("Score"), Column("AUROC", _NUMBER), Column("FPR95", _NUMBER)]
    return Section("Texts unlike the training data", [about], tables=[Table(columns, rows, caption)])


def _corrupted(result: EvaluationResult) -> Section | None:
    if not result.corrupted:
        return None
    clean = result.posterior or result.point
    metrics = [METRICS[name] for name in _SHOWN if name in clean]
    by_name: dict[str, dict[int, Mapping[str, float]]] = {}
    for each in result.corrupted:
        by_name.setdefault(each["corruption"], {})[each["strength"]] = each["posterior"] or each["point"]
    rows = [Row(["clean", None, *(clean[metric.name] for metric in metrics)])]
    for name, at in by_name.items():
        rows += [Row([TITLES[name], s, *(at[s][metric.name] for metric in metrics)]) for s in STRENGTHS]
    panels = [
        corruption_lines(
            {TITLES[n]: [clean[m.name], *(at[s][m.name] for s in STRENGTHS)] for n, at in by_name.items()}, _title(m)
        )
        for m in metrics
        if m.name in _DRAWN
    ]
    columns = [Column("Rows"), Column("Strength"), *(Column(_title(metric), _NUMBER) for metric in metrics)]
    return Section(
        "The same rows, as people write in a hurry",
        figures=[Figure(panels, " ".join(_words(clean, by_name)))],
        tables=[Table(columns, rows, "Nothing was fitted to corrupted rows.")],
    )


def _words(clean: Mapping[str, float], by_name: Mapping[str, Mapping[int, Mapping[str, float]]]) -> Iterator[str]:
    """What the strongest corruptions do, and whether the model notices."""
    last = STRENGTHS[-1]
    if "accuracy" not in clean:
        yield "Further from the clean rows on the left, the texts are harder to read."
        return
    worst = min(by_name, key=lambda name: by_name[name][last]["accuracy"])
    now = by_name[worst][last]
    yield (
        f"Of 100 clean rows {100 * clean['accuracy']:.0f} are answered right; hardest are {TITLES[worst]} at strength "
        f"{last}, with {100 * now['accuracy']:.0f}."
    )
    if "ece" in clean:
        yield (
            "A model that notices gets less confident along with it: there its confidence is off by "
            f"{100 * now['ece']:.0f} points on average (ECE), on clean rows by {100 * clean['ece']:.0f}."
        )


def _title(metric: Metric) -> str:
    return metric.label[0].upper() + metric.label[1:]


def scale_section(stored: Mapping[str, Any] | None) -> Section | None:
    """How the posterior's scale was chosen, from what ``calibrate`` left in ``calibration.json``."""
    if not stored or not stored.get("curve"):
        return None
    curve: Sequence[Mapping[str, float]] = stored["curve"]
    scales, chosen = [point["scale"] for point in curve], float(stored["factor"])
    names = [name for name in ("nll", "accuracy", "ece") if name in curve[0]]
    panels = [scale_curve(scales, [p[name] for p in curve], _title(METRICS[name]), chosen) for name in names]
    caption = (
        "Drawing from the posterior means asking several slightly different models; the scale says how different. "
        f"At 0 all are the same one. The line marks the scale that was chosen on {stored['fit_rows']} validation rows "
        f"({stored['criterion']}): {chosen:.3g}."
    )
    report: Mapping[str, Mapping[str, float]] = stored["report"]
    shown = [METRICS[name] for name in _SHOWN if name in next(iter(report.values()))]
    rows = [Row([stage, *(values[metric.name] for metric in shown)]) for stage, values in report.items()]
    table = Table(
        [Column("Predictions"), *(Column(_title(metric), _NUMBER) for metric in shown)],
        rows,
        f"Before and after, on {stored['report_rows']} rows that did not choose.",
    )
    return Section("The posterior's scale", figures=[Figure(panels, caption)], tables=[table])
