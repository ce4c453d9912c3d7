import numpy as np
import pyarrow as pa
import pytest

from monteclora.evaluation.error_detection import detected, error_detection
from monteclora.evaluation.run import evaluate
from monteclora.prediction.predictions import Predictions
from monteclora.tasks.base import Scored


def scored(log_probs, labels):
    found = Predictions(np.asarray(log_probs), np.asarray(labels))
    return Scored({}, None, found, found, pa.table({}))


def of_draws(seed=0, rows=40, draws=3):
    logits = np.random.default_rng(seed).normal(size=(draws, rows, 4))
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_each_score_is_the_share_of_pairs_that_it_orders_rightly():
    log_probs = of_draws()
    probs = np.exp(log_probs).mean(0)
    labels = np.where(np.arange(40) % 3, probs.argmax(1), (probs.argmax(1) + 1) % 4)
    found = error_detection(scored(log_probs, labels))
    entropies = -(np.exp(log_probs) * log_probs).sum(-1).mean(0)
    total = -(probs * np.log(probs)).sum(-1)
    wrong = probs.argmax(1) != labels
    for name, score in (
        ("max_probability", -probs.max(1)),
        ("entropy", total),
        ("mutual_information", total - entropies),
    ):
        pairs = score[wrong][:, None] - score[~wrong][None, :]
        assert found[name] == pytest.approx((pairs > 0).mean() + 0.5 * (pairs == 0).mean()), name


def test_one_draw_has_no_mutual_information_and_one_kind_of_answer_no_auroc():
    log_probs = of_draws(draws=1)
    best = log_probs[0].argmax(1)
    assert error_detection(scored(log_probs, best)) is None
    assert error_detection(scored(log_probs, (best + 1) % 4)) is None
    assert set(error_detection(scored(log_probs, np.r_[best[:20], (best[20:] + 1) % 4]))) == {
        "max_probability",
        "entropy",
    }
    assert detected(np.array([True, False]), {"a": [0.0, 1.0], "b": [1.0, 1.0]}) == {"a": 1.0, "b": 0.5}


def test_evaluations_of_options_have_it(trained):
    result = evaluate(trained["questions"], progress=False)
    found = result.scored.predictions
    assert result.error_detection == error_detection(result.scored)
    assert (result.error_detection is None) == ((found.probs.argmax(1) == found.labels).mean() in (0, 1))
    if result.error_detection is not None:
        assert result.facts()["error_detection"] == result.error_detection
    assert evaluate(trained["pairs"], progress=False).error_detection is None
