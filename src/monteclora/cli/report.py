"""``monteclora report``."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from monteclora.cli.output import Flag, Json, note, print_json, print_line, print_table
from monteclora.errors import ConfigError

__all__ = ["report"]

_Format = Literal["text", "markdown", "latex", "html"]
_COMPARISON = Path("comparison.html")


def report(
    run: Path,
    /,
    *others: Path,
    split: str | None = None,
    kind: Annotated[_Format | None, Parameter(name="--format")] = None,
    out: Path | None = None,
    watch: bool = False,
    ood: Path | None = None,
    shift: Flag = False,
    as_json: Json = False,
) -> None:
    """Write a page about a finished run, or about a study as far as it is; or compare several runs.

    Of a run: its training, its metrics, its calibration and its most uncertain rows. Of a study: which arm is robust,
    with the evidence, and every trial. The page is one file, report.html in the folder, and needs no network.
    Several runs, or one with --format, are compared: every evaluation of theirs, by metric, with bootstrap intervals
    and paired differences on the same rows. Runs that differ in their seed alone make one row.

    Args:
        run: a run folder or a study folder.
        others: more run folders, to compare with the first.
        split: of runs: train, validation or test; by default test where it has labels, else validation.
        kind: of a comparison: text, markdown or latex, to standard output or a file; or html, a page.
        out: the file of a comparison; by default standard output, of a page comparison.html in this folder.
        ood: of one run: a file of texts unlike the training data, as for monteclora evaluate.
        shift: of one run: also measure corrupted rows, as for monteclora evaluate.
        watch: of a running study: write the page anew whenever a trial is done, until none is left.
    """
    from monteclora.reports.run_report import write_run_report
    from monteclora.reports.study_report import watch_study_report, write_study_report
    from monteclora.studies.folder import StudyFolder

    study = StudyFolder(run).recipe_file.is_file()
    if watch and (not study or others or kind is not None):
        raise ConfigError(f"--watch is of a study, and {run} is none", "Leave it out, or give a study folder alone.")
    if (ood is not None or shift) and (study or others or kind is not None):
        raise ConfigError("--ood and --shift are of one run", "Evaluate each run with them first.")
    if others or kind is not None:
        if study:
            raise ConfigError(f"{run} is a study, and runs are compared", "Give runs, or a study by itself.")
        _compare([run, *others], split, kind or "text", out, as_json)
        return
    if out is not None:
        raise ConfigError("--out is of a comparison", "Give more runs, or a --format.")
    if study:
        if split is not None:
            raise ConfigError(f"{run} is a study, and --split is of a run", "The study's recipe says the split.")
        if watch:
            for page, left in watch_study_report(run):
                note(f"{page}: {left} trials are left" if left else f"{page}: all trials are done")
        else:
            page = write_study_report(run)
    else:
        page = write_run_report(run, split, ood=ood, shift=shift)
    if as_json:
        print_json({"report": page})
        return
    print_line(f"report: {page}")


def _compare(runs: Sequence[Path], split: str | None, kind: _Format, out: Path | None, as_json: bool) -> None:
    from monteclora.reports.comparison import compare_runs
    from monteclora.reports.comparison_tables import (
        latex,
        markdown,
        plain,
        rows_for_people,
        text_tables,
        write_comparison,
    )
    from monteclora.system.atomic import write_file

    found = compare_runs(runs, split)
    if kind == "html":
        command = shlex.join(["monteclora", "report", *map(str, runs), "--split", found.split, "--format", "html"])
        out = write_comparison(out or _COMPARISON, found, command)
    elif out is not None:
        write_file(out, {"markdown": markdown, "latex": latex, "text": plain}[kind](found).encode())
    if as_json:
        print_json({**found.facts(), "report": out})
        return
    if out is not None:
        print_line(f"report: {out}")
    elif kind == "text":
        for table in text_tables(found):
            print_table(table.header, rows_for_people(table), table.title)
        for words in found.notes:
            note(words)
    else:
        print_line((markdown if kind == "markdown" else latex)(found).rstrip())
