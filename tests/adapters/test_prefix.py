import copy
import threading
import warnings

import pytest
import torch

import monteclora
from monteclora import posterior_sampling
from monteclora.adapters.active import drawn_blocks
from monteclora.adapters.rows import CACHES
from monteclora.errors import ConfigError
from tests.models import bert, deberta, gpt2, llama, llama_classifier, t5

MODELS = {
    "bert": (bert, "SEQ_CLS"),
    "llama": (llama, "CAUSAL_LM"),
    "llama_classifier": (llama_classifier, "SEQ_CLS"),
    "gpt2": (gpt2, "CAUSAL_LM"),
    "deberta": (deberta, "SEQ_CLS"),
}


def wrapped(make, task, blocks=4, **options):
    """A model of several blocks whose adapters do something."""
    depth = {"n_layer": blocks} if make is gpt2 else {"num_hidden_layers": blocks}
    # the positions that DeBERTa projects are the same for every row: draws could not be told apart there
    targets = ["query_proj", "value_proj"] if make is deberta else "all-linear"
    scale = "relative:40.0" if make is deberta else "relative:2.0"
    config = {"r": 3, "target_modules": targets, "sample_scale": scale, "task_type": task, **options}
    model = monteclora.get_peft_model(make(**depth), monteclora.MonteCLoRAConfig(**config))
    generator = torch.Generator().manual_seed(7)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data = 0.2 * torch.randn(weight.shape, generator=generator)
    return model.eval()


def batch(rows=3, length=9, padded=True):
    generator = torch.Generator().manual_seed(rows + length)
    ids = torch.randint(2, 90, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, 5:], ids[0, 5:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def one_by_one(model, inputs, count, layers=None):
    found = []
    for number in range(count):
        with posterior_sampling(model, 0, first=number, layers=layers):
            found.append(monteclora.prediction.predictive.class_logits(model, inputs).softmax(-1))
    return torch.stack(found).detach()


def rows_of_blocks(model, inputs, layers, count=4):
    """How many rows each block is given."""
    blocks, seen = drawn_blocks(model, layers).blocks, []
    monteclora.predict(model, inputs, count, layers=layers)  # finds out how rows lie
    handles = [block.register_forward_hook(lambda _, given, out: seen.append(given[0].shape[0])) for block in blocks]
    monteclora.predict(model, inputs, count, layers=layers)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_draws_that_share_the_blocks_below_are_those_made_one_at_a_time(name):
    make, task = MODELS[name]
    model = wrapped(make, task)
    for inputs in (batch(), batch(2, 7, padded=False), batch(1, 4, padded=False), batch(4, 16)):
        found = monteclora.predict(model, inputs, 4, layers=2).probs
        torch.testing.assert_close(found, one_by_one(model, inputs, 4, 2), atol=1e-6, rtol=1e-5)
        assert monteclora.predict(model, inputs, 4, layers=2).epistemic.min() > 1e-6
    assert rows_of_blocks(model, batch(), 2) == [3, 3, 12, 12]


@pytest.mark.parametrize("name", MODELS)
def test_passes_over_the_same_rows_keep_what_comes_out_of_the_blocks_below(name):
    """Forty rows go in parts of 32 and 8, three draws in a pass; of seven draws, none by itself."""
    make, task = MODELS[name]
    model = wrapped(make, task)
    inputs = batch(40, 6)
    for count in (7, 5):
        found = monteclora.predict(model, inputs, count, layers=2).probs
        torch.testing.assert_close(found, one_by_one(model, inputs, count, 2), atol=1e-6, rtol=1e-5)
    expected = [32, 32, 96, 96, 1, 1, 64, 64, 8, 8, 24, 24, 1, 1, 16, 16]
    assert rows_of_blocks(model, inputs, 2, 5) == expected
    assert rows_of_blocks(model, batch(32, 6), 2, 7) == [32, 32, 96, 96, 1, 1, 128, 128]
    seen = []
    embedding = model.get_base_model().get_input_embeddings()
    handle = embedding.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[0]))
    monteclora.predict(model, inputs, 5, layers=2)
    handle.remove()
    assert seen == [32, 1, 8, 1]
    # outside of such a block nothing is kept
    assert rows_of_blocks(model, batch(), 2) == [3, 3, 12, 12]


