"""``training.back_off``: what a run goes back to, and that nothing of the failed attempt is left in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from monteclora.errors import ConfigError, DivergenceError
from monteclora.runs.metrics_log import MetricsLog
from monteclora.runs.recipe import load_recipe
from monteclora.runs.run_folder import RunFolder
from monteclora.training import back_off
from monteclora.training.checkpoint import Checkpoints
from monteclora.training.loop import Loop
from monteclora.training.watch import LossWatch
from tests.training.conftest import Recipe, StopAfter, adapter_content, quietly, train_until, without_times
from tests.training.processes import launch
from tests.training.test_checkpoint import assert_same

MakeRecipe = Callable[..., Recipe]
# 40 steps, five an epoch; by 20 the loss of the tiny model has fallen
LONG: dict[str, Any] = {"epochs": 8, "learning_rate": 3e-2, "eval_every": 10, "method_options": {"lora_dropout": 0.0}}


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has weights go to nan at a step, at every peak learning rate above ``limit``."""

    def plant(step: int, limit: float) -> None:
        original = Loop.step

        def poisoned(loop: Loop, batches: Any) -> None:
            if loop.state.step + 1 == step and loop.scheduler.base_lrs[0] > limit:
                with torch.no_grad():
                    next(p for p in loop.model.parameters() if p.requires_grad).fill_(math.nan)
            original(loop, batches)

        monkeypatch.setattr(Loop, "step", poisoned)

    return plant


def of(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in RunFolder(folder).metrics.read() if event["event"] == kind]


@pytest.mark.parametrize("kind", ["classification", "causal_lm"])
def test_from_the_start_it_is_the_run_at_half_the_rate(
    kind: str, fails: Callable[..., None], recipe: MakeRecipe, tmp_path: Path
) -> None:
    fails(7, limit=6e-3)
    back = quietly(recipe(kind, name="back", back_off=1))
    given = quietly(recipe(kind, name="given", learning_rate=5e-3))
    assert adapter_content(tmp_path / "back") == adapter_content(tmp_path / "given")
    (event,) = of(back.folder, "back_off")
    assert (event["step"], event["left_step"], event["number"], event["learning_rate"]) == (0, 6, 1, 5e-3)
    assert "not finite at step 7" in event["reason"]
    for name in ("train", "eval"):
        kept = ("step", "loss", "nll", "learning_rate")
        one, other = ([{k: e.get(k) for k in kept} for e in of(r.folder, name)] for r in (back, given))
        assert one == other
    assert (back.back_offs, back.learning_rate) == (1, 5e-3)
    assert back.tokens == given.tokens + event["tokens"] > given.tokens
    assert back.seconds > event["seconds"]
    assert not (back.folder / "diverged.json").exists()


