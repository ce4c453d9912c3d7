"""What a run tells while it trains."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from monteclora.training import run
from tests.training.conftest import Recipe, StopAfter, train_until

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Callable[[Recipe, bool], str]:
    def train(recipe: Recipe, terminal: bool) -> str:
        file = io.StringIO()
        console = Console(file=file, force_terminal=terminal, width=110, legacy_windows=False)
        monkeypatch.setattr(run, "Console", lambda **options: console)
        run.train(recipe)
        return file.getvalue()

    return train


def test_lines_where_there_is_no_terminal(
    recipe: MakeRecipe, told: Callable[[Recipe, bool], str], capfd: pytest.CaptureFixture[str]
) -> None:
    text = told(recipe(logging_every=1), False)
    lines = text.splitlines()
    assert [line for line in lines if "step 5/10  validation accuracy" in line]
    last = next(line for line in lines if "step 10/10  loss" in line)
    assert "KL" in last
    assert "||pi||²" in last
    assert "tokens/s" in last
    assert len(lines) < 8  # not one for every step
    assert capfd.readouterr() == ("", "")  # the libraries keep quiet


def test_a_bar_on_a_terminal(recipe: MakeRecipe, told: Callable[[Recipe, bool], str]) -> None:
    text = told(recipe(logging_every=1), True)
    assert "10/10" in text
    assert "loss" in text
    assert "validation accuracy" in text


def test_plain_lora_has_no_posterior_to_tell_of(recipe: MakeRecipe, told: Callable[[Recipe, bool], str]) -> None:
    assert "KL" not in told(recipe(method="lora"), False)


def test_resuming_and_finished_runs_say_so(
    recipe: MakeRecipe, told: Callable[[Recipe, bool], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train_until(monkeypatch, StopAfter(4), recipe())
    assert "resuming at step 4 of 10" in told(recipe(), False)
    assert "is finished: nothing to train" in told(recipe(), False)


def test_notes_of_the_data(recipe: MakeRecipe, told: Callable[[Recipe, bool], str]) -> None:
    made = recipe()
    made["data"]["max_length"] = 8
    text = told(made, False)
    assert "rows were truncated to 8 tokens" in text
    assert "validation: 6 rows (15%, seed 0) set aside" in text
