"""``monteclora study``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from monteclora.cli.output import Json, note, print_json, print_line, print_table

if TYPE_CHECKING:
    from monteclora.studies.summary import Summary

__all__ = ["study"]


def study(
    recipe: str,
    /,
    *,
    out: Path | None = None,
    known: Annotated[tuple[Path, ...], Parameter(consume_multiple=True, show_default=False)] = (),
    workers: int | None = None,
    workers_per_device: int = 1,
    ray: str | None = None,
    optuna: str | None = None,
    as_json: Json = False,
) -> None:
    """Run a grid of trials, and measure how robust each method is against its settings.

    The same command again runs what is left; finished trials are never run again, failed ones are. Several commands,
    on machines that share the study's folder, divide its trials.

    Args:
        recipe: a study recipe, or the name of a bundled one.
        out: the study folder; by default the recipe's output, or studies/NAME.
        known: files results.parquet of earlier studies: outcomes of the same trials are taken from them.
        workers: processes on this machine; by default one for each core or GPU, 0 for none but this one.
        workers_per_device: processes that share a GPU.
        ray: the address of a Ray cluster whose nodes run the workers, or local for one of this machine.
        optuna: a URL such as sqlite:///study.db, where the trials are written as an Optuna study for optuna-dashboard.
    """
    from monteclora.studies.study import study as run

    result = run(
        recipe,
        output=None if out is None else str(out),
        known=known,
        workers=workers,
        workers_per_device=workers_per_device,
        ray=ray,
        optuna=optuna,
    )
    if as_json:
        print_json(
            {
                "folder": result.folder,
                "trials": len(result.plan.trials),
                "left": result.left,
                "notes": list(result.plan.notes),
                "outcomes": [vars(outcome) for outcome in result.outcomes.values()],
                "summaries": _plain(result.summaries),
                "centred": {
                    "windows": [vars(window) for window in result.centred.windows],
                    "notes": list(result.centred.notes),
                    "summaries": _plain(result.centred_summaries),
                },
            }
        )
        return
    _print_summaries(f"{result.folder}: {len(result.outcomes)} of {len(result.plan.trials)} trials", result.summaries)
    if result.centred_summaries:
        _print_summaries("Centred: each method around its own best value", result.centred_summaries)
    print_line(f"written: {result.folder / 'results.parquet'}, summary.md, summary.tex, paired.parquet")
    if result.left:
        note(f"{result.left} trials are left: the same command continues")


def _plain(summaries: Sequence[Summary]) -> list[dict[str, Any]]:
    return [{**vars(s), "statistics": {name: vars(e) for name, e in s.statistics.items()}} for s in summaries]


def _print_summaries(title: str, summaries: Sequence[Summary]) -> None:
    from monteclora.studies.wording import condition_in_words

    columns = ["method", "condition", "metric", "best", "median", "spread", "regret", "diverged", "collapsed", "failed"]
    rows = []
    for s in summaries:
        found = [s.statistics.get(name) for name in ("best", "median", "spread", "regret")]
        numbers = ["-" if estimate is None else f"{estimate.value:.4f}" for estimate in found]
        counts = [f"{n} of {s.trials}" for n in (s.diverged, s.collapsed, s.failed)]
        rows.append([s.arm, condition_in_words(s.condition), s.metric, *numbers, *counts])
    print_table(columns, rows, title, left=3)
