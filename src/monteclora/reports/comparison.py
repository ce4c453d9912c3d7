"""Runs beside each other: methods and samplers by metric, with intervals, and paired differences on the same rows.

Intervals are percentile bootstraps over the evaluated rows (Efron 1979). Every resample is the same rows for all that
is compared, so that differences are paired: what makes a row hard for both cancels. Runs that differ in their seed
alone are repetitions, whose mean is compared; what another seed would give is not in the intervals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from monteclora.errors import DataError
from monteclora.metrics.registry import METRICS, metrics_for
from monteclora.reports.compared_evaluations import Entry, compared_entries
from monteclora.runs.data_facts import data_facts
from monteclora.runs.determining import recipe_sha256

__all__ = ["Compared", "Comparison", "Estimate", "compare_runs"]

RESAMPLES = 500
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A number with the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether a difference is more than the choice of rows explains."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Compared:
    """A row of the comparison: a method with a sampler and a calibrator, in one run or in repetitions of it.

    Attributes:
        label: for people, unique in the comparison.
        runs: their folders.
        values: by metric, mean over the runs.
        range: by metric, the lowest and the highest of the runs' values.
        differences: by metric, this row's minus the first row's; empty for the first row.
        best: metrics in which it is better than every other row by more than the choice of rows explains.
        seconds, peak_memory_bytes: of training, mean over the runs.
        trained_parameters: of one run.
    """

    label: str
    runs: tuple[Path, ...]
    values: Mapping[str, Estimate]
    range: Mapping[str, tuple[float, float]]
    differences: Mapping[str, Estimate]
    best: frozenset[str]
    seconds: float
    peak_memory_bytes: float
    trained_parameters: int


@dataclass(frozen=True)
class Comparison:
    """Runs beside each other; the first row is what the others are compared with.

    Attributes:
        task: that all learned.
        split: that all are evaluated on.
        rows: of it.
        metrics: by name, in the order in which they are shown.
        compared: the rows of the comparison.
        notes: what a reader of the numbers must know, in words.
    """

    task: str
    split: str
    rows: int
    metrics: tuple[str, ...]
    compared: tuple[Compared, ...]
    notes: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        found = dataclasses.asdict(self)
        for row in found["compared"]:
            row |= {"runs": [str(run) for run in row["runs"]], "best": sorted(row["best"])}
        return found


def compare_runs(
    folders: Sequence[str | Path], split: str | None = None, *, seed: int = 0, progress: bool = True
) -> Comparison:
    """Compare finished runs of one task on the same rows.

    Every evaluation of the split that a run folder holds is a row: ``monteclora evaluate RUN --sampler laplace`` adds
    one. A run without an evaluation of its own on that split, as its method predicts, is evaluated first; one that is
    stored stays as it is, with as many draws as it was made with. Where the run's weights or its posterior's scale
    changed since, or runs were evaluated on differently many rows, it is made again for the comparison and not kept,
    and a note says so; a changed run's evaluations by other samplers and calibrators are left out.

    Args:
        folders: of the runs; the first one's own evaluation is what the others are compared with.
        split: by default that of the first run's own evaluation, test before validation; where it has none, test where
            its data have it, else validation.
        seed: of the resampling.
        progress: whether evaluations draw a progress bar on standard error.

    Raises:
        CheckpointError: not a run, an unfinished or a damaged one.
        ConfigError: an argument does not fit the runs.
        DataError: the split is missing, has too few rows, or runs were evaluated on different rows.
    """
    entries, split, known = compared_entries(folders, split, progress=progress)
    _check_same_rows(entries, split)
    groups = _groups(entries)
    names = [metric.name for metric in metrics_for(entries[0].data.scoring)]
    draws = _resampled(groups, names, seed)
    labels = _labels(groups)
    reference = next(iter(groups))
    compared = []
    for key, group in groups.items():
        finished = [entry.run.finished or {} for entry in group]
        by_run = {name: [entry.data.measure(name) for entry in group] for name in names}
        differences = {} if key == reference else {n: _difference(draws, groups, key, reference, n) for n in names}
        compared.append(
            Compared(
                label=labels[key],
                runs=tuple(entry.run.path for entry in group),
                values={n: _estimate(float(np.mean(by_run[n])), draws[key][n]) for n in names},
                range={n: (min(by_run[n]), max(by_run[n])) for n in names},
                differences=differences,
                best=frozenset(n for n in names if _is_best(draws, groups, key, n)),
                seconds=float(np.mean([each.get("seconds", 0.0) for each in finished])),
                peak_memory_bytes=float(np.mean([each.get("peak_memory_bytes", 0) for each in finished])),
                trained_parameters=int(finished[0].get("trained_parameters", 0)),
            )
        )
    return Comparison(
        task=data_facts(entries[0].run).name,
        split=split,
        rows=entries[0].data.rows,
        metrics=tuple(names),
        compared=tuple(compared),
        notes=(*known, *_notes(entries, groups)),
    )


def _check_same_rows(entries: Sequence[Entry], split: str) -> None:
    first = entries[0]
    for entry in entries:
        if entry.checksum != first.checksum or entry.data.scoring != first.data.scoring:
            raise DataError(
                f"{entry.run.path} ({entry.variant}) and {first.run.path} were evaluated on different {split} rows",
                "Compare runs of one task; evaluate them again if the rows changed.",
            )
    if first.data.rows < 2:
        raise DataError(f"the {split} split has {first.data.rows} row, too few for an interval", "Use another split.")


def _groups(entries: Sequence[Entry]) -> dict[tuple[str, str], list[Entry]]:
    """Evaluations of runs that differ in their seed alone, by recipe and variant; in the order given."""
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        recipe = dataclasses.replace(entry.run.recipe, seed=0)
        groups.setdefault((recipe_sha256(recipe), entry.variant), []).append(entry)
    return groups


def _labels(groups: Mapping[tuple[str, str], Sequence[Entry]]) -> dict[tuple[str, str], str]:
    """``lora + laplace``; with the first run's folder where two groups would be called alike."""
    found = {}
    for key, group in groups.items():
        recipe = group[0].run.recipe
        members = f" x {recipe.ensemble} ensemble" if recipe.ensemble > 1 else ""
        found[key] = " + ".join([f"{recipe.method.name}{members}", *key[1].split("+")[1:]])
    alike = [label for label in found.values() if list(found.values()).count(label) > 1]
    return {key: f"{label} ({groups[key][0].run.path})" if label in alike else label for key, label in found.items()}


