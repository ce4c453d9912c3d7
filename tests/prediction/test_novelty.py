import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification

from monteclora.prediction.forward import with_positions
from monteclora.prediction.novelty import look_at
from tests.models import END, PAD, VOCABULARY, bert, llama, llama_classifier
from tests.prediction.rows import SIDES, padding, rows_of

LENGTHS = [3, 9, 5, 7, 4]


def gpt2_classifier():
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 2, "num_labels": 3}
    return GPT2ForSequenceClassification(GPT2Config(**sizes, pad_token_id=PAD, bos_token_id=END, eos_token_id=END))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("build", [gpt2_classifier, llama_classifier, bert], ids=lambda build: build.__name__)
def test_what_is_seen_of_a_row_does_not_depend_on_its_batch(build, side):
    """Whichever side the padding is on, also where positions are absolute."""
    model, rows = build().eval(), rows_of(LENGTHS)
    found = look_at(model, rows, padding(side), batch_size=5)
    with torch.no_grad():
        for i, row in enumerate(rows):
            ids = torch.tensor([row["input_ids"]])
            alone = model(input_ids=ids, output_hidden_states=True)
            states = alone.hidden_states[-1][0].numpy()
            read = states[0 if build is bert else -1]  # a decoder's first token has seen nothing of the row
            expected = [view / np.linalg.norm(view) for view in (states.mean(0), read)]
            np.testing.assert_allclose(found.features[i], np.concatenate(expected), atol=1e-5)
            assert found.energy[i] == pytest.approx(-float(alone.logits.logsumexp(-1)), abs=1e-5)
            assert found.max_logit[i] == pytest.approx(float(alone.logits.max()), abs=1e-5)


def test_positions_of_new_tokens_go_on_behind_those_in_the_cache():
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    inputs = {"input_ids": torch.ones(2, 2, dtype=torch.long), "attention_mask": mask}
    assert with_positions(llama(), inputs, past=4)["position_ids"].tolist() == [[2, 3], [4, 4]]
    whole = {"input_ids": torch.ones(2, 6, dtype=torch.long), "attention_mask": mask}
    assert with_positions(llama(), whole)["position_ids"].tolist() == [[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 4]]
