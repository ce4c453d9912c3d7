"""Every combination of what can stand between a run and its resumption, to the bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.training.conftest import Recipe, StopAfter, quietly, train_until
from tests.training.test_checkpoint import assert_same

pytestmark = pytest.mark.slow
MakeRecipe = Callable[..., Recipe]

# what is trained, and after how many steps of which phase it stops: 6 steps of cooperative training or plain LoRA with
# 3 steps an epoch; post hoc, 4 steps of the adapter and 5 of the posterior
STOPS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "lora": ({"method": "lora"}, {"mid-epoch": 2, "epoch end": 3}),
    "monteclora": ({"method": "monteclora"}, {"mid-epoch": 2, "epoch end": 3}),
    "post hoc, adapter": ({"mode": "post_hoc"}, {"mid-epoch": 2, "epoch end": 3}),
    "post hoc, posterior": ({"mode": "post_hoc"}, {"mid-epoch": 4 + 2, "epoch end": 4 + 3}),
}
CASES = list(itertools.product(STOPS, ("mid-epoch", "epoch end"), (1, 2), (0, 2), ("classification", "causal_lm")))


def options(trained: str, accumulated: int, kind: str) -> dict[str, Any]:
    chosen = STOPS[trained][0]
    steps: dict[str, Any] = (
        {"max_steps": 4, "post_hoc": {"max_steps": 5, "epochs": 2}} if "mode" in chosen else {"max_steps": 6}
    )
    # 38 rows: the last batch of an epoch is ragged
    return {"kind": kind, "batch_size": 16, "micro_batch_size": 16 // accumulated, "epochs": 2, **chosen, **steps}


@pytest.fixture(scope="module")
def wholes() -> dict[tuple[Any, ...], Path]:
    """Uninterrupted runs, by what is trained; the number of workers and where another run stops are not part of it."""
    return {}


@pytest.mark.parametrize(("trained", "stop", "accumulated", "workers", "kind"), CASES, ids=str)
def test_resumed(
    trained: str,
    stop: str,
    accumulated: int,
    workers: int,
    kind: str,
    recipe: MakeRecipe,
    wholes: dict[tuple[Any, ...], Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    made = options(trained, accumulated, kind)
    key = (trained.partition(",")[0], accumulated, kind)
    if key not in wholes:
        wholes[key] = quietly(recipe(name="whole", **made)).folder
    parts = recipe(name="parts", num_workers=workers, **made)
    after = STOPS[trained][1][stop]
    train_until(monkeypatch, StopAfter(after), parts)
    assert (tmp_path / f"parts/checkpoints/checkpoint-{after}").is_dir()
    quietly(parts)
    assert_same(wholes[key], tmp_path / "parts")


def test_there_are_64() -> None:
    assert len(CASES) == 64
