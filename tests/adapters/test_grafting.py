import math

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import monteclora
from monteclora.adapters import storage
from monteclora.adapters.grafting import graft, isotropic
from monteclora.adapters.rescaling import posterior_scale, rescale_posterior, restore_plain, restore_posterior
from monteclora.errors import ConfigError
from tests.models import bert, gpt2


def plain(folder, make=bert, task="SEQ_CLS", **options):
    """A LoRA adapter of peft alone, with a B that is not zero and has one column too many."""
    model = peft.get_peft_model(make(), peft.LoraConfig(**{"r": 3, "task_type": task, **options}))
    generator = torch.Generator().manual_seed(3)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data = torch.randn(weight.shape, generator=generator)
            weight.data[:, 2] = 2.0 * weight.data[:, 0] if ".1." in name else weight.data[:, 2]
    model.save_pretrained(folder)
    return folder


def batch():
    return {"input_ids": torch.arange(2, 26).view(3, 8)}


@pytest.mark.parametrize("rank", [4, 2])
@pytest.mark.parametrize("shape", [(10, 7), (3, 7)])
def test_isotropic_noise_has_a_covariance_proportional_to_the_projector_onto_the_columns(rank, shape):
    """By the closed form of the noise's variance: Cov(B E x) = eps^2 E||pi||^2 c |x|^2 B diag(exp(2 rho)) B^T."""
    outputs, inputs = shape
    generator = torch.Generator().manual_seed(rank)
    b = torch.randn(outputs, rank, generator=generator) @ torch.randn(rank, 4, generator=generator)
    a = torch.randn(4, inputs, generator=generator)
    new_a, new_b, rho = isotropic(a, b)
    torch.testing.assert_close(new_b @ new_a, b @ a, atol=1e-5, rtol=1e-5)
    covariance = new_b.double() @ torch.diag((2 * rho.double()).exp()) @ new_b.double().T
    projector = b.double() @ torch.linalg.pinv(b.double(), rtol=1e-5)
    size = b.double().square().sum() / min(rank, outputs)
    torch.testing.assert_close(covariance, size * projector, atol=1e-4 * float(size), rtol=0)
    # as large in all as with rows of the same scale
    torch.testing.assert_close(covariance.trace(), b.double().square().sum(), rtol=1e-4, atol=0)


def test_a_layer_without_an_update_gets_equal_rows():
    _, _, rho = isotropic(torch.ones(2, 3), torch.zeros(4, 2))
    assert not rho.any()


@pytest.mark.parametrize("rows", ["equal", "isotropic"])
@pytest.mark.parametrize(("make", "task"), [(bert, "SEQ_CLS"), (gpt2, "CAUSAL_LM")])
def test_a_plain_adapter_keeps_its_mean_and_draws_around_it(tmp_path, rows, make, task):
    folder = plain(tmp_path, make, task)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with torch.no_grad():
        expected = peft.PeftModel.from_pretrained(make(), folder).eval()(**batch()).logits
    graft(make(), folder, rows).save()
    assert posterior_scale(folder)["grafted"] == rows
    loaded = monteclora.from_pretrained(make(), folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch()).logits, expected, atol=1e-5, rtol=1e-4)
        for again in (peft.PeftModel.from_pretrained(make(), folder).eval(),):
            torch.testing.assert_close(again(**batch()).logits, expected, atol=1e-5, rtol=1e-4)
    found = monteclora.predict(loaded, batch(), num_samples=4)
    assert found.epistemic.min() > 0
    rescale_posterior(folder, 0.0, {})
    assert posterior_scale(folder)["grafted"] == rows
    still = monteclora.predict(monteclora.from_pretrained(make(), folder).eval(), batch(), num_samples=4)
    assert still.epistemic.max() < 1e-6
    assert restore_posterior(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_output_of_a_layer_scatters_alike_in_every_direction(tmp_path):
    """Two thousand draws of one layer of rank 3, seen along the columns of U and beside them."""
    folder = plain(tmp_path)
    original = load_file(folder / "adapter_model.safetensors")
    graft(bert(), folder, "isotropic").save()
    model = monteclora.from_pretrained(bert(), folder).eval()
    name, layer = next(iter(model.base_model.adapted_layers(model.base_model.active_posteriors()[0]).items()))
    u, _, _ = torch.linalg.svd(original[f"base_model.model.{name}.lora_B.weight"], full_matrices=False)
    x = torch.randn(1, layer.in_features, generator=torch.Generator().manual_seed(0))
    noises = []
    with torch.no_grad():
        mean = layer(x)
        posterior = model.base_model.active_posteriors()[0]
        for number in range(0, 2000, 100):
            draw = posterior.sample(0, number, 100)
            for s in range(100):
                noise = draw.layers[0].transposed[s]
                noises.append(layer.scaling["default"] * (x @ noise) @ layer.lora_B["default"].weight.T)
    found = torch.cat(noises)
    along = (found @ u).var(0)
    assert mean.shape == found[:1].shape
    assert float((found - found @ u @ u.T).abs().max()) < 1e-4
    assert along.max() / along.min() < 1.35  # three variances of 2,000 draws, each within 10 % at 99 %


def test_a_variant_that_cannot_be_drawn_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"adapter_config.json: use_dora cannot be combined"):
        graft(bert(), plain(tmp_path, use_dora=True), "equal")


def test_undo_never_puts_back_weights_of_an_earlier_posterior(tmp_path):
    folder = plain(tmp_path)
    graft(bert(), folder, "isotropic").save()
    (folder / "posterior.safetensors").unlink()
    plain(folder, lora_alpha=5)  # trained again, and saved over the rotated weights
    weights = (folder / "adapter_model.safetensors").read_bytes()
    graft(bert(), folder, "equal").save()
    assert restore_posterior(folder)
    assert (folder / "adapter_model.safetensors").read_bytes() == weights


def test_unequal_rows_of_a_posterior_that_was_not_trained_are_no_divergence(tmp_path, caplog):
    folder = plain(tmp_path)
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    for name in weights:
        if "lora_B" in name:
            weights[name][:, 1] *= 1e-3
    save_file(weights, file, metadata={"format": "pt"})
    graft(bert(), folder, "isotropic").save()
    assert load_file(folder / "posterior.safetensors")["rho"].max() > math.log(100)  # of which a trained one would warn
    assert not [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("rows", ["equal", "isotropic"])
def test_a_kill_between_weights_and_posterior_loses_no_weights(tmp_path, monkeypatch, rows):
    folder = plain(tmp_path)
    file = folder / "adapter_model.safetensors"
    weights = file.read_bytes()

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(storage, "save_posterior", killed)
        with pytest.raises(KeyboardInterrupt):
            graft(bert(), folder, "isotropic").save()
    assert file.read_bytes() != weights
    graft(bert(), folder, rows).save()
    assert restore_posterior(folder)
    assert file.read_bytes() == weights
    assert not (folder / "adapter_model.safetensors.plain").exists()


@pytest.mark.parametrize("changed", ["lora_A", "lora_B", "classifier"])
def test_kept_weights_of_another_update_are_not_put_back(tmp_path, changed):
    folder = plain(tmp_path)
    graft(bert(), folder, "isotropic").save()
    (folder / "posterior.safetensors").unlink()
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if changed in name)
    weights[name][0] += 1e-3
    save_file(weights, file, metadata={"format": "pt"})
    assert not restore_plain(folder)
    assert load_file(file)[name].equal(weights[name])
