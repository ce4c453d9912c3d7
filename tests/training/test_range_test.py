"""``training.learning_rate: auto``: the rate is found where the loss says, and the test leaves no trace in the run."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from monteclora.errors import ConfigError, DivergenceError
from monteclora.runs.recipe import load_recipe
from monteclora.runs.run_folder import RunFolder
from monteclora.training import range_test, run
from monteclora.training.check import check
from monteclora.training.interruption import TrainingInterrupted
from monteclora.training.loop import Loop
from monteclora.training.range_test import LEAST, MOST, PROBE_EVERY, chosen_rate, fraction
from tests.training.conftest import Recipe, StopAfter, adapter_content, quietly, train_until, without_times
from tests.training.processes import launch

MakeRecipe = Callable[..., Recipe]
RATES = [float(10 ** (step / 12 - 6)) for step in range(60)]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test of few steps, for what does not depend on their number."""
    monkeypatch.setattr(range_test, "STEPS_PER_DECADE", 2)
    monkeypatch.setattr(range_test, "MOST_STEPS", 15)


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in RunFolder(folder).metrics.read() if event["event"] == kind]


def later(folder: Path) -> list[dict[str, Any]]:
    """What the run measured after the test, without its costs."""
    kept = [event for event in RunFolder(folder).metrics.read() if event["event"] not in ("range_test", "finished")]
    found: list[dict[str, Any]] = without_times(kept)
    return found


# -- the rule ---------------------------------------------------------------------------------------------------------


def valley(best: float, width: float = 0.4) -> list[float]:
    return [2.0 - math.exp(-((math.log10(rate / best) / width) ** 2)) for rate in RATES]


@pytest.mark.parametrize("width", [0.2, 0.4, 0.8])
@pytest.mark.parametrize("best", [1e-5, 1e-4, 1e-3, 1e-2])
def test_a_fraction_of_the_rate_in_the_middle_of_the_valley(best: float, width: float) -> None:
    rate, falls = chosen_rate(2.0, RATES, valley(best, width), 0.25)
    assert falls
    assert rate == pytest.approx(0.25 * best, rel=0.15)  # rates are 21 % apart


def test_a_long_flat_valley_is_not_taken_at_its_end() -> None:
    """As of a task that is learned late: the loss falls to that of the class frequencies, and stays there."""
    losses = [0.69 if rate < 1e-4 else 0.63 + 0.001 * (step % 3) for step, rate in enumerate(RATES)]
    rate, falls = chosen_rate(0.69, RATES[:49], losses[:49], 0.25)  # to 1e-2
    assert falls
    assert rate == pytest.approx(0.25 * 1e-3, rel=0.15)


def test_where_no_rate_helps_the_last_one_before_the_loss_rises() -> None:
    losses = [2.0 + max(0.0, math.log10(rate / 1e-3)) for rate in RATES]
    rate, falls = chosen_rate(2.0, RATES, [*losses[:-1], 2.0], 0.25)  # that it comes back at last does not count
    assert not falls
    assert rate == pytest.approx(0.25 * 1e-3, rel=0.15)


def test_where_the_loss_rises_at_once_a_fraction_of_the_lowest_rate() -> None:
    assert chosen_rate(2.0, RATES[:3], [3.0, 4.0, 5.0], 0.25) == (2.5e-7, False)


def test_the_more_steps_the_lower_the_rate() -> None:
    assert fraction(256) == pytest.approx(0.25)
    assert [fraction(steps) / fraction(4 * steps) for steps in (64, 144, 900)] == pytest.approx([2.0] * 3)
    assert (fraction(1), fraction(10**6)) == (MOST, LEAST)


@pytest.mark.usefixtures("short")
def test_the_steps_are_those_of_the_run(recipe: MakeRecipe) -> None:
    """Not those of the test: on the same curve a run of four times as many steps has half the rate."""
    few, more = (
        quietly(recipe(name=f"{steps}", learning_rate="auto", epochs=52, max_steps=steps)).learning_rate
        for steps in (64, 256)
    )
    assert more == pytest.approx(few / 2, rel=0.05)


def test_only_auto_is_a_word_for_a_rate(recipe: MakeRecipe) -> None:
    assert load_recipe(recipe(learning_rate="auto")).training.learning_rate == "auto"
    with pytest.raises(ConfigError, match=r"training\.learning_rate: expected a finite number or auto"):
        load_recipe(recipe(learning_rate="automatic"))
    with pytest.raises(ConfigError, match=r"training\.learning_rate is 0\.0, expected above 0"):
        load_recipe(recipe(learning_rate=0))


# -- the run ----------------------------------------------------------------------------------------------------------


def test_finds_a_rate_that_learns_and_says_what_it_cost(recipe: MakeRecipe) -> None:
    result = quietly(recipe(learning_rate="auto", max_steps=10))
    (found,) = events(result.folder, "range_test")
    assert result.learning_rate == found["learning_rate"]
    assert 3e-3 < result.learning_rate < 1e-1
    assert len(found["rates"]) == len(found["losses"]) == found["test_steps"] // PROBE_EVERY
    assert found["rates"][:2] == pytest.approx([10 ** (1 / 12 - 6), 10 ** (3 / 12 - 6)])
    assert min(found["losses"]) < found["initial_loss"] < found["losses"][-1]
    assert result.range_test_steps == found["test_steps"] < range_test.MOST_STEPS
    (phase,) = events(result.folder, "phase")
    assert result.tokens == found["tokens"] + phase["tokens"]
    assert result.seconds == pytest.approx(found["seconds"] + phase["seconds"])


