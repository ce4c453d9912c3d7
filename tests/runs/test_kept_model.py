"""A model that stays in memory is as fresh as a loaded one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from monteclora.runs import prepare
from monteclora.runs.kept_model import kept_base_model
from monteclora.runs.recipe import load_recipe
from monteclora.training.run import train
from tests.training.conftest import adapter_content, assets, recipe, without_times

__all__ = ["assets", "recipe"]

Make = Callable[..., dict[str, Any]]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    loads: list[int] = []
    original = prepare.load_model

    def load(*arguments: Any, **options: Any) -> Any:
        loads.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(prepare, "load_model", load)
    return loads


@pytest.mark.parametrize("kind", ["classification", "causal_lm"])
def test_runs_from_a_kept_model_are_those_from_loaded_ones(
    recipe: Make, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The first method trains the pretrained weights themselves, which must not show in what follows."""
    methods = [("full", 0), ("lora", 0), ("monteclora", 0), ("lora", 1), ("lora", 0)]
    loads = counted(monkeypatch)

    def runs(name: str) -> list[Any]:
        found = []
        for number, (method, seed) in enumerate(methods):
            made = recipe(kind, method, name=f"{name}{number}", num_workers=0)
            if method == "full":
                made["method"] = {"name": "full"}
            result = train({**made, "seed": seed}, progress=False)
            found.append((adapter_content(result.folder), without_times(dict(result.metrics))))
        return found

    apart = runs("apart")
    assert len(loads) == len(methods)
    loads.clear()
    with kept_base_model():
        together = runs("together")
    assert together == apart
    assert len(loads) == 3  # of another seed there is another head


def test_generators_are_left_as_loading_leaves_them(
    recipe: Make, monkeypatch: pytest.MonkeyPatch, assets: Path
) -> None:
    loads = counted(monkeypatch)
    made = load_recipe(recipe("classification"))
    tokenizer = prepare.tokenizer_of(made)

    def drawn() -> tuple[list[torch.Tensor], torch.Tensor]:
        model = prepare.base_model(made, "classification", ("a", "b"), tokenizer)
        return [p.detach().clone() for p in model.parameters()], torch.rand(3)

    expected, number = drawn()
    with kept_base_model():
        for _ in range(2):
            found, after = drawn()
            assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
            assert torch.equal(number, after)
    assert len(loads) == 2
