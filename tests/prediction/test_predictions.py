import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monteclora.errors import DataError
from monteclora.metrics.classification import nll
from monteclora.prediction.predictions import Predictions
from monteclora.prediction.temperature import Temperature


def random_predictions(seed: int, draws: int = 4, rows: int = 50, classes: int = 3) -> Predictions:
    generator = np.random.default_rng(seed)
    probs = generator.dirichlet(np.full(classes, 0.5), size=(draws, rows))
    return Predictions(np.log(probs), generator.integers(classes, size=rows))


def entropy(probs: np.ndarray) -> np.ndarray:
    return -(probs * np.log(probs)).sum(-1)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(2, 6))
def test_total_is_aleatoric_plus_epistemic_and_both_are_the_closed_forms(seed: int, draws: int, classes: int) -> None:
    found = random_predictions(seed, draws, 8, classes)
    probs = np.exp(found.log_probs)
    np.testing.assert_allclose(found.probs, probs.mean(0))
    np.testing.assert_allclose(found.total, entropy(probs.mean(0)), atol=1e-12)
    np.testing.assert_allclose(found.aleatoric, entropy(probs).mean(0), atol=1e-12)
    np.testing.assert_allclose(found.total, found.aleatoric + found.epistemic, atol=1e-9)
    assert (found.epistemic >= 0).all()
    if draws == 1:
        assert (found.epistemic == 0).all()


def test_an_option_that_a_row_lacks_takes_no_part() -> None:
    found = Predictions(np.array([[[np.log(0.25), np.log(0.75), -np.inf]]]))
    np.testing.assert_allclose(found.probs, [[0.25, 0.75, 0.0]])
    np.testing.assert_allclose(found.total, entropy(np.array([[0.25, 0.75]])))
    np.testing.assert_allclose(Temperature(2.0).apply(found).probs.sum(1), 1.0)
    assert Temperature(2.0).apply(found).probs[0, 2] == 0.0


def test_a_temperature_recovers_the_one_that_logits_were_divided_by() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(20_000, 3))
    true = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    labels = (generator.random((len(true), 1)) > true.cumsum(-1)).sum(-1)
    overconfident = 5.0 * logits
    log_probs = overconfident - np.log(np.exp(overconfident).sum(-1, keepdims=True))
    found = Temperature.fit(Predictions(log_probs[None], labels))
    assert found.temperature == pytest.approx(5.0, rel=0.03)


@pytest.mark.parametrize("seed", range(3))
def test_no_other_temperature_is_better_and_the_most_probable_class_stays(seed: int) -> None:
    found = random_predictions(seed, draws=1)
    fitted = Temperature.fit(found)
    assert Temperature(**fitted.state) == fitted
    best = nll(fitted.apply(found).probs, found.labels)
    assert all(nll(Temperature(t).apply(found).probs, found.labels) >= best - 1e-9 for t in np.geomspace(0.05, 50, 200))
    np.testing.assert_array_equal(fitted.apply(found).probs.argmax(1), found.probs.argmax(1))


def test_rows_without_labels_are_refused() -> None:
    with pytest.raises(DataError, match="these rows have none"):
        Temperature.fit(Predictions(np.log(np.full((1, 2, 2), 0.5))))
