import numpy as np
import pytest
import torch

from monteclora import predict
from monteclora.adapters.model import posterior_sampling
from monteclora.errors import DataError
from monteclora.prediction.inference import predict_classes, predict_options
from tests.models import PAD, bert, gpt2, llama, same_global_generators, wrapped

SIDES = ("left", "right")


def padding(side="right"):
    """A collator over token ids, as a tokenizer pads."""

    def collate(rows):
        width = max(len(row["input_ids"]) for row in rows)
        batch = {"input_ids": [], "attention_mask": []}
        for row in rows:
            blanks = [PAD] * (width - len(row["input_ids"]))
            ones, zeros = [1] * len(row["input_ids"]), [0] * len(blanks)
            ids = list(row["input_ids"])
            batch["input_ids"].append(blanks + ids if side == "left" else ids + blanks)
            batch["attention_mask"].append(zeros + ones if side == "left" else ones + zeros)
        return {name: torch.tensor(values) for name, values in batch.items()}

    return collate


def rows_of(lengths, seed=0):
    generator = np.random.default_rng(seed)
    return [{"input_ids": generator.integers(2, 96, size=n).tolist()} for n in lengths]


def log_likelihood(model, ids, start, end=None):
    """Sum of log p(ids[i] | ids[:i]) for i in start .. end - 1, one row alone, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        log_probs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(log_probs[i - 1, ids[i]].item() for i in range(start, end or len(ids)))


# classes


def test_point_predictions_are_those_of_each_row_alone():
    model, rows = wrapped(bert), rows_of([3, 9, 5, 7, 4])
    found = predict_classes(model, rows, padding(), batch_size=2)
    model.eval()
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([row["input_ids"]])).logits.softmax(-1)[0].numpy() for row in rows]
    np.testing.assert_allclose(found.point, alone, atol=1e-6)
    np.testing.assert_array_equal(found.probs, found.point)
    np.testing.assert_array_equal(found.epistemic, 0.0)
    np.testing.assert_allclose(found.total, -(found.point * np.log(found.point)).sum(1), atol=1e-12)


def test_draws_are_those_of_predict_whatever_the_batches():
    model, rows = wrapped(bert), rows_of([3, 9, 5, 7, 4])
    with same_global_generators():
        found = predict_classes(model, rows, padding(), batch_size=2, num_samples=4, seed=7)
    whole = predict(model, padding()(rows), num_samples=4, seed=7)
    np.testing.assert_allclose(found.probs, whole.probs.mean(0), atol=1e-6)
    for name in ("total", "aleatoric", "epistemic"):
        np.testing.assert_allclose(getattr(found, name), getattr(whole, name), atol=1e-6)
    np.testing.assert_allclose(found.total, found.aleatoric + found.epistemic, atol=1e-9)
    assert (found.epistemic > 1e-8).all()
    assert not np.allclose(found.probs, found.point, atol=1e-4)


def test_labels_among_the_rows_are_not_used_and_modes_are_kept():
    model, rows, told = wrapped(bert), rows_of([4, 4]), []
    labelled = [{**row, "labels": 1} for row in rows]
    found = predict_classes(model, labelled, padding(), progress=told.append)
    np.testing.assert_array_equal(found.probs, predict_classes(model, rows, padding()).probs)
    assert model.training
    assert told == [2]


# options


def options_for(prompt, endings):
    return [{"input_ids": [*prompt, *ending]} for ending in endings]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("build", [llama, gpt2])
def test_options_of_one_token_are_next_token_probabilities(build, side):
    model = wrapped(build)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13]]
    rows = [options_for(prompt, [[20, 21, 1], [20, 22, 1], [20, 23, 1]]) for prompt in prompts]
    found = predict_options(model, rows, padding(side), batch_size=4)
    for prompt, probs in zip(prompts, found.point, strict=True):
        scores = [log_likelihood(model, [*prompt, 20, last], len(prompt) + 1) for last in (21, 22, 23)]
        np.testing.assert_allclose(probs, np.exp(scores) / np.exp(scores).sum(), atol=1e-6)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("build", [llama, gpt2])
def test_options_of_several_tokens_add_up_from_where_they_part_to_the_shared_end(build, side):
    model = wrapped(build)
    prompt, endings = [5, 6, 7], [[20, 21, 22, 1], [20, 23, 24, 25, 1]]
    rows = [options_for(prompt, endings), options_for([9, 9, 9, 9, 9], [[30, 1], [31, 1], [32, 1]])]
    found = predict_options(model, rows, padding(side), batch_size=1)
    scores = [log_likelihood(model, [*prompt, *ending], 4, len(prompt) + len(ending) - 1) for ending in endings]
    np.testing.assert_allclose(found.point[0, :2], np.exp(scores) / np.exp(scores).sum(), atol=1e-6)
    assert found.point[0, 2] == 0.0
    assert found.total[0] <= np.log(2)


def test_an_option_that_begins_another_is_told_apart_by_its_end():
    """Without the end token the shorter one would have nothing to be scored by, and win always."""
    model, prompt, endings = wrapped(llama), [5, 6, 7], [[20, 21, 1], [20, 21, 22, 1]]
    found = predict_options(model, [options_for(prompt, endings)], padding())
    scores = [log_likelihood(model, [*prompt, *ending], 5) for ending in endings]
    np.testing.assert_allclose(found.point[0], np.exp(scores) / np.exp(scores).sum(), atol=1e-6)


def test_options_under_draws_average_the_probabilities_of_each_draw():
    model, prompt, endings = wrapped(llama), [5, 6, 7], [[20, 21, 1], [23, 1], [24, 25, 1]]
    found = predict_options(model, [options_for(prompt, endings)], padding(), num_samples=3, seed=5)
    draws = []
    for number in range(3):
        with posterior_sampling(model, 5, first=number, resample=False):
            ends = [len(prompt) + len(ending) - 1 for ending in endings]
            scores = [log_likelihood(model, [*prompt, *e], 3, end) for e, end in zip(endings, ends, strict=True)]
        draws.append(np.exp(scores) / np.exp(scores).sum())
    np.testing.assert_allclose(found.probs[0], np.mean(draws, 0), atol=1e-6)
    assert found.epistemic[0] > 0


def test_options_that_cannot_be_told_apart_are_refused():
    rows = [options_for([5], [[2], [3]]), options_for([5], [[2, 3], [4], [2, 3]])]
    with pytest.raises(DataError, match="two options of row 1 have the same tokens"):
        predict_options(wrapped(llama), rows, padding())
