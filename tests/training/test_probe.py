"""The loss of fixed rows: what the measures say of them, whatever the batches, and without the model's noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset

from monteclora.training import range_test
from monteclora.training.batches import Batches
from monteclora.training.loop import Loop
from monteclora.training.probe import Probe
from monteclora.training.range_test import MOST_STEPS, PROBE_ROWS
from tests.training.conftest import Recipe, quietly

MakeRecipe = Callable[..., Recipe]
ROWS = [3, 0, 11, 7, 20]


class _Found(Exception):  # noqa: N818 - how the loop gets out of the test
    def __init__(self, loop: Loop) -> None:
        self.loop = loop


@pytest.fixture
def loop(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Loop]:
    """A loop of a range test that has made three steps, by a rate that moves the noise."""

    def made(**training: Any) -> Loop:
        def caught(loop: Loop, *arguments: Any) -> None:
            for batches in list(loop.batches.steps(0))[:3]:
                for group in loop.optimizer.param_groups:
                    group["lr"] = 1e-2
                loop.step(batches)
            raise _Found(loop)

        monkeypatch.setattr(range_test, "_raise_rate", caught)
        with pytest.raises(_Found) as found:
            quietly(recipe(learning_rate="auto", **training))
        return found.value.loop

    return made


@pytest.mark.parametrize("kind", ["classification", "causal_lm"])
def test_is_the_loss_of_the_rows_whatever_the_batches(kind: str, loop: Callable[..., Loop]) -> None:
    made = loop(kind=kind)
    table = made.batches.dataset.select_columns(list(made.batches.columns))
    whole = made.batches.collate([table[row] for row in ROWS])
    made.model.eval()
    with torch.no_grad():
        reference = made.measures.loss(made.model, whole, made.measures.count(whole["labels"]))
    for size in (1, 2, 5, 64):
        probe = Probe(made, ROWS, size)
        assert probe() == pytest.approx(float(reference), rel=1e-5)
        assert probe() == probe()  # no noise, no dropout


def batches_of(labels: list[Any]) -> Batches:
    rows = Dataset.from_dict({"labels": labels})
    return Batches(rows, list, [], micro=4, accumulated=1, process=0, processes=1, seed=3)


@pytest.mark.parametrize(("rows", "unseen"), [(40, False), (MOST_STEPS * 4 + 63, False), (MOST_STEPS * 4 + 64, True)])
@pytest.mark.parametrize("label", [1, [1, 2]], ids=["one", "several"])
def test_rows_that_are_not_trained_on_where_there_are_enough(label: Any, rows: int, unseen: bool) -> None:
    batches = batches_of([label] * rows)
    chosen = range_test._probed_rows(batches)
    assert len(set(chosen)) == len(chosen) == min(rows, PROBE_ROWS)
    trained = set(batches.order(0)[: MOST_STEPS * 4])
    assert trained.isdisjoint(chosen) == unseen
    assert chosen == range_test._probed_rows(batches)


def test_their_labels_are_those_of_the_data() -> None:
    labels = [int(row % 10 < 3) + int(row % 10 == 0) for row in range(3000)]  # 70 %, 20 % and 10 %
    batches = batches_of(labels)
    chosen = [labels[row] for row in range_test._probed_rows(batches)]
    rest = [labels[row] for row in batches.order(0)[MOST_STEPS * 4 :]]
    for label in range(3):
        assert chosen.count(label) == pytest.approx(PROBE_ROWS * rest.count(label) / len(rest), abs=1)
