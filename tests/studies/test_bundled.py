"""The bundled studies load, and each of their trials is a valid recipe; without data and models."""

from __future__ import annotations

from typing import Any

import pytest

from monteclora.runs.bundled import bundled_recipes, bundled_studies, summary
from monteclora.runs.recipe import Recipe
from monteclora.studies import plan as module
from monteclora.studies.plan import make_plan
from monteclora.studies.recipe import load_study

TRIALS = {
    "study-helpdesk": 288, "study-helpdesk-starter": 12, "study-arc-easy": 12, "study-arc-easy-starter": 4,
    **{f"study-{task}": 80 for task in ("mrpc", "cola")},
    **{f"study-{task}-starter": 6 for task in ("mrpc", "cola")},
    **{f"study-paper-{task}": 192 for task in ("mrpc", "cola", "rte", "wic", "boolq")},
    **{f"study-paper-{task}-starter": 12 for task in ("mrpc", "cola", "rte", "wic", "boolq")},
    **{f"study-paper-{task}": 24 for task in ("commonsense", "gsm8k", "code")},
    **{f"study-paper-{task}-starter": 6 for task in ("commonsense", "gsm8k", "code")},
}  # fmt: skip


class WithoutFiles:
    """Stands in for what is read of data and models."""

    def __init__(self, study: Any) -> None:
        pass

    def of(self, recipe: Recipe) -> dict[str, str]:
        return {"data": recipe.data.task}

    def split(self, recipe: Recipe) -> str:
        return "test"


def test_every_bundled_study_has_its_twin_and_is_listed_here() -> None:
    assert set(TRIALS) == set(bundled_studies())
    assert {name.removesuffix("-starter") + "-starter" for name in TRIALS} <= set(TRIALS)
    rows = {name for name in bundled_recipes() if name.startswith("paper-") and not name.endswith("-starter")}
    assert {f"study-{name}" for name in rows} <= set(TRIALS)


@pytest.mark.parametrize(("name", "count"), TRIALS.items())
def test_a_bundled_study_has_the_trials_that_its_grid_says(
    name: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "Contents", WithoutFiles)
    plan = make_plan(load_study(name))
    assert len(plan.trials) == count
    text = summary(bundled_studies()[name])
    assert text.startswith("Study: ")
    if "runs" in text:
        assert f"{count} runs" in text
    seeds = {(t.arm, t.seed): 0 for t in plan.trials}
    for trial in plan.trials:
        seeds[trial.arm, trial.seed] += 1
    assert len(set(seeds.values())) == 1  # every arm has as many settings
    assert (plan.trials[0].recipe.model.name in ("minilm", "smollm2")) != (
        name.startswith("study-paper-") and not name.endswith("-starter")
    )
