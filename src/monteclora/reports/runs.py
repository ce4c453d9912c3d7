"""The page of one run, and of several beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from monteclora.errors import DataError
from monteclora.reports import sections
from monteclora.reports.page import Page, Section
from monteclora.reports.results import RunReport

__all__ = ["demo_page", "run_page"]


def demo_page(
    runs: Sequence[RunReport],
    *,
    title: str,
    subtitle: str,
    compared: Sequence[str],
    environment: Mapping[str, str],
    reproduce: Sequence[str],
) -> Page:
    """Runs beside each other on the same test examples; the first is what the others are measured against.

    Args:
        runs: at least one, each with its own name.
        title: of the page.
        subtitle: one line under it.
        compared: paragraphs that say what was compared: model, data, methods, settings.
        environment: versions, devices and settings by name.
        reproduce: the commands that make this page, a line each.

    Raises:
        DataError: there is no run, two share a name, or a curve or group can't be drawn.
    """
    names = [run.name for run in runs]
    if not runs or len(set(names)) < len(names):
        raise DataError(
            f"the runs to report are named {names}; expected at least one, and no name twice",
            "Pass each run once.",
        )
    return Page(
        title=title,
        subtitle=subtitle,
        summary=sections.summary(runs),
        warnings=sections.warnings(runs),
        sections=[Section("What was compared", compared), *sections.measured(runs)],
        environment=environment,
        reproduce=reproduce,
    )


def run_page(
    run: RunReport,
    *,
    subtitle: str,
    trained: Sequence[str],
    environment: Mapping[str, str],
    reproduce: Sequence[str],
) -> Page:
    """The report of one run, with the run's name as title.

    Args:
        run: what to report.
        subtitle: one line under the title.
        trained: paragraphs that say what was trained, on what, and how.
        environment: versions, devices and settings by name.
        reproduce: the commands that make this page, a line each.

    Raises:
        DataError: a curve or group can't be drawn.
    """
    return Page(
        title=run.name,
        subtitle=subtitle,
        summary=sections.summary([run]),
        warnings=sections.warnings([run]),
        sections=[Section("What was trained", trained), *sections.measured([run])],
        environment=environment,
        reproduce=reproduce,
    )
