import numpy as np
import torch

from monteclora import predict
from monteclora.adapters.sampler import Posterior
from monteclora.prediction.classes import predict_classes
from tests.models import bert, same_global_generators, wrapped
from tests.prediction.rows import padding, rows_of


def test_point_predictions_are_those_of_each_row_alone():
    model, rows = wrapped(bert), rows_of([3, 9, 5, 7, 4])
    found = predict_classes(model, rows, padding(), batch_size=2)
    model.eval()
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([row["input_ids"]])).logits.softmax(-1)[0].numpy() for row in rows]
    np.testing.assert_allclose(found.probs, alone, atol=1e-6)
    np.testing.assert_array_equal(found.epistemic, 0.0)
    np.testing.assert_allclose(found.total, -(found.probs * np.log(found.probs)).sum(1), atol=1e-12)


def test_draws_are_those_of_predict_whatever_the_batches():
    model, rows = wrapped(bert), rows_of([3, 9, 5, 7, 4])
    with same_global_generators():
        found = predict_classes(model, rows, padding(), batch_size=2, sampler=Posterior(4, seed=7))
    whole = predict(model, padding()(rows), num_samples=4, seed=7)
    np.testing.assert_allclose(found.probs, whole.probs.mean(0), atol=1e-6)
    for name in ("total", "aleatoric", "epistemic"):
        np.testing.assert_allclose(getattr(found, name), getattr(whole, name), atol=1e-6)
    np.testing.assert_allclose(found.total, found.aleatoric + found.epistemic, atol=1e-9)
    assert (found.epistemic > 1e-8).all()
    assert not np.allclose(found.probs, predict_classes(model, rows, padding()).probs, atol=1e-4)


def test_labels_among_the_rows_are_not_used_and_modes_are_kept():
    model, rows, told = wrapped(bert), rows_of([4, 4]), []
    labelled = [{**row, "labels": 1} for row in rows]
    found = predict_classes(model, labelled, padding(), progress=told.append)
    np.testing.assert_array_equal(found.probs, predict_classes(model, rows, padding()).probs)
    assert model.training
    assert told == [2]