def test_noise_is_that_of_all_blocks_in_the_last_ones_and_none_below():
    model = wrapped(bert, "SEQ_CLS", target_modules=["query", "dense"])
    posterior = model.base_model.active_posteriors()[0]
    last = drawn_blocks(model, 1)
    names = list(model.base_model.adapted_layers(posterior))
    drawn = {names[i] for i in last.drawn[posterior]}
    assert drawn == {name for name in names if ".layer.3." in name or "pooler" in name}
    whole, part = posterior.sample(5, 2, 3), posterior.sample(5, 2, 3, last.drawn[posterior])
    for name, one, other in zip(names, whole.layers, part.layers, strict=True):
        assert (other is None) == (name not in drawn)
        assert other is None or torch.equal(one.transposed, other.transposed)


def test_all_blocks_are_what_it_is_without_layers():
    for make, task in MODELS.values():
        model = wrapped(make, task, blocks=2)
        expected = monteclora.predict(model, batch(), 5)
        torch.testing.assert_close(
            monteclora.predict(model, batch(), 5, layers=2).probs, expected.probs, rtol=0, atol=1e-6
        )


def test_an_uncertainty_is_the_sum_of_its_parts_and_without_scale_there_is_none():
    model = wrapped(bert, "SEQ_CLS")
    found = monteclora.predict(model, batch(), 6, layers=1)
    torch.testing.assert_close(found.total, found.aleatoric + found.epistemic, rtol=0, atol=1e-6)
    for posterior in model.base_model.active_posteriors():
        posterior.scale.zero_()
    assert monteclora.predict(model, batch(), 6, layers=1).epistemic.abs().max() < 1e-6


def test_draws_do_not_depend_on_the_batch():
    model = wrapped(bert, "SEQ_CLS")
    inputs = batch(4)
    whole = monteclora.predict(model, inputs, 3, layers=2).probs
    for row in range(4):
        alone = monteclora.predict(model, {name: x[row : row + 1] for name, x in inputs.items()}, 3, layers=2).probs
        torch.testing.assert_close(alone[:, 0], whole[:, row], atol=1e-6, rtol=1e-5)


def test_many_rows_are_shared_in_parts(monkeypatch):
    monkeypatch.setattr("monteclora.prediction.predictive._SHARING_ROWS", 8)
    model = wrapped(bert, "SEQ_CLS")
    torch.testing.assert_close(
        monteclora.predict(model, batch(5), 4, layers=1).probs, one_by_one(model, batch(5), 4, 1), atol=1e-6, rtol=1e-5
    )


def test_where_blocks_do_not_keep_rows_apart_they_run_for_every_draw_and_it_is_said():
    model = wrapped(bert, "SEQ_CLS", blocks=3)
    layers = model.get_base_model().bert.encoder.layer
    layers[0].register_forward_pre_hook(lambda _, given: (given[0] - given[0].mean(0, keepdim=True), *given[1:]))
    with pytest.warns(UserWarning, match="run for every draw: its outputs would be others|cannot be distinguished"):
        found = monteclora.predict(model, batch(), 3, layers=1)
    assert torch.isfinite(found.probs).all()
    ordinary = wrapped(bert, "SEQ_CLS")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = monteclora.predict(ordinary, batch(), 3, layers=1)
    assert again.probs.shape == (3, 3, 3)


