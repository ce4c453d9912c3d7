"""``monteclora report``."""

from __future__ import annotations

from pathlib import Path

from monteclora.cli.output import Json, print_json, print_line

__all__ = ["report"]


def report(run: Path, /, *, split: str | None = None, as_json: Json = False) -> None:
    """Write a page about a finished run, or about a study as far as it is.

    Of a run: its training, its metrics, its calibration and its most uncertain rows. Of a study: which arm is robust,
    with the evidence, and every trial. The page is one file, report.html in the folder, and needs no network.

    Args:
        run: a run folder or a study folder.
        split: of a run: train, validation or test; by default test where it has labels, else validation.
    """
    from monteclora.errors import ConfigError
    from monteclora.reports.run_report import write_run_report
    from monteclora.reports.study_report import write_study_report
    from monteclora.studies.folder import StudyFolder

    if StudyFolder(run).recipe_file.is_file():
        if split is not None:
            raise ConfigError(f"{run} is a study, and --split is of a run", "The study's recipe says the split.")
        page = write_study_report(run)
    else:
        page = write_run_report(run, split)
    if as_json:
        print_json({"report": page})
        return
    print_line(f"report: {page}")
