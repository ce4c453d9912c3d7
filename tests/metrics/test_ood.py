import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

from monteclora.errors import ConfigError, DataError
from monteclora.metrics import ood
from monteclora.metrics.ood import auroc, fpr95, neighbour_distance


@pytest.fixture
def generator():
    return np.random.default_rng(0)


def test_auroc_is_scikit_learns(generator):
    inside, outside = generator.integers(9, size=70), generator.integers(3, 12, size=30)
    expected = roc_auc_score(np.repeat([0, 1], [70, 30]), np.concatenate([inside, outside]))
    assert auroc(inside, outside) == pytest.approx(expected, abs=1e-12)
    assert auroc([0, 1], [2, 3]) == 1.0
    assert auroc([1, 1], [1]) == 0.5


def test_fpr95_by_hand():
    inside = np.arange(100)
    assert fpr95(inside, [94, 95, 200, 300]) == 0.25  # 0 to 94 pass, 95 % of the inside examples
    assert fpr95(inside, inside) == 0.95


@pytest.mark.parametrize("k", [1, 4])
def test_neighbour_distance_is_scikit_learns(generator, monkeypatch, k):
    reference, rows = generator.normal(size=(50, 7)), 3 * generator.normal(size=(23, 7))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (reference, rows)]
    expected = NearestNeighbors(n_neighbors=k).fit(unit[0]).kneighbors(unit[1])[0]
    for at_once in (ood._AT_ONCE, 120):  # whole, and in parts
        monkeypatch.setattr(ood, "_AT_ONCE", at_once)
        np.testing.assert_allclose(neighbour_distance(rows, reference, k), expected.mean(1), atol=1e-7)
    np.testing.assert_allclose(neighbour_distance(rows, reference[:2], 9), neighbour_distance(rows, reference[:2], 2))


def test_a_row_is_at_no_distance_from_itself_and_a_zero_row_is_no_nan(generator):
    reference = generator.normal(size=(5, 3)).astype(np.float16)
    np.testing.assert_allclose(neighbour_distance(reference, reference), 0, atol=1e-7)
    assert neighbour_distance(np.zeros((1, 3)), reference) == pytest.approx([np.sqrt(2)])


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: auroc([], [1.0]), DataError),
        (lambda: fpr95([1.0], [np.nan]), DataError),
        (lambda: neighbour_distance([1.0], [[1.0]]), DataError),
        (lambda: neighbour_distance([[1.0]], [[1.0, 2.0]]), DataError),
        (lambda: neighbour_distance([[1.0]], [[1.0]], k=0), ConfigError),
    ],
)
def test_malformed_arguments_are_refused(call, error):
    with pytest.raises(error):
        call()
