"""Distributions of scores and of several labels, and the losses that teach them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from monteclora.data.scores import ScoreScale
from monteclora.prediction.labels import LabelPredictions, decision_log_probs
from monteclora.prediction.scores import ScorePredictions, mean_and_variance
from monteclora.tasks.measures import ClassMeasures, LabelMeasures, ScoreMeasures


class Head(nn.Module):
    """Gives the outputs that it is made of."""

    def __init__(self, outputs: torch.Tensor) -> None:
        super().__init__()
        self.outputs = nn.Parameter(outputs)

    def forward(self, **inputs: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.outputs)


def test_mean_and_variance_of_scores_are_those_of_the_mixture() -> None:
    generator = np.random.default_rng(0)
    means, variances = generator.normal(5, 1, (6, 3)), generator.gamma(2.0, 1.0, (6, 3))
    found = ScorePredictions(means, variances)
    draws = generator.normal(means[:, None], np.sqrt(variances)[:, None], (6, 200_000, 3)).reshape(-1, 3)
    assert found.mean == pytest.approx(draws.mean(0), abs=0.02)
    assert found.total == pytest.approx(draws.var(0), rel=0.02)
    assert found.total == pytest.approx(found.aleatoric + found.epistemic)
    low, high = found.interval(0.9)
    assert stats.norm.cdf(high, found.mean, np.sqrt(found.total)) == pytest.approx(0.95)
    assert low + high == pytest.approx(2 * found.mean)
    assert ScorePredictions(means[:1], variances[:1]).epistemic.tolist() == [0.0, 0.0, 0.0]


def test_a_head_of_zeros_predicts_the_distribution_of_the_training_scores() -> None:
    mean, variance = mean_and_variance(torch.zeros(2, 2))
    assert mean.tolist() == [0.0, 0.0]
    assert variance.tolist() == pytest.approx([1.0001, 1.0001])
    assert mean_and_variance(torch.tensor([0.0, -1e4]))[1] >= 1e-4
    assert mean_and_variance(torch.tensor([0.0, 1e30]))[1].isfinite()


def test_the_loss_of_scores_is_their_negative_log_density_and_leaves_out_what_is_ignored() -> None:
    outputs = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    head = Head(outputs)
    measures = ScoreMeasures(ScoreScale(50.0, 4.0))
    labels = torch.tensor([0.3, float("nan"), -100.0])
    assert measures.count(labels) == 2
    loss = measures.loss(head, {"labels": labels}, measures.count(labels))
    mean, variance = (each.numpy() for each in mean_and_variance(outputs))
    expected = -stats.norm.logpdf([0.3, -100.0], mean[[0, 2]], np.sqrt(variance[[0, 2]])).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert head.outputs.grad is not None
    assert head.outputs.grad[1].tolist() == [0.0, 0.0]
    assert head.outputs.grad.isfinite().all()
    kept = measures.reduce(outputs[[0, 2]], labels[[0, 2]]).numpy()
    metrics = measures.compute(kept, labels[[0, 2]].numpy())
    assert metrics["nll"] == pytest.approx(expected + np.log(4.0), rel=1e-5), "in the unit of the scores"
    assert metrics["mae"] == pytest.approx(4.0 * np.abs(mean[[0, 2]] - [0.3, -100.0]).mean(), rel=1e-5)


def test_labels_are_decisions_of_two_classes_each() -> None:
    outputs = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0)).double()
    log_probs = np.stack([decision_log_probs(each).numpy() for each in outputs])
    labels = (np.random.default_rng(0).random((5, 3)) < 0.5).astype(np.int64)
    found = LabelPredictions.of(log_probs, 3).labelled(labels)
    assert found.probs == pytest.approx(outputs.sigmoid().mean(0).numpy())
    assert found.decisions.labels is not None
    assert found.decisions.labels.reshape(5, 3).tolist() == labels.tolist()
    p = outputs.sigmoid().numpy()
    entropy = stats.bernoulli.entropy(p)
    assert found.of_labels("aleatoric") == pytest.approx(entropy.mean(0))
    assert found.of_labels("total") == pytest.approx(stats.bernoulli.entropy(p.mean(0)))
    assert found.epistemic == pytest.approx((stats.bernoulli.entropy(p.mean(0)) - entropy.mean(0)).sum(1))


def test_the_loss_of_labels_is_their_negative_log_likelihood_with_weights() -> None:
    outputs = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, 0], [-100, -100], [0, 1]])
    likelihood = outputs.sigmoid().log() * labels + (-outputs).sigmoid().log() * (1 - labels)
    plain, weighted = LabelMeasures(), LabelMeasures(((0.5, 3.0), (2.0, 1.0)))
    assert plain.count(labels) == 2
    assert plain.loss(Head(outputs), {"labels": labels}, torch.tensor(2)).item() == pytest.approx(
        -likelihood[[0, 2]].sum().item() / 2, rel=1e-6
    )
    weights = torch.tensor([[3.0, 2.0], [0.5, 1.0]])
    assert weighted.loss(Head(outputs), {"labels": labels}, torch.tensor(2)).item() == pytest.approx(
        -(weights * likelihood[[0, 2]]).sum().item() / 2, rel=1e-6
    )


def test_weights_of_classes_multiply_the_loss_of_their_rows() -> None:
    outputs = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([2, 0, -100])
    loss = ClassMeasures((0.5, 1.0, 4.0)).loss(Head(outputs), {"labels": labels}, torch.tensor(2))
    each = -outputs.log_softmax(-1)
    assert loss.item() == pytest.approx((4.0 * each[0, 2] + 0.5 * each[1, 0]).item() / 2, rel=1e-6)


@pytest.mark.parametrize(
    ("measures", "outputs", "labels"),
    [
        (ScoreMeasures(ScoreScale(0.0, 1.0)), (3, 2), torch.ones(3)),
        (LabelMeasures(((1.0, 2.0), (3.0, 4.0))), (3, 2), torch.ones(3, 2, dtype=torch.long)),
        (ClassMeasures((1.0, 2.0)), (3, 2), torch.ones(3, dtype=torch.long)),
    ],
)
def test_a_loss_looks_at_no_value_so_that_nothing_waits_for_the_device(measures, outputs, labels) -> None:
    head = Head(torch.zeros(outputs, device="meta"))  # a device whose tensors have no values to look at
    loss = measures.loss(head, {"labels": labels.to("meta")}, torch.ones((), device="meta"))
    loss.backward()
    assert loss.shape == ()
