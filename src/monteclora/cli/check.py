"""``monteclora check``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from monteclora.cli.output import Json, note, print_facts, print_json, print_line
from monteclora.cli.overrides import Overrides, parse_overrides

if TYPE_CHECKING:
    from monteclora.training.check import CheckReport

__all__ = ["check"]


def check(recipe: str, /, *overrides: Overrides, as_json: Json = False) -> None:
    """Show what a recipe would train, on what, and what it would cost, without training.

    Works for a model too large for this machine, without its weights.
    Any value of the recipe can be changed by its dotted name: --training.learning_rate 1e-4.

    Args:
        recipe: a YAML file, or the name of a bundled recipe (see: monteclora recipes).
    """
    changes = parse_overrides(overrides)

    from monteclora.runs.recipe import load_recipe

    loaded = load_recipe(recipe, changes)  # a wrong recipe is reported before torch is loaded

    from monteclora.training.check import check as dry_run

    report = dry_run(loaded)
    if as_json:
        print_json(report.facts())
        return
    print_facts(_facts(report))
    print_line(
        "\nThe first rows as the model sees them" + (", what is learned in [[ ]]:" if report.predicts_tokens else ":")
    )
    for view in report.views:
        print_line(f"  {view}")
    for text in report.notes:
        note(text)


def _facts(report: CheckReport) -> list[tuple[str, str]]:
    from monteclora.reports.formats import size

    sizes, memory = report.sizes, report.memory
    rows = ", ".join(f"{count:,} {split}" for split, count in report.rows.items()) or "unknown"
    parts = (
        f"weights {size(memory.weights)}, optimiser {size(memory.optimizer)}, activations {size(memory.activations)}"
        + (f", the process itself {size(memory.process)}" if memory.process else "")
    )
    share = sizes.trained / sizes.parameters
    return [
        ("recipe", report.recipe.name),
        ("output", f"{report.recipe.folder} ({report.folder})"),
        ("task", f"{report.recipe.data.task or 'own files'} ({report.kind}): {rows} rows"),
        ("tokens", _tokens(report)),
        (
            "model",
            f"{report.recipe.model.name}: {sizes.parameters:,} parameters, {sizes.trained:,} trained ({share:.2%})",
        ),
        ("method", report.recipe.method.name),
        *(("trained" if i == 0 else "", f"{name} {n:,}") for i, (name, n) in enumerate(report.trained.items())),
        ("memory", f"about {size(memory.total)} a step ({parts}){'' if report.rows else ', for rows of full length'}"),
        ("time", _time(report)),
    ]


def _tokens(report: CheckReport) -> str:
    if report.tokens is None:
        return "unknown"
    about = "about " if report.tokens_estimated else ""
    return f"{about}{report.tokens[0]:.0f} a row on average, {about}{report.tokens[1]} at most"


def _time(report: CheckReport) -> str:
    from monteclora.reports.formats import duration

    if report.operations is None or report.least_seconds is None:
        return "unknown"
    test = f" and a learning-rate range test of at most {n}" if (n := report.range_test_steps) else ""
    time = f"{report.steps:,} steps{test}, {report.operations:.1e} operations"
    if report.seconds is not None:
        return f"{time}, about {duration(report.seconds)} on this machine (a step was measured)"
    return f"{time}, {duration(report.least_seconds)} or more on this machine (at the speed of its matrix products)"
