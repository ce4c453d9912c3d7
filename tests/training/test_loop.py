"""The loop itself: what a step runs through, and that it is the same step on one process and on several."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import monteclora
from monteclora.training.batches import Batch, Batches
from monteclora.training.loop import Loop
from tests.training.conftest import Recipe, quietly

MakeRecipe = Callable[..., Recipe]
PACKAGE = Path(monteclora.__file__).parent


@pytest.mark.parametrize("method", ["monteclora", "lora", "full"])
def test_a_step_runs_through_at_most_five_of_our_files(
    method: str, recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside adapters/ and posterior/; validating, logging and saving are no part of a step."""
    entered: set[str] = set()
    step, grouped = Loop.step, Batches.steps

    def note(frame: Any, event: str, argument: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            entered.add(path.relative_to(PACKAGE).as_posix())

    def traced(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            sys.setprofile(note)
            try:
                return function(*args)
            finally:
                sys.setprofile(None)

        return call

    monkeypatch.setattr(Loop, "step", traced(step))
    monkeypatch.setattr(Batches, "steps", traced(grouped))
    made = recipe(method=method, max_steps=3, eval_every=20)
    if method == "full":
        made["method"] = {"name": method}
    quietly(made)
    counted = {name for name in entered if not name.startswith(("adapters/", "posterior/"))}
    assert "training/loop.py" in counted
    assert len(counted) <= 5, counted


def test_modes_are_set_where_a_validation_changed_them_alone(
    recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Setting the mode of every module takes 1 % of a small model's step; a loaded model is in evaluation mode."""
    modes, calls, passes, train = [], [], Loop._passes, nn.Module.train

    def watched(loop: Loop, *args: Any) -> Any:
        modes.append({module.training for module in loop.model.modules()})
        return passes(loop, *args)

    def counted(module: nn.Module, mode: bool = True) -> nn.Module:
        calls.extend([len(modes)] if mode else [])
        return train(module, mode)

    monkeypatch.setattr(Loop, "_passes", watched)
    monkeypatch.setattr(nn.Module, "train", counted)
    quietly(recipe(max_steps=6, eval_every=3, save_every=2))
    assert modes == [{True}] * 6
    assert set(calls) == {0, 3}


def test_the_callers_generators_are_left_alone(recipe: MakeRecipe) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    quietly(recipe(max_steps=2))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_row_is_seen_once_in_the_order_of_one_process(processes: int) -> None:
    rows, micro, accumulated = 38, 2, 2

    def plans(count: int, micro: int, accumulated: int) -> list[Any]:
        options: dict[str, Any] = {"collate": None, "columns": [], "seed": 3, "processes": count}
        return [
            Batches(range(rows), process=process, micro=micro, accumulated=accumulated, **options).plan(1)  # type: ignore[arg-type]
            for process in range(count)
        ]

    (whole,) = plans(1, micro * accumulated * processes, 1)
    shared = plans(processes, micro, accumulated)
    assert {len(plan) for plan in shared} == {len(whole)}
    for number, (step,) in enumerate(whole):
        passes = [plan[number] for plan in shared]
        assert len({len(each) for each in passes}) == 1  # or some would wait for the others for ever
        interleaved = [rows for turn in zip(*passes, strict=True) for each in turn for rows in each]
        assert interleaved == step


def test_a_process_without_rows_counts_none_of_its_labels() -> None:
    from monteclora.training.batches import _batch

    batch = _batch([], {"input_ids": torch.ones(1, 3), "labels": torch.tensor([2])})
    assert isinstance(batch, Batch)
    assert (batch.inputs["labels"] == -100).all()
