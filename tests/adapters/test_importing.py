"""Adapters of peft's own MonteCLoRA variant."""

import json

import peft
import pytest
import torch
from peft.tuners.lora import MontecloraConfig
from safetensors.torch import load_file, save_file

import monteclora
from monteclora.adapters.importing import import_adapter
from monteclora.cli import main
from monteclora.errors import CheckpointError, ConfigError
from tests.models import bert, gpt2

OPTIONS = {
    "num_samples": 3,
    "sample_scaler": 0.02,
    "kl_loss_weight": 2e-4,
    "dirichlet_prior": 0.5,
    "use_entropy": True,
    "buffer_size": 7,
}


def trained(folder, make=bert, task="SEQ_CLS", options=OPTIONS, **lora):
    """An adapter of peft whose parts are none of them what they begin as, and whose model has eleven blocks."""
    given = {"r": 4, "task_type": task, "monteclora_config": MontecloraConfig(**options), **lora}
    model = peft.get_peft_model(make(), peft.LoraConfig(**given))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * (0.7 if "prior" in name else 0.1)
    model.train()(input_ids=torch.arange(2, 12)[None])  # its samplers have a last draw
    model.save_pretrained(folder)
    return model


def deep_bert():
    return bert(num_hidden_layers=11)


def imported(tmp_path, make=bert, task="SEQ_CLS"):
    model = trained(tmp_path / "peft", make, task)
    return model, import_adapter(make(), tmp_path / "peft", tmp_path / "ours")


@pytest.mark.parametrize(("make", "task"), [(deep_bert, "SEQ_CLS"), (gpt2, "CAUSAL_LM")])
def test_the_mean_is_that_of_peft_and_each_layer_has_its_own_logarithms(tmp_path, make, task):
    theirs, found = imported(tmp_path, make, task)
    ours = monteclora.from_pretrained(make(), found.folder).eval()
    batch = {"input_ids": torch.arange(2, 26).view(3, 8)}
    with torch.no_grad():
        expected = theirs.eval()(**batch).logits
        assert torch.equal(ours(**batch).logits, expected)
        assert torch.equal(peft.PeftModel.from_pretrained(make(), found.folder).eval()(**batch).logits, expected)
    posterior = ours.base_model.active_posteriors()[0]
    rho = dict(zip([layer.name for layer in posterior.layers], posterior.rho.split(4), strict=True))
    samplers = {n: m for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_monteclora_sampler")}
    assert rho.keys() == samplers.keys()
    for index, (name, layer) in enumerate(samplers.items()):
        sampler = layer.lora_monteclora_sampler["default"]
        assert torch.equal(rho[name], sampler.std_prior)
        assert torch.equal(posterior.eta[index], sampler.expert_weights_prior)
    torch.testing.assert_close(posterior.scale, torch.full_like(posterior.scale, 0.02))
    settings = posterior.settings
    assert (settings.num_components, settings.kl_weight, settings.coop_weight, settings.alpha_prior) == (
        3,
        2e-4,
        1.0,
        0.5,
    )
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "ours"))
    assert after.keys() == {name for name in before if "sampler" not in name}
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_draws_scatter_as_those_of_peft_do(tmp_path):
    """Row by row: their standard deviations differ, and the published law is sqrt(r) times the normalised one."""
    torch.manual_seed(0)
    theirs, found = imported(tmp_path)
    posterior = monteclora.from_pretrained(bert(), found.folder).base_model.active_posteriors()[0]
    name = posterior.layers[1].name
    sampler = theirs.base_model.model.get_submodule(name).lora_monteclora_sampler["default"]
    with torch.no_grad():
        noises = [torch.einsum("n,nij->ij", weights, noise) for noise, weights in (sampler() for _ in range(6000))]
        expected = torch.stack(noises).square().mean((0, 1)).sqrt()
        drawn = torch.cat([posterior.sample(0, first, 500).layers[1].transposed for first in range(0, 6000, 500)])
    ratio = drawn.square().mean((0, 1)).sqrt() / expected
    assert expected.max() / expected.min() > 2
    assert (ratio - 1).abs().max() < 0.06  # over four standard errors of 6,000 draws of Sigma and pi on either side


def test_what_has_no_counterpart_is_named(tmp_path, capsys):
    trained(tmp_path / "peft")
    bert().save_pretrained(tmp_path / "base")
    (tmp_path / "peft" / "noise_buffers.safetensors").write_bytes(b"")
    argv = ["import", str(tmp_path / "peft"), str(tmp_path / "ours"), "--base", str(tmp_path / "base")]
    assert main(argv) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(tmp_path / "ours")
    for left_out in ("buffer_size 7", "gaussian_var_prior", "1e-3", "noise_buffers.safetensors", "log-gamma"):
        assert left_out in said.err
    assert main(argv) == 2
    assert "exists" in capsys.readouterr().err
    # it predicts, and is calibrated, as any other adapter
    assert monteclora.predict(
        monteclora.from_pretrained(bert(), tmp_path / "ours").eval(), {"input_ids": torch.arange(2, 12)[None]}
    ).epistemic.shape == (1,)


def test_what_cannot_be_imported_is_refused_and_nothing_is_written(tmp_path, capsys):
    plain = tmp_path / "plain"
    peft.get_peft_model(bert(), peft.LoraConfig(r=4, task_type="SEQ_CLS")).save_pretrained(plain)
    with pytest.raises(ConfigError, match="no monteclora_config: it is an adapter without a posterior"):
        import_adapter(bert(), plain, tmp_path / "ours")
    trained(tmp_path / "peft")
    with pytest.raises(CheckpointError, match="has no A of shape"):
        import_adapter(bert(num_hidden_layers=3), tmp_path / "peft", tmp_path / "ours")
    weights = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    lost = next(name for name in weights if name.endswith("std_prior"))
    save_file({name: value for name, value in weights.items() if name != lost}, tmp_path / "lost")
    (tmp_path / "lost").replace(tmp_path / "peft" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"has no std_prior of 4 numbers for the layer bert\.encoder\.layer\.0"):
        import_adapter(bert(), tmp_path / "peft", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    config["task_type"] = None
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    assert main(["import", str(tmp_path / "peft"), str(tmp_path / "ours"), "--base", str(tmp_path)]) == 2
    assert "has the task_type None, which does not say what model it is for" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()
