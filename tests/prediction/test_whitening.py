import numpy as np
import pytest
from scipy.linalg import sqrtm

from monteclora.prediction.whitening import Whitening


@pytest.mark.parametrize("count", [40, 6, 3], ids=["more rows than columns", "as many", "fewer"])
@pytest.mark.parametrize("ridge", [0.1, 1.0])
def test_it_is_its_formula(count, ridge):
    generator = np.random.default_rng(0)
    reference = generator.normal(size=(count, 6)) * np.arange(1, 7) + 3
    new = generator.normal(size=(5, 6))
    covariance = np.cov(reference.T, bias=True)
    least = ridge * np.trace(covariance) / 6
    root = sqrtm(np.linalg.inv(covariance + least * np.eye(6))).real
    np.testing.assert_allclose(Whitening.of(reference, ridge)(new), (new - reference.mean(0)) @ root, atol=1e-9)


def test_rows_that_do_not_differ_have_no_direction():
    found = Whitening.of(np.ones((4, 3)))
    assert found.directions.shape[1] == 0
    assert np.isfinite(found(np.zeros((2, 3)))).all()
