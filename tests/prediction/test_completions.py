import numpy as np
import pytest
import torch

from monteclora.adapters.active import posterior_sampling
from monteclora.adapters.sampler import Posterior
from monteclora.data.encoding import IGNORED
from monteclora.prediction.completions import score_completions
from tests.models import gpt2, llama, wrapped
from tests.prediction.rows import SIDES, padding, rows_of


def collating(side):
    pad = padding(side)

    def collate(rows):
        batch = pad(rows)
        labels = torch.full_like(batch["input_ids"], IGNORED)
        labels[batch["attention_mask"].bool()] = torch.tensor([label for row in rows for label in row["labels"]])
        return {**batch, "labels": labels}

    return collate


def completion_rows():
    """Rows whose last 1, 2 and 4 tokens are scored."""
    learned = (4, 1, 2)
    rows = rows_of([9, 5, 7])
    for row, count in zip(rows, learned, strict=True):
        ids = row["input_ids"]
        row["labels"] = [IGNORED] * (len(ids) - count) + ids[-count:]
    return rows, learned


def next_token_probs(model, row):
    """One row alone: the distribution before each scored token, and those tokens."""
    model.eval()
    with torch.no_grad():
        probs = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double().softmax(-1).numpy()
    at = [i for i, label in enumerate(row["labels"]) if label != IGNORED]
    return probs[[i - 1 for i in at]], [row["labels"][i] for i in at]


def entropy(probs):
    return -(probs * np.log(probs)).sum(-1)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("build", [llama, gpt2])
def test_scores_are_those_of_each_row_alone(build, side):
    model, (rows, learned) = wrapped(build), completion_rows()
    found = score_completions(model, rows, collating(side), batch_size=2)
    assert found.tokens.tolist() == list(learned)
    for i, row in enumerate(rows):
        probs, tokens = next_token_probs(model, row)
        assert found.nll[i] == pytest.approx(-np.log(probs[range(len(tokens)), tokens]).sum(), abs=1e-4)
        assert found.correct[i] == (probs.argmax(-1) == tokens).sum()
        assert found.total[i] == pytest.approx(entropy(probs).mean(), abs=1e-5)
    assert found.sums.nll / found.sums.tokens == pytest.approx(found.nll.sum() / sum(learned))
    np.testing.assert_array_equal(found.epistemic, 0.0)


def test_draws_average_each_next_token_distribution():
    model, (rows, _) = wrapped(llama), completion_rows()
    found = score_completions(model, rows, collating("right"), batch_size=2, sampler=Posterior(3, seed=4))
    for i, row in enumerate(rows):
        draws = []
        for number in range(3):
            with posterior_sampling(model, 4, first=number, resample=False):
                probs, tokens = next_token_probs(model, row)
            draws.append(probs)
        mean = np.mean(draws, 0)
        nll = -np.log(mean[range(len(tokens)), tokens]).sum()
        assert found.nll[i] == pytest.approx(nll, abs=1e-4)
        assert found.total[i] == pytest.approx(entropy(mean).mean(), abs=1e-5)
        assert found.aleatoric[i] == pytest.approx(np.mean([entropy(p).mean() for p in draws]), abs=1e-5)
    np.testing.assert_allclose(found.total, found.aleatoric + found.epistemic, atol=1e-12)
    assert (found.epistemic > 1e-6).all()
    assert not np.allclose(found.nll, score_completions(model, rows, collating("right")).nll, atol=1e-4)
