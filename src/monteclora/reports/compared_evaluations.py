"""Which evaluations of runs stand beside each other: those of the weights that the runs have now, on the same rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

from monteclora.evaluation.result import EvaluationResult
from monteclora.evaluation.run import evaluate, evaluate_loaded
from monteclora.reports.scored_rows import ScoredRows, scored_rows
from monteclora.runs.calibration import joint_sha256
from monteclora.runs.data_facts import data_facts
from monteclora.runs.ensemble import load_runs
from monteclora.runs.records import read_evaluations, read_predictions
from monteclora.runs.run_folder import RunFolder

__all__ = ["OWN", "Entry", "compared_entries"]

OWN = "adapter"
"""The variant that predicts as its method does."""


@dataclass(frozen=True)
class Entry:
    """One evaluation of one run.

    Attributes:
        run: which.
        variant: how it predicted.
        checksum: of the rows.
        data: their predictions and labels.
        notes: what a reader of the numbers must know, in words.
    """

    run: RunFolder
    variant: str
    checksum: str
    data: ScoredRows
    notes: tuple[str, ...]


@dataclass
class _Stored:
    """What a run has of a split, by variant, and what became of it, in words."""

    run: RunFolder
    facts: Mapping[str, Mapping[str, Any]]
    anew: dict[str, EvaluationResult] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    left_out: set[str] = field(default_factory=set)

    @property
    def as_stored(self) -> list[str]:
        """Variants that are compared as they are stored."""
        return [name for name in self.facts if name not in self.anew and name not in self.left_out]

    @property
    def checksums(self) -> set[str]:
        """Of the rows of what is compared."""
        again = {result.source.sha256 for result in self.anew.values()}
        return again | {self.facts[name]["sha256"] for name in self.as_stored}


def compared_entries(
    folders: Sequence[str | Path], split: str | None, *, progress: bool
) -> tuple[list[Entry], str, tuple[str, ...]]:
    """What is compared of these runs: a run's own evaluation before its others; the split; and what must be known.

    A run without an evaluation of its own is evaluated, and keeps it. One that was stored with other weights than the
    run has now, or with fewer rows where not all have the same, is made again for this comparison and not kept; of
    other samplers and calibrators it is left out.

    Raises:
        CheckpointError, ConfigError, DataError: see :func:`monteclora.reports.comparison.compare_runs`.
    """
    every: list[_Stored] = []
    for folder in dict.fromkeys(map(Path, folders)):
        run = RunFolder.existing(folder)
        stored = read_evaluations(folder)
        if split is None:
            own = [name for name in ("test", "validation") if OWN in stored.get(name, {})]
            split = own[0] if own else evaluate(folder, progress=progress).split
        elif OWN not in stored.get(split, {}):
            evaluate(folder, split, progress=progress)
        found = read_evaluations(folder)[split]
        # the pretrained model alone is no method
        every.append(_Stored(run, {name: facts for name, facts in found.items() if not name.startswith("base")}))
    assert split is not None
    for each in every:
        for variant in each.facts:
            if why := _other_weights(each, variant):
                _replace(each, variant, split, why, progress)
    if len(set().union(*(each.checksums for each in every))) > 1:
        for each in every:
            for variant in each.as_stored:
                if why := _part(each, variant, split):
                    _replace(each, variant, split, why, progress)
    entries = [entry for each in every for entry in _entries(each, split)]
    return entries, split, tuple(note for each in every for note in each.notes)


def _other_weights(stored: _Stored, variant: str) -> str | None:
    """Why an evaluation does not tell of the run as it is now, in words; None where it does."""
    facts = stored.facts[variant]
    if not (known := facts.get("weights_sha256")):
        stored.notes.append(
            f"{stored.run.path} ({variant}): evaluated by a version that did not note the weights; where they changed "
            "since, evaluate again"
        )
        return None
    parts = [run.path for run in stored.run.members] or [stored.run.path]
    if variant != OWN and facts["members"]:
        parts = [Path(folder) for folder in facts["members"]]
        if not all(folder.is_dir() for folder in parts):
            stored.notes.append(f"{stored.run.path} ({variant}): its members are not where they were evaluated")
            return None
    same = joint_sha256(RunFolder(folder).adapter for folder in parts) == known
    return None if same else "its weights or the posterior's scale changed since it was evaluated"


def _part(stored: _Stored, variant: str, split: str) -> str | None:
    """Why an evaluation has other rows than those of other runs, in words; None where it has all of its split."""
    facts = stored.facts[variant]
    whole = facts.get("split_rows") or data_facts(stored.run).rows.get(split, 0)
    return f"it was evaluated on {facts['rows']} of {whole} {split} rows" if facts["rows"] < whole else None


def _replace(stored: _Stored, variant: str, split: str, why: str, progress: bool) -> None:
    """Evaluate a run as its method predicts again, without keeping it; leave any other evaluation out."""
    path, facts = stored.run.path, stored.facts[variant]
    again = f"monteclora evaluate {quote(str(path))} --split {split}"
    if variant != OWN:
        stored.left_out.add(variant)
        stored.notes.append(f"{path} ({variant}) is left out: {why}; evaluate it again the same way")
        return
    stored.anew[variant] = evaluate_loaded(
        load_runs(path, None),
        split,
        num_samples=facts["num_samples"],
        seed=facts["seed"],
        keep=False,
        progress=progress,
    )
    stored.notes.append(f"{path}: {why}; it was evaluated anew for this comparison, `{again}` keeps that")


def _entries(stored: _Stored, split: str) -> list[Entry]:
    """What is compared of a run."""
    run, found = stored.run, []
    kind = data_facts(run).kind
    for variant, facts in stored.facts.items():
        if variant in stored.left_out:
            continue
        if result := stored.anew.get(variant):
            data = scored_rows(kind, result.scored.table, run.path)
            found.append(Entry(run, variant, result.source.sha256, data, result.notes))
        else:
            data = scored_rows(kind, read_predictions(run.path, split, variant), run.path)
            found.append(Entry(run, variant, facts["sha256"], data, tuple(facts.get("notes", ()))))
    return sorted(found, key=lambda entry: (entry.variant != OWN, entry.variant))