CASES: dict[str, dict[str, Any]] = {
    "accumulated": {"micro_batch_size": 4},
    "workers": {"num_workers": 2, "method": "lora"},
    "grouped by length": {"kind": "causal_lm", "group_by_length": True, "schedule": "cosine"},
    "post hoc": {"mode": "post_hoc", "max_steps": 4, "post_hoc": {"max_steps": 3, "learning_rate_factor": 2.0}},
}


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("case", CASES)
def test_the_run_is_that_of_the_rate_given_by_hand(case: str, recipe: MakeRecipe, tmp_path: Path) -> None:
    found = quietly(recipe(name="auto", learning_rate="auto", **CASES[case])).learning_rate
    quietly(recipe(name="given", learning_rate=found, **CASES[case]))
    assert adapter_content(tmp_path / "auto") == adapter_content(tmp_path / "given")
    assert later(tmp_path / "auto") == later(tmp_path / "given")


def test_every_group_of_parameters_keeps_its_ratio(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA+ trains B at 16 times the rate of A, in the test too."""
    ratios = set()
    original = Loop.step

    def step(loop: Loop, batches: Any) -> None:
        rates = [group["lr"] for group in loop.optimizer.param_groups]
        ratios.add(round(max(rates) / min(rates), 6))
        original(loop, batches)

    monkeypatch.setattr(Loop, "step", step)
    made = load_recipe(recipe(method="loraplus", learning_rate="auto", max_steps=1, warmup_ratio=0.0))
    quietly(made)
    assert ratios == {16.0}


# -- interruptions ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("short")
def test_stopped_in_the_test_it_begins_again(
    recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    quietly(recipe(name="whole", learning_rate="auto"))
    parts = recipe(name="parts", learning_rate="auto")
    with monkeypatch.context() as patch:
        patch.setattr(range_test, "stop_on_signals", lambda: _Given(StopAfter(7)))
        with pytest.raises(TrainingInterrupted, match="begins it again"):
            quietly(parts)
    assert events(tmp_path / "parts", "range_test") == []
    quietly(parts)
    whole, again = (without_times(events(tmp_path / name, "range_test")) for name in ("whole", "parts"))
    assert whole == again
    assert adapter_content(tmp_path / "whole") == adapter_content(tmp_path / "parts")


class _Given:
    def __init__(self, interruption: StopAfter) -> None:
        self.interruption = interruption

    def __enter__(self) -> StopAfter:
        return self.interruption

    def __exit__(self, *exception: Any) -> None:
        return None


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("checkpoint", [False, True])
def test_what_was_found_is_not_looked_for_again(
    checkpoint: bool, recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    quietly(recipe(name="whole", learning_rate="auto"))
    parts = recipe(name="parts", learning_rate="auto")
    if checkpoint:
        train_until(monkeypatch, StopAfter(3), parts)
    else:
        with monkeypatch.context() as patch:  # killed after the test, before the first checkpoint
            patch.setattr(run, "train_phase", lambda *arguments, **options: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                quietly(parts)
    monkeypatch.setattr(run, "range_test", lambda *arguments: 1 / 0)
    quietly(parts)
    assert without_times(RunFolder(tmp_path / "whole").metrics.read()) == without_times(
        RunFolder(tmp_path / "parts").metrics.read()
    )
    assert adapter_content(tmp_path / "whole") == adapter_content(tmp_path / "parts")


# -- what is not finite ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 40])
def test_a_loss_that_is_not_finite_ends_the_test(
    steps: int, recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original = Loop.step

    def step(loop: Loop, batches: Any) -> None:
        if loop.steps > 100 and loop.state.step == steps:  # in the test
            with torch.no_grad():
                next(p for p in loop.model.parameters() if p.requires_grad).fill_(math.nan)
        original(loop, batches)

    monkeypatch.setattr(Loop, "step", step)
    if not steps:
        with pytest.raises(DivergenceError, match="not finite at the lowest rate"):
            quietly(recipe(learning_rate="auto"))
        return
    result = quietly(recipe(learning_rate="auto", max_steps=2))
    assert len(events(result.folder, "range_test")[0]["losses"]) == steps // PROBE_EVERY
    assert not (result.folder / "diverged.json").exists()


# -- elsewhere -------------------------------------------------------------------------------------------------------


def test_a_dry_run_counts_its_steps(recipe: MakeRecipe) -> None:
    given, auto = check(recipe()), check(recipe(learning_rate="auto"))
    assert (given.range_test_steps, auto.range_test_steps) == (0, range_test.MOST_STEPS)
    assert auto.steps == given.steps
    assert auto.operations / given.operations == pytest.approx(1 + range_test.MOST_STEPS / given.steps)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_two_processes_find_the_rate_of_one(sharded: bool, recipe: MakeRecipe, tmp_path: Path) -> None:
    def made(name: str, **training: Any) -> Recipe:
        options = {"sample_scale": 0.0, "lora_dropout": 0.0}
        return recipe(
            kind="causal_lm", name=name, method_options=options, learning_rate="auto", max_steps=4, **training
        )

    launch(made("one"), tmp_path / "one-process", 1)
    launch(made("two", micro_batch_size=2), tmp_path / "two-processes", 2, sharded=sharded)
    one, two = (events(tmp_path / name, "range_test") for name in ("one", "two"))
    assert len(one) == len(two) == 1
    assert two[0]["losses"][:20] == pytest.approx(one[0]["losses"][:20], abs=1e-4)
    assert two[0]["learning_rate"] == pytest.approx(one[0]["learning_rate"], rel=0.3)
