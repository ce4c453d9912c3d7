import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.numpy import save
from scipy.linalg import sqrtm
from transformers import GPT2Config, GPT2ForSequenceClassification

from monteclora.errors import ConfigError
from monteclora.metrics.ood import neighbour_distance
from monteclora.prediction.classes import predict_classes
from monteclora.prediction.forward import with_positions
from monteclora.prediction.known_tokens import KnownTokens
from monteclora.prediction.novelty import Novelty, Seen, look_at, predict_and_look, with_pretrained
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


def adapted(build, peft_type):
    torch.manual_seed(1)
    tuned = {
        "lora": LoraConfig(task_type="SEQ_CLS", r=4, init_lora_weights=False),
        "prompt": PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
    }
    return get_peft_model(build(), tuned[peft_type]).eval()


def whole_states(model, batch, length):
    """The last hidden states of the tokens, from a pass that keeps all of them."""
    with torch.no_grad():
        return model(**batch, output_hidden_states=True).hidden_states[-1][:, -length:]


def mean_and_token(states, mask, read):
    mean = (states.double() * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
    token = states[torch.arange(len(states)), read].double()
    return np.concatenate([view / view.norm(dim=1, keepdim=True) for view in (mean, token)], 1)


@pytest.mark.parametrize("peft_type", ["lora", "prompt"])
@pytest.mark.parametrize("build", [gpt2_classifier, llama_classifier, bert], ids=lambda build: build.__name__)
def test_views_are_of_the_tuned_models_last_states_and_of_the_pretrained_ones(build, peft_type):
    """Of those of the rows' tokens: virtual ones stand before them."""
    model, rows = adapted(build, peft_type), rows_of(LENGTHS)
    trained = [parameter.requires_grad for parameter in model.parameters()]
    seen = look_at(model, rows, padding("right"), batch_size=5)
    both = with_pretrained(model, seen, rows, padding("right"), batch_size=5)
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    order = sorted(range(len(rows)), key=lambda i: -LENGTHS[i])
    batch = padding("right")([rows[i] for i in order])
    mask = batch["attention_mask"]
    read = torch.zeros(len(rows), dtype=torch.long) if build is bert else mask.sum(1) - 1
    for found, whole in ((both.features, model), (both.pretrained, build().eval())):
        expected = mean_and_token(whole_states(whole, batch, mask.shape[1]), mask, read)
        np.testing.assert_allclose(found[order], expected, atol=1e-6)
    assert both.energy is seen.energy
    if peft_type == "lora":
        assert np.abs(both.features - both.pretrained).max() > 0.01


def test_a_prediction_at_the_mean_shows_all_in_its_own_passes():
    model, rows = adapted(bert, "lora"), rows_of(LENGTHS)
    plain = predict_classes(model, rows, padding("right"), batch_size=2)
    calls = []
    model.get_base_model().bert.register_forward_hook(lambda *_: calls.append(1))
    found, seen = predict_and_look(model, rows, padding("right"), batch_size=2)
    assert len(calls) == 3
    np.testing.assert_array_equal(found.log_probs, plain.log_probs)
    assert seen.tokens == [row["input_ids"] for row in rows]
    assert len(model.get_base_model().bert._forward_hooks) == 1  # the one above alone


class Foreign(torch.nn.Module):
    """A classifier that is none of transformers' own."""

    def __init__(self, states):
        super().__init__()
        self.inner, self.states = bert(), states

    def forward(self, input_ids, attention_mask, output_hidden_states=False):
        found = self.inner(input_ids, attention_mask, output_hidden_states=output_hidden_states)
        return SimpleNamespace(logits=found.logits, hidden_states=found.hidden_states if self.states else None)


def test_another_model_is_asked_for_its_hidden_states():
    rows = rows_of(LENGTHS)
    expected = look_at(bert().eval(), rows, padding("right"))
    found = look_at(Foreign(states=True).eval(), rows, padding("right"))
    np.testing.assert_array_equal(found.features, expected.features)
    with pytest.raises(ConfigError, match="Foreign gives no hidden states, which novelty is measured on"):
        look_at(Foreign(states=False).eval(), rows, padding("right"))


def seen_of(features, energy, tokens):
    return Seen(np.asarray(features, dtype=np.float32), np.asarray(energy), -np.asarray(energy), tokens)


def test_new_tokens_and_pairs_count_by_their_share_and_never_without_bound():
    generator = np.random.default_rng(0)
    training = seen_of(generator.normal(size=(9, 4)), np.zeros(9), [[1, 2, 3]] * 9)
    known = seen_of(generator.normal(size=(20, 4)), generator.normal(size=20), [[1, 2], [3]] * 10)
    made = Novelty.fit(training, known)
    assert made.known.tokens.tolist() == [1, 2, 3]
    assert Novelty.fit(training, known, known=KnownTokens.of([[7, 3, 3]])).known.tokens.tolist() == [3, 7]
    same = {"features": known.features[:3], "energy": known.energy[:3]}
    few, none = made.of(seen_of(**same, tokens=[[1, 9, 9, 2], [8], [1, 2, 3, 3]])), made.of(known)[:3]
    # held-out rows have neither new tokens nor pairs: a spread of one of fifty stands for theirs, which is 0
    expected = [(2 * 0.5 + 0.5 * 1) / 0.02, 2 * 1 / 0.02, 0.5 / 3 / 0.02]
    np.testing.assert_allclose(few - none, expected, atol=1e-9)


def test_what_all_rows_share_does_not_count_as_likeness():
    """Neither a common part, nor one direction along which they differ much."""
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(30, 4)) * [1, 20, 1, 1] + [0, 0, 50, 0]
    made = Novelty.fit(*(seen_of(part, np.zeros(len(part)), [[1]] * len(part)) for part in (rows, rows)))
    distance = made.parts_of(seen_of(rows[:5] + 0.1, np.zeros(5), [[1]] * 5))[0]
    kept = rows.astype(np.float16).astype(float)
    covariance = np.cov(kept.T, bias=True)
    root = sqrtm(np.linalg.inv(covariance + np.trace(covariance) / 4 * np.eye(4))).real
    own = (rows[:5].astype(np.float32) + np.float32(0.1) - kept.mean(0)) @ root
    np.testing.assert_allclose(distance, neighbour_distance(own, (kept - kept.mean(0)) @ root, k=3), atol=1e-5)


