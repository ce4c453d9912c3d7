"""One suite that every sampler passes, and what is particular to each."""

import copy
import threading
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import IA3Config, get_peft_model
from torch import nn

from monteclora.errors import CheckpointError, ConfigError
from monteclora.prediction.classes import predict_classes
from monteclora.prediction.cost import Metered, metered
from monteclora.prediction.ensemble import Ensemble, Members
from monteclora.prediction.laplace import Laplace, LaplacePosterior, attach
from monteclora.prediction.mc_dropout import MCDropout
from monteclora.prediction.registry import SAMPLERS, check_calibrator, get_sampler
from monteclora.prediction.sampler import MEAN
from tests.models import bert, deberta, llama_classifier, same_global_generators, wrapped
from tests.prediction.rows import padding, rows_of

LENGTHS = [3, 9, 5, 7, 4]


@pytest.fixture(params=sorted(SAMPLERS))
def kind(request):
    return SAMPLERS[request.param]


@pytest.fixture(params=[bert, deberta, llama_classifier], ids=lambda build: build.__name__)
def model(request, kind):
    """What the kind of sampler draws from."""
    if kind.name == "ensemble":
        return Members([wrapped(request.param, seed=seed) for seed in range(4)])
    model = wrapped(request.param, lora_dropout=0.3)
    if kind.name == "laplace":
        attach(model, gaussian_around(model))
    return model


def gaussian_around(model):
    """With a Kronecker-factored precision of each drawn weight; fits are tested in test_laplace.py."""
    generator = torch.Generator().manual_seed(0)
    weights = {n: p for n, p in model.named_parameters() if p.requires_grad and "posteriors." not in n}
    parts = {}
    for name, weight in weights.items():
        for place, size in enumerate(weight.shape):
            root = torch.randn(size, size, generator=generator)
            values, vectors = torch.linalg.eigh(root @ root.T)
            parts |= {f"{name}/vectors.{place}": vectors, f"{name}/values.{place}": values.clamp_min(0)}
    return LaplacePosterior("kron", {n: tuple(p.shape) for n, p in weights.items()}, parts, 100.0, rows=1)


def found(model, sampler, batch_size=2):
    return predict_classes(model, rows_of(LENGTHS), padding(), sampler=sampler, batch_size=batch_size).log_probs


def test_probabilities_sum_to_one_under_every_draw(model, kind):
    sampler = kind.build(4, 0)
    log_probs = found(model, sampler)
    assert log_probs.shape == (sampler.num_samples, len(LENGTHS), 3)
    np.testing.assert_allclose(np.exp(log_probs).sum(-1), 1.0, atol=1e-12)


def test_a_row_is_predicted_alike_in_every_batch(model, kind):
    sampler = kind.build(4, 0)
    whole = found(model, sampler, batch_size=5)
    for batch_size in (1, 2):
        np.testing.assert_allclose(found(model, sampler, batch_size), whole, atol=1e-5)


def test_draws_belong_to_their_seed_and_to_nothing_else(model, kind):
    with same_global_generators():
        first = found(model, kind.build(4, 0))
    torch.rand(7)
    np.testing.assert_array_equal(found(model, kind.build(4, 0)), first)
    if kind.name != "mean":
        np.testing.assert_array_equal(found(model, kind.build(2, 0)), first[:2])
        if kind.name != "ensemble":  # which has no randomness of its own
            assert np.abs(found(model, kind.build(4, 1)) - first).max() > 1e-4
        assert np.abs(first[0] - first[1]).max() > 1e-4


def test_the_mean_and_the_modes_are_as_before(model, kind):
    before = found(model, MEAN)
    found(model, kind.build(3, 0))
    assert model.training
    np.testing.assert_array_equal(found(model, MEAN), before)


def test_the_cost_is_counted(model, kind):
    sampler = kind.build(4, 0)
    with metered(model) as meter:
        found(model, Metered(sampler, meter))
    costs = meter.costs(sampler.name)
    assert costs[sampler.name]["forward_passes"] == 3 * sampler.num_samples  # five rows in batches of two
    assert 0 < costs[sampler.name]["seconds"] <= meter.seconds
    assert costs.get("mean", {}).get("forward_passes") == (3 if kind.name == "mean" else 0)


def test_what_happens_under_draws_that_overlap_is_counted_once(model, kind):
    with metered(model) as meter, ExitStack() as stack:
        metering = Metered(kind.build(3, 0), meter)
        for number in range(metering.num_samples):
            stack.enter_context(metering.draw(model, number))
        found(model, MEAN)
    assert meter.drawn_calls == meter.calls == 3
    assert meter.drawn_seconds <= meter.seconds


