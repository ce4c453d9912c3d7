"""A study of eight trials that take a second each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.training.conftest import Recipe, assets, recipe

__all__ = ["assets", "recipe"]

StudyMapping = dict[str, Any]


@pytest.fixture
def make_study(recipe: Callable[..., Recipe], tmp_path: Path) -> Callable[..., StudyMapping]:
    """Makes a study recipe of 10-step runs; ``grid`` replaces the default."""

    def make(name: str = "study", grid: dict[str, list[Any]] | None = None, **options: Any) -> StudyMapping:
        base = recipe(save_every=2, keep_checkpoints=1, num_workers=0)
        base["evaluation"] = {"num_samples": 2}
        del base["output"], base["name"]
        values = {
            "method.name": ["lora", "monteclora"],
            "training.learning_rate": [1e-3, 1e-2],
            "seed": [0, 1],
        }
        return {"name": name, "base": base, "grid": grid or values, "output": str(tmp_path / name), **options}

    return make
