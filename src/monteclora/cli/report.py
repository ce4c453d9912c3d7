"""``monteclora report``."""

from __future__ import annotations

from pathlib import Path

from monteclora.cli.output import Json, print_json, print_line

__all__ = ["report"]


def report(run: Path, /, *, split: str | None = None, as_json: Json = False) -> None:
    """Write a page about a finished run: its training, its metrics, its calibration and its most uncertain rows.

    The page is one file, report.html in the run folder, and needs no network.

    Args:
        run: a run folder.
        split: train, validation or test; by default test where it has labels, else validation.
    """
    from monteclora.reports.run_report import write_run_report

    page = write_run_report(run, split)
    if as_json:
        print_json({"report": page})
        return
    print_line(f"report: {page}")