def test_what_is_saved_is_loaded(tmp_path):
    generator = np.random.default_rng(0)
    seen = [
        seen_of(generator.normal(size=(8, 4)), generator.normal(size=8), [[i, 40] for i in range(n)]) for n in (8, 8)
    ]
    made = Novelty.fit(*seen, "sum")
    made.save(tmp_path / "novelty.safetensors")
    again = Novelty.load(tmp_path / "novelty.safetensors")
    assert again.weights == "sum"
    assert not again.needs_pretrained
    np.testing.assert_array_equal(again.of(seen[1]), made.of(seen[1]))
    assert (again.of(seen[1]) > 0).sum() <= 1


def test_files_without_pairs_keep_their_score(tmp_path):
    """An earlier version knew tokens alone."""
    generator = np.random.default_rng(0)
    seen = seen_of(generator.normal(size=(8, 4)), generator.normal(size=8), [[i, 40] for i in range(8)])
    made = Novelty.fit(seen, seen, "sum")
    first = {"centre": made.centre[:3], "spread": made.spread[:3], "shares": made.shares[:3]}
    earlier = dataclasses.replace(made, **first, known=KnownTokens(made.known.tokens, None))
    tensors = {
        "features": made.features,
        **{name: first[name] for name in ("centre", "spread")},
        "limit": np.array([made.limit]),
        "how": np.array([made.neighbours, *first["shares"]]),
        "known": made.known.tokens.astype(np.int32),
    }
    path = tmp_path / "novelty.safetensors"
    path.write_bytes(save(tensors, metadata={"format": "3", "weights_sha256": "sum"}))
    again = Novelty.load(path)
    assert not again.needs_pretrained
    np.testing.assert_array_equal(again.of(seen), earlier.of(seen))