def test_an_encoder_and_a_decoder_count_as_one_row_of_blocks():
    model = monteclora.get_peft_model(
        t5(), monteclora.MonteCLoRAConfig(r=2, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    ).eval()
    posterior = model.base_model.active_posteriors()[0]
    names = list(model.base_model.adapted_layers(posterior))
    drawn = {names[i] for i in drawn_blocks(model, 1).drawn[posterior]}
    assert drawn
    assert all(name.startswith("decoder.block.1.") for name in drawn)
    inputs = {**batch(), "decoder_input_ids": torch.tensor([[0, 5], [0, 6], [0, 7]])}
    with pytest.warns(UserWarning, match="the adapted blocks are in several lists"):
        found = monteclora.predict(model, inputs, 3, layers=1).probs
    torch.testing.assert_close(found, one_by_one(model, inputs, 3, 1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("layers", [0, 5, True, 1.0])
def test_a_number_of_blocks_that_does_not_fit_is_refused(layers):
    with pytest.raises(ConfigError, match=r"layers is .*, and the model has 4 adapted blocks"):
        monteclora.predict(wrapped(bert, "SEQ_CLS"), batch(), 2, layers=layers)


def test_a_copy_shares_its_own_blocks():
    model = wrapped(bert, "SEQ_CLS")
    assert rows_of_blocks(model, batch(), 2) == [3, 3, 12, 12]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rows_of_blocks(copy.deepcopy(model), batch(), 2) == [3, 3, 12, 12]


@pytest.mark.parametrize("make", [llama, gpt2])
def test_keys_and_values_that_are_kept_are_each_draws_own(make):
    model, ids = wrapped(make, "CAUSAL_LM"), batch(padded=False)["input_ids"]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with posterior_sampling(model, 0, num_samples=4, resample=False, layers=2), warnings.catch_warnings():
        warnings.simplefilter("error")
        together = model.generate(input_ids=ids.repeat(4, 1), **options)
    for draw, found in enumerate(together.chunk(4)):
        with posterior_sampling(model, 0, first=draw, resample=False, layers=2):
            assert torch.equal(found, model.generate(input_ids=ids, **options))


@torch.no_grad()
@pytest.mark.parametrize("make", [llama, gpt2])
def test_keys_and_values_that_come_unasked_are_each_draws_own_too(make):
    """A configuration has use_cache by default: what is returned can be read on from, or is not returned."""
    model, inputs = wrapped(make, "CAUSAL_LM"), batch(padded=False)
    ids = inputs["input_ids"].repeat(3, 1)
    alone = []
    for draw in range(3):
        with posterior_sampling(model, 0, first=draw, resample=False, layers=2):
            alone.append(model(input_ids=inputs["input_ids"]).logits[:, -1])
    with posterior_sampling(model, 0, num_samples=3, resample=False, layers=2):
        with pytest.warns(UserWarning, match=r"run for every draw: keys and values are kept.*use_cache=False"):
            first = model(input_ids=ids[:, :-1])
        name = next(name for name in CACHES if first.get(name) is not None)
        second = model(input_ids=ids[:, -1:], **{name: first[name]})
    torch.testing.assert_close(second.logits[:, -1], torch.cat(alone), atol=1e-5, rtol=1e-5)
    with posterior_sampling(model, 0, num_samples=3, resample=False, layers=2), warnings.catch_warnings():
        warnings.simplefilter("error")
        shared = model(input_ids=ids, use_cache=False)
    torch.testing.assert_close(shared.logits[:, -1], torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_threads_and_copies_do_not_meet():
    model = wrapped(bert, "SEQ_CLS")
    expected, plain = monteclora.predict(model, batch(), 3, layers=1).probs, model(**batch()).logits
    twin, results = copy.deepcopy(model), {}

    def predict(number):
        with torch.no_grad():
            other = model(**batch()).logits if number % 2 else None
        found = monteclora.predict([model, twin][number % 2], batch(), 3, layers=1).probs
        results[number] = found, other

    threads = [threading.Thread(target=predict, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found, other in results.values():
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
        assert other is None or torch.allclose(other, plain, atol=1e-6)