_Draws = Mapping[tuple[str, str], Mapping[str, np.ndarray]]


def _resampled(groups: Mapping[tuple[str, str], Sequence[Entry]], names: Sequence[str], seed: int) -> _Draws:
    """Each group's metrics, mean over its runs, on the same resampled rows for all."""
    generator = np.random.default_rng(seed)
    rows = next(iter(groups.values()))[0].data.rows
    draws = {key: {name: np.empty(RESAMPLES) for name in names} for key in groups}
    for number in range(RESAMPLES):
        chosen = generator.integers(0, rows, rows)
        for key, group in groups.items():
            resampled = [entry.data.take(chosen) for entry in group]
            for name in names:
                draws[key][name][number] = np.mean([each.measure(name) for each in resampled])
    return draws


def _estimate(value: float, draws: np.ndarray) -> Estimate:
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.nanpercentile(draws, [tail, 100 - tail]) if np.isfinite(draws).any() else (np.nan, np.nan)
    return Estimate(value, float(low), float(high))


def _difference(
    draws: _Draws,
    groups: Mapping[tuple[str, str], Sequence[Entry]],
    one: tuple[str, str],
    other: tuple[str, str],
    name: str,
) -> Estimate:
    values = [float(np.mean([entry.data.measure(name) for entry in groups[key]])) for key in (one, other)]
    return _estimate(values[0] - values[1], draws[one][name] - draws[other][name])


def _is_best(draws: _Draws, groups: Mapping[tuple[str, str], Sequence[Entry]], key: tuple[str, str], name: str) -> bool:
    """Whether a group is better than each other one, and not inside the interval of their difference."""
    greater = METRICS[name].greater_is_better
    if greater is None or len(groups) < 2:
        return False
    found = [_difference(draws, groups, key, other, name) for other in groups if other != key]
    return all(each.low > 0 if greater else each.high < 0 for each in found)


def _notes(entries: Sequence[Entry], groups: Mapping[tuple[str, str], Sequence[Entry]]) -> tuple[str, ...]:
    counts = {len(group) for group in groups.values()}
    repeated = max(counts) > 1
    notes = ["intervals resample the evaluated rows; what other seeds would give is not in them"]
    if repeated:
        notes.append("values are means over runs that differ in their seed alone")
    if len(counts) > 1:
        notes.append(f"rows have between {min(counts)} and {max(counts)} runs")
    notes += [f"{entry.run.path} ({entry.variant}): {note}" for entry in entries for note in entry.notes]
    return tuple(dict.fromkeys(notes))
