"""The sections that runs fill, each left out where no run has anything for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from monteclora.metrics.intervals import bootstrap_interval
from monteclora.metrics.registry import METRICS
from monteclora.reports.figures import (
    accuracy_bars,
    reliability_diagram,
    training_curves,
    uncertainty_histogram,
)
from monteclora.reports.formats import count, decimals, duration, signed, size
from monteclora.reports.page import Column, Figure, Row, Section, Table
from monteclora.reports.results import Evaluation, Example, RunReport

__all__ = ["measured", "summary", "warnings"]

_BOOTSTRAP_SEED = 0
_OVERLAID = 3  # more reliability curves than this hide each other

_METRICS = {metric.name: Column(metric.label[0].upper() + metric.label[1:], decimals(3)) for metric in METRICS.values()}
_COSTS = (Column("Time", duration), Column("Memory", size), Column("Parameters", count))


def _example(unit: str) -> tuple[Column, ...]:
    show = decimals(3) if unit == "nats" else "{:.3g}".format
    return (
        Column("Text"),
        Column("Label"),
        Column("Prediction"),
        Column("Confidence", decimals(2)),
        Column(f"Total ({unit})", show),
        Column(f"Epistemic ({unit})", show),
    )


def warnings(runs: Sequence[RunReport]) -> list[str]:
    """A warning for each run that did not finish, and all that is noted of the runs."""
    unfinished = [
        f"{run.name}: {run.status}. Its numbers and curves are those of a partly trained model."
        for run in runs
        if not run.finished
    ]
    return unfinished + [f"{run.name}: {note}." for run in runs for note in run.notes]


def summary(runs: Sequence[RunReport]) -> list[str]:
    """The findings, from finished runs alone.

    Where a method has several runs, the mean of each method; else each run against the first.
    """
    finished = {run.name: run.evaluation for run in runs if run.finished and run.evaluation}
    accuracies = _accuracies(runs)
    if any(len(values) > 1 for values in accuracies.values()):
        return [
            f"{method}: accuracy {np.mean(values):.3f} on average over {len(values)} runs, "
            f"{min(values):.3f} to {max(values):.3f}."
            for method, values in accuracies.items()
        ]
    reference, *others = runs
    if reference.name not in finished:
        return []
    first = finished[reference.name]
    leading = [
        f"{METRICS[name].label.partition(' (')[0]} {first.metrics[name]:.3f}{' nats' if name == 'nll' else ''}"
        for name in _leading(first)
    ]
    sentences = [f"{reference.name}: {', '.join(leading[:-1])} and {leading[-1]} on {count(len(first.nll))} examples."]
    for run in others:
        if run.name in finished:
            sentences.append(_comparison(run.name, finished[run.name], reference.name, first))
            sentences.extend(_cost(run, reference))
    return sentences


def _comparison(name: str, own: Evaluation, reference: str, first: Evaluation) -> str:
    def both(metric: str) -> str:
        return f"{own.metrics[metric]:.3f} against {first.metrics[metric]:.3f}"

    others = [f"{METRICS[metric].label} {both(metric)}" for metric in _leading(own) if metric != "nll"]
    text = f"{name} against {reference}: {', '.join(others)}, NLL {both('nll')} nats"
    if len(own.nll) == len(first.nll) > 1:
        change = bootstrap_interval(own.nll - first.nll, seed=_BOOTSTRAP_SEED)
        text += (
            f", a change of {signed(change.mean)} "
            f"(95 % interval {signed(change.low)} to {signed(change.high)}, paired bootstrap over examples)"
        )
    return text + "."


def _leading(evaluation: Evaluation) -> list[str]:
    """The metrics that findings name: the first there is, the NLL, and how far certainty can be trusted."""
    first = next(iter(evaluation.metrics))
    last = "ece" if "ece" in evaluation.metrics else "coverage_90"
    return [first, "nll", last]


def _cost(run: RunReport, reference: RunReport) -> list[str]:
    parts = []
    if run.seconds and reference.seconds:
        parts.append(f"{run.seconds / reference.seconds:.2f} times the training time")
    if run.peak_bytes and reference.peak_bytes:
        parts.append(f"{run.peak_bytes / reference.peak_bytes:.2f} times the peak memory")
    once = "each trained once, so other work on the machine counts"
    return [f"{run.name} took {' and '.join(parts)} of {reference.name} ({once})."] if parts else []


def measured(runs: Sequence[RunReport]) -> list[Section]:
    """Results, repetitions, calibration, training, uncertainty, the most uncertain examples and the worst errors."""
    candidates = (
        _results(runs),
        _repetitions(runs),
        _calibration(runs),
        _training(runs),
        _uncertainty(runs),
        _uncertain_examples(runs),
        _worst_errors(runs),
    )
    return [section for section in candidates if section is not None]


def _results(runs: Sequence[RunReport]) -> Section | None:
    measured_names = {name for run in runs if run.evaluation for name in run.evaluation.metrics}
    present = [name for name in _METRICS if name in measured_names]
    costs = [(run.seconds, run.peak_bytes, run.trained_parameters) for run in runs]
    shown = [index for index in range(len(_COSTS)) if any(values[index] is not None for values in costs)]
    if not present and not shown:
        return None
    rows = []
    for run, values in zip(runs, costs, strict=True):
        metrics = run.evaluation.metrics if run.evaluation else {}
        cells = [run.name, *(metrics.get(name) for name in present), *(values[index] for index in shown)]
        rows.append(Row(cells, unfinished=not run.finished))
    columns = [Column("Run"), *(_METRICS[name] for name in present), *(_COSTS[index] for index in shown)]
    directions = " ".join(
        f"{', '.join(headers)}: {words} is better."
        for greater, words in ((True, "higher"), (False, "lower"))
        if (headers := [_METRICS[name].header for name in present if METRICS[name].greater_is_better is greater])
    )
    caption = directions if present else ""
    if present and len([run for run in runs if run.finished]) > 1:
        caption += " No number is marked as the best: whether a difference is one, its interval says, not the table."
    return Section("Results", tables=[Table(columns, rows, caption)])


def _accuracies(runs: Sequence[RunReport]) -> dict[str, list[float]]:
    """Test accuracies of the finished runs of each method."""
    by_method: dict[str, list[float]] = {}
    for run in runs:
        if run.finished and run.evaluation and "accuracy" in run.evaluation.metrics:
            by_method.setdefault(run.method, []).append(run.evaluation.metrics["accuracy"])
    return by_method


def _repetitions(runs: Sequence[RunReport]) -> Section | None:
    accuracies = _accuracies(runs)
    if all(len(values) < 2 for values in accuracies.values()):
        return None
    caption = "Bar: mean over a method's finished runs. Dots: the runs. Figures: mean (worst to best)."
    return Section("Spread over runs", figures=[Figure([accuracy_bars(accuracies)], caption)])


def _calibration(runs: Sequence[RunReport]) -> Section | None:
    curves = {run.title: run.evaluation.reliability if run.evaluation else None for run in runs}
    if not any(curves.values()):
        return None
    caption = (
        "Each dot is a bin of confidence; its area grows with the number of examples in it, and its whisker is the "
        "95 % interval of its accuracy. On the dashed line the model is right as often as it is confident; below it, "
        "it is overconfident. "
        "ECE is the mean distance from the line, weighted by examples."
    )
    if len(curves) == 1:
        caption = f"{_fullest_bin(runs[0])} {caption}"
    if sum(curve is not None for curve in curves.values()) <= _OVERLAID:
        panels = [reliability_diagram(curves)]
    else:
        panels = [
            reliability_diagram({other: curve if other == name else None for other in curves})
            for name, curve in curves.items()
            if curve is not None
        ]
    return Section("Calibration", figures=[Figure(panels, caption)])


def _fullest_bin(run: RunReport) -> str:
    """The bin of confidence with the most answers, in a sentence that takes no knowledge of calibration."""
    assert run.evaluation is not None
    assert run.evaluation.reliability is not None
    curve = run.evaluation.reliability
    fullest = int(curve.counts.argmax())
    confidence, right = 100 * curve.confidence[fullest], 100 * curve.accuracy[fullest]
    return f"Of 100 answers that it gave with about {confidence:.0f} % confidence, {right:.0f} were right."


def _training(runs: Sequence[RunReport]) -> Section | None:
    curves = {run.title: run.training for run in runs}
    if not any(curves.values()):
        return None
    caption = (
        "The loss is how wrong the model is on the rows it learns from: it should fall. Of a long loss curve, the thin "
        "line is what was logged and the thick one its moving mean."
    )
    if any(curve and len(curve.validation_nll) for curve in curves.values()):
        caption += (
            " Validation NLL is how wrong it is on rows that it does not learn from: where it rises while the loss "
            "falls, the rows are learned by heart. The ring is the step whose weights were kept."
        )
    if any(curve and len(curve.tempered_nll) for curve in curves.values()):
        caption += (
            " At the best temperature it is what is left of that once the confidence of all answers is put right: "
            "the lowest chose the step."
        )
    if any(curve and curve.kl is not None for curve in curves.values()):
        caption += (
            " KL is how far the posterior has moved from the prior. ‖π‖² is 1 when one component of the "
            "mixture carries all the weight, and 1/N when all N carry the same."
        )
    return Section("Training", figures=[Figure(training_curves(curves), caption)])


def _uncertainty(runs: Sequence[RunReport]) -> Section | None:
    figures = []
    for place, run in enumerate(runs):
        if not run.uncertainty:
            continue
        total = {name: np.asarray(group.total) for name, group in run.uncertainty.items()}
        epistemic = {name: np.asarray(group.epistemic) for name, group in run.uncertainty.items()}
        panels = [uncertainty_histogram(total, "total uncertainty", place, run.unit)]
        if any(values.any() for values in epistemic.values()):
            panels.append(uncertainty_histogram(epistemic, "epistemic uncertainty", place, run.unit))
        what = "entropy" if run.unit == "nats" else "variance"
        caption = (
            f"{run.title}. Total: {what} of the mean prediction. Epistemic: the part of it that is doubt "
            "about the weights. Bars are shares of each group; a line marks its median. The further right a row "
            "is, the less sure the model was of it."
        )
        figures.append(Figure(panels, caption))
    return Section("Uncertainty", figures=figures) if figures else None


def _uncertain_examples(runs: Sequence[RunReport]) -> Section | None:
    tables = [
        _examples(
            run.uncertain_examples, run.unit, f"{run.title}. A dash stands for an example without a right answer."
        )
        for run in runs
        if run.uncertain_examples
    ]
    return Section("Most uncertain examples", tables=tables) if tables else None


def _worst_errors(runs: Sequence[RunReport]) -> Section | None:
    caption = "Wrong answers, the surest first: look here for wrong labels, and for what the model has not understood."
    tables = [_examples(run.worst_errors, run.unit, f"{run.title}. {caption}") for run in runs if run.worst_errors]
    return Section("Sure and wrong", tables=tables) if tables else None


def _examples(examples: Sequence[Example], unit: str, caption: str) -> Table:
    rows = [Row((e.text, e.label or None, e.prediction, e.confidence, e.total, e.epistemic)) for e in examples]
    return Table(_example(unit), rows, caption)