def test_back_to_the_last_good_evaluation_and_resumed_to_the_bit(
    fails: Callable[..., None], recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fails(34, limit=2e-2)
    made = {**LONG, "back_off": 2, "best_metric": "nll", "keep_checkpoints": 1}
    whole = quietly(recipe(name="whole", **made))
    (event,) = of(whole.folder, "back_off")
    assert (event["step"], event["left_step"]) in ((20, 33), (30, 33))
    parts = recipe(name="parts", **made)
    done = 0
    for more in (event["step"] + 2, 5, 4):  # before the failure, then during each attempt
        train_until(monkeypatch, StopAfter(more), parts)
        done += more
    quietly({**parts, "training": {**parts["training"], "save_every": 3}})  # which the result does not depend on
    assert adapter_content(tmp_path / "whole") == adapter_content(tmp_path / "parts")
    assert without_times(RunFolder(tmp_path / "whole").metrics.read()) == without_times(
        RunFolder(tmp_path / "parts").metrics.read()
    )


@pytest.mark.parametrize("place", ["discard_later", "rewind", "save"])
def test_killed_while_it_goes_back(
    place: str, fails: Callable[..., None], recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fails(7, limit=6e-3)
    whole, parts = recipe(name="whole", back_off=1), recipe(name="parts", back_off=1)
    quietly(whole)
    owner: Any = {"discard_later": back_off, "rewind": MetricsLog, "save": Checkpoints}[place]
    original = getattr(owner, place)
    calls = []

    def killed(*arguments: Any) -> Any:
        going = place == "discard_later" or (place == "rewind" and len(arguments) == 3)
        going = going or (place == "save" and arguments[1].state.back_offs == 1)
        if not calls and going:
            calls.append(1)
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(owner, place, killed)
    with pytest.raises(KeyboardInterrupt):
        quietly(parts)
    assert calls
    quietly(parts)
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_at_most_so_often(fails: Callable[..., None], recipe: MakeRecipe) -> None:
    fails(7, limit=0.0)
    made = recipe(back_off=2)
    with pytest.raises(DivergenceError, match="not finite at step 7"):
        quietly(made)
    folder = Path(made["output"])
    assert [event["number"] for event in of(folder, "back_off")] == [1, 2]
    assert [event["learning_rate"] for event in of(folder, "back_off")] == [5e-3, 2.5e-3]
    assert (folder / "diverged.json").is_file()


def test_by_what_the_loss_says(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a rate at which nothing is learned it goes back, and learns; the unplanted watch decides."""
    seen: list[float] = []
    original = LossWatch.see

    def see(watch: LossWatch, numbers: dict[str, float], measured: float, luck: float) -> None:
        seen.append(measured)
        original(watch, numbers, measured, luck)

    monkeypatch.setattr(LossWatch, "see", see)
    result = quietly(recipe(**{**LONG, "learning_rate": 2.0, "max_grad_norm": None, "back_off": 6}))
    found = of(result.folder, "back_off")
    assert found
    assert all("loss" in event["reason"] for event in found)
    assert result.back_offs == len(found)
    assert result.learning_rate == 2.0 / 2 ** len(found)
    assert len(seen) > 40


def test_what_learns_nothing_is_judged_before_it_is_stopped_early(recipe: MakeRecipe) -> None:
    """At seven tenths of the steps, and after the last return by the patience as ever."""
    made = {**LONG, "learning_rate": 1e-9, "eval_every": 2, "best_metric": "nll", "early_stopping_patience": 2}
    assert quietly(recipe(name="without", **made)).steps < 28
    result = quietly(recipe(name="back", **made, back_off=1))
    (event,) = of(result.folder, "back_off")
    assert (event["step"], event["learning_rate"]) == (0, 5e-10)
    assert event["left_step"] >= 28
    assert "frequencies of the classes" in event["reason"]
    assert result.steps < 28


def test_posterior_phase_never_goes_back(fails: Callable[..., None], recipe: MakeRecipe) -> None:
    fails(3, limit=2e-2)  # the posterior's phase has five times the rate
    made = recipe(mode="post_hoc", max_steps=4, post_hoc={"max_steps": 5}, back_off=3)
    with pytest.raises(DivergenceError):
        quietly(made)
    assert not of(Path(made["output"]), "back_off")


def test_a_number_of_times(recipe: MakeRecipe) -> None:
    with pytest.raises(ConfigError, match=r"training\.back_off is -1, expected at least 0"):
        load_recipe(recipe(back_off=-1))


@pytest.mark.slow
@pytest.mark.parametrize("place", ["fail_at", "spoil_at"])
def test_two_processes_go_back_together(place: str, recipe: MakeRecipe, tmp_path: Path) -> None:
    """Also where the main process alone finds it, in the weights that it saves."""
    options: dict[str, Any] = {"kind": "causal_lm", "micro_batch_size": 2, "max_steps": 6, "save_every": 4}
    launch(recipe(name="back", back_off=1, **options), tmp_path / "with", 2, **{place: 4})
    launch(recipe(name="given", learning_rate=5e-3, **options), tmp_path / "without", 2)
    (event,) = of(tmp_path / "back", "back_off")
    assert event["left_step"] == 4
    assert ("the weight" in event["reason"]) is (place == "spoil_at")
    assert adapter_content(tmp_path / "back") == adapter_content(tmp_path / "given")
