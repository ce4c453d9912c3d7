"""The prediction that gives every row the frequencies of the classes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from monteclora.data.encoding import IGNORED
from monteclora.training.class_prior import class_prior

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
