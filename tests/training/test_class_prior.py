"""The prediction that gives every row the frequencies of the classes."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from monteclora.data.encoding import IGNORED
from monteclora.tasks.measures import ClassMeasures
from monteclora.training.batches import Batch
from monteclora.training.class_prior import class_prior
from monteclora.training.loop import Loop

LABELS, WEIGHTS = [0] * 5 + [1] * 2 + [3] * 3, [1.0, 4.0, 9.0, 0.5]


def test_its_mean_is_the_lowest_of_all_constant_predictions() -> None:
    probs = np.random.default_rng(0).dirichlet(np.ones(4), 20_000)
    losses = -(np.log(probs) * WEIGHTS)[:, LABELS].mean(-1)
    found = class_prior(LABELS, WEIGHTS).mean
    assert found <= losses.min() <= found + 0.02


def test_its_mean_is_the_entropy_of_the_labels() -> None:
    assert class_prior([0, 1, 2, 3] * 5).mean == pytest.approx(math.log(4))
    assert class_prior([0, 0, 0, 1]).mean == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))


def test_the_excess_of_labels_is_their_loss_under_it_less_the_mean() -> None:
    prior = class_prior([0, 0, 0, 1])
    labels = torch.tensor([1, 0, IGNORED, 1])
    expected = -2 * math.log(0.25) - math.log(0.75) - 3 * prior.mean
    assert prior.excess(labels) == pytest.approx(expected)
    assert prior.excess(torch.tensor([0, 0, 0, 1])) == pytest.approx(0.0, abs=1e-12)
    weighed = class_prior(LABELS, WEIGHTS)
    assert weighed.excess(torch.tensor(LABELS)) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_step_is_as_lucky_as_all_its_labels_together(processes: int) -> None:
    """Over its batches, and over processes, each of which has the same ones here."""
    prior = class_prior([0, 0, 0, 1])
    labels = [torch.tensor([1, 1, 0]), torch.tensor([0, IGNORED, 1])]
    batches = [Batch((0, 1, 2), {"labels": each, "attention_mask": torch.ones(3, 2)}) for each in labels]
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), num_processes=processes, reduce=lambda tensor, reduction: processes * tensor
    )
    loop = SimpleNamespace(prior=prior, measures=ClassMeasures(), accelerator=accelerator, luck=0.0)
    items, tokens = Loop._count(cast(Any, loop), batches)
    assert (int(items), tokens) == (5 * processes, 12 * processes)
    # three of class 1 and two of class 0, in place of a quarter and three quarters
    assert loop.luck == pytest.approx((-3 * math.log(0.25) - 2 * math.log(0.75)) / 5 - prior.mean)