def test_two_threads_do_not_see_each_others_draws(model, kind):
    model.eval()
    expected = [found(model, kind.build(2, seed)) for seed in range(4)]
    got = [None] * 4

    def predict(seed):
        got[seed] = found(model, kind.build(2, seed))

    threads = [threading.Thread(target=predict, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"no sampler 'mc_dropuot'. Did you mean mc_dropout"):
        get_sampler("mc_dropuot")
    with pytest.raises(ConfigError, match=r"no calibrator 'temprature'. Did you mean temperature"):
        check_calibrator("temprature")


# MC dropout


class Thinned(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.dropout = nn.Dropout(p)

    def forward(self, x):
        return self.dropout(x)


def test_masks_have_the_rate_of_the_layer_and_keep_the_mean():
    model, x = Thinned(0.3).eval(), torch.ones(1, 20_000)
    with MCDropout(1).draw(model, 0):
        y = model(x)
    assert y.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert float((y == 0).float().mean()) == pytest.approx(0.3, abs=0.01)  # three standard errors
    assert float(y.mean()) == pytest.approx(1.0, abs=0.015)


def test_a_mask_is_shared_by_rows_and_positions():
    model = Thinned(0.5).eval()
    with MCDropout(1).draw(model, 0):
        y = model(torch.ones(3, 4, 50))
    assert torch.equal(y, y[:1, :1].expand_as(y))


def test_dropout_of_attention_probabilities_stays_off():
    """Also where it has a layer of its own: its last axis is a position of the padded batch and not a feature."""
    one, other = (found(wrapped(deberta, base={"attention_probs_dropout_prob": p}), MCDropout(2)) for p in (0.0, 0.9))
    np.testing.assert_array_equal(one, other)


def test_a_copied_model_drops_nothing_twice():
    model = Thinned(0.5).eval()
    with MCDropout(1).draw(model, 0):
        expected = model(torch.ones(1, 50))
    copied = copy.deepcopy(model)
    with MCDropout(1).draw(copied, 0):
        assert torch.equal(copied(torch.ones(1, 50)), expected)


def test_a_model_without_dropout_is_refused():
    with pytest.raises(ConfigError, match=r"mc_dropout needs a dropout rate above 0.*Train with method\.lora_dropout"):
        found(wrapped(bert), MCDropout(2))
    with pytest.raises(ConfigError, match=r"has no such layer\. Choose another sampler"):
        MCDropout(2).check(get_peft_model(bert(), IA3Config(task_type="SEQ_CLS")))


# ensembles


@pytest.mark.parametrize("build", [bert, llama_classifier], ids=lambda build: build.__name__)
@pytest.mark.parametrize("adapted", [True, False], ids=["adapted", "whole"])
def test_each_draw_of_an_ensemble_is_one_member(build, adapted):
    """Also for models without an adapter, and whatever the padding: the base's signature is found inside."""
    members = [wrapped(build, seed=seed) if adapted else build(seed) for seed in range(3)]
    log_probs = found(Members(members), Ensemble(3))
    for draw, member in zip(log_probs, members, strict=True):
        np.testing.assert_array_equal(draw, found(member, MEAN)[0])


def test_a_single_model_and_too_few_members_are_refused():
    model = wrapped(bert)
    with pytest.raises(ConfigError, match=r"the sampler ensemble needs several runs, one a draw, and was given 1"):
        found(model, Ensemble(2))
    with pytest.raises(ConfigError, match="and was given 2"):
        found(Members([model, wrapped(bert, seed=1)]), Ensemble(3))


# Laplace approximations


def test_a_model_without_an_approximation_and_one_of_other_weights_are_refused():
    model = wrapped(bert)
    with pytest.raises(ConfigError, match="laplace needs an approximation that is fitted after training"):
        found(model, Laplace(2))
    with pytest.raises(CheckpointError, match="of other weights than the model's"):
        attach(wrapped(bert, r=2), gaussian_around(model))


def test_draws_of_laplace_are_refused_where_they_would_be_lost():
    model = wrapped(bert)
    add_hook_to_module(model, ModelHook())  # in the place of its forward, whatever the class has
    with pytest.raises(ConfigError, match="its forward was replaced"):
        attach(model, gaussian_around(model))
    assert not hasattr(model, "laplace_posterior")
    remove_hook_from_module(model)
    attach(model, gaussian_around(model))
    again = gaussian_around(model)
    attach(model, again)  # once more, in the place of the first
    assert model.laplace_posterior is again


def test_a_draw_is_the_model_linearised_at_its_weights():
    """Against differences of passes with other weights; also in a copy, whose draws are its own."""
    model = wrapped(llama_classifier).eval()
    posterior = gaussian_around(model)
    attach(model, posterior)
    batch = {"input_ids": torch.tensor([[5, 9, 20, 31]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    deviation = posterior.deviation(0, 1)

    @torch.no_grad()
    def moved(step):
        changed = copy.deepcopy(model)
        for name, parameter in changed.named_parameters():
            if name in deviation:
                parameter.add_(step * deviation[name])
        return changed(**batch).logits

    change = (moved(1e-2) - moved(-1e-2)) / 2e-2
    with torch.no_grad():
        for each in (model, copy.deepcopy(model)):
            with Laplace(2).draw(each, 1):
                drawn = each(**batch).logits
            torch.testing.assert_close(drawn, each(**batch).logits + change, atol=1e-3, rtol=1e-3)
    assert float((moved(1.0) - moved(0.0) - change).abs().max()) > 1e-2  # and is not the model with the drawn weights
