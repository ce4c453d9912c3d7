"""``monteclora train``."""

from __future__ import annotations

from shlex import quote
from typing import TYPE_CHECKING, Any

from monteclora.cli.output import Flag, Json, note, print_facts, print_json
from monteclora.cli.overrides import Overrides, parse_overrides

if TYPE_CHECKING:
    from monteclora.evaluation.verdict import Verdict
    from monteclora.runs.result import RunResult

__all__ = ["train"]


def train(recipe: str, /, *overrides: Overrides, override: Flag = False, as_json: Json = False) -> None:
    """Train a recipe, or resume the run in its folder.

    The same command again resumes an interrupted run.
    Any value of the recipe can be changed by its dotted name: --training.learning_rate 1e-4.

    Args:
        recipe: a YAML file, or the name of a bundled recipe (see: monteclora recipes).
        override: resume an unfinished run although its recipe or data changed, and record how.
    """
    changes = parse_overrides(overrides)

    from monteclora.reports.formats import duration, size
    from monteclora.runs.recipe import load_recipe

    loaded = load_recipe(recipe, changes)  # a wrong recipe is reported before torch is loaded

    from monteclora.evaluation.verdict import verdict
    from monteclora.system.devices import is_main_process
    from monteclora.training import sharding
    from monteclora.training.run import train as run

    result = run(loaded, override=override)
    if not is_main_process():
        return
    judged_run = result.members[0] if result.members else result.folder
    # a model that was sharded may not fit on the one device that is left to this process
    judged = verdict(judged_run, baseline=not sharding.is_requested())
    title = f"verdict on {judged_run.name}" if result.members else "verdict"
    if as_json:
        print_json(_facts(result, judged))
        return
    kept = "" if result.kept_step == result.steps else f", kept step {result.kept_step}"
    kept += f", {result.skipped_steps} skipped: not finite" if result.skipped_steps else ""
    cost = f"{duration(result.seconds)}, peak memory {size(result.peak_memory_bytes)}"
    print_facts(
        [
            ("trained", f"{result.steps} steps{kept} in {cost}, {result.trained_parameters:,} parameters"),
            *_learning_rate(result),
            *([("validation", "  ".join(f"{n} {v:.3f}" for n, v in result.metrics.items()))] if result.metrics else []),
            *[("" if number else title, text) for number, text in enumerate(judged.findings)],
            ("members", f"{len(result.members)} runs in {result.members[0].parent}")
            if result.members
            else ("adapter", str(result.adapter)),
            ("next", f"monteclora evaluate {quote(str(result.folder))}"),
        ]
    )
    for text in judged.warnings:
        note(text)


def _facts(result: RunResult, judged: Verdict) -> dict[str, Any]:
    """For machines."""
    return {
        "folder": result.folder,
        "adapter": None if result.members else result.adapter,
        "steps": result.steps,
        "kept_step": result.kept_step,
        "metrics": dict(result.metrics),
        "seconds": result.seconds,
        "peak_memory_bytes": result.peak_memory_bytes,
        "tokens": result.tokens,
        "trained_parameters": result.trained_parameters,
        "skipped_steps": result.skipped_steps,
        "findings": list(judged.findings),
        "warnings": list(judged.warnings),
        "learning_rate": result.learning_rate,
        "range_test_steps": result.range_test_steps,
        "members": list(result.members),
        "back_offs": result.back_offs,
        "temperature": result.temperature,
    }


def _learning_rate(result: RunResult) -> list[tuple[str, str]]:
    from monteclora.runs.result import learning_rate_found

    found = learning_rate_found(result.learning_rate, result.range_test_steps, result.back_offs)
    return [("learning rate", found)] if found else []
