"""A posterior belongs to one mean: on disk, in a state dict, and when adapters are combined or initialised again."""

from __future__ import annotations

import copy
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator
from peft.utils import get_peft_model_state_dict, hotswap, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from torch import Tensor, nn

import monteclora
from monteclora import variational_loss
from monteclora.adapters.storage import POSTERIOR_FILE, load_posterior
from monteclora.errors import CheckpointError, ConfigError
from tests.models import batch_for, bert, config_for, llama, posterior_of, stir, wrapped

pytestmark = pytest.mark.filterwarnings("ignore:.*changes the base weights of the model")


def inputs() -> dict[str, Tensor]:
    return {key: value for key, value in batch_for(llama).items() if key != "labels"}


def steps(model: nn.Module, count: int, optimizer: torch.optim.Optimizer | None = None) -> list[float]:
    optimizer = optimizer or torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
    losses = []
    for seed in range(count):
        loss = model(**batch_for(llama, seed=seed)).loss + variational_loss(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# -- on disk -----------------------------------------------------------------------------------------------------------


def test_a_posterior_left_behind_by_peft_is_not_paired_with_the_new_mean(tmp_path: Path) -> None:
    wrapped(llama).save_pretrained(tmp_path)
    plain = peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    plain.save_pretrained(tmp_path)
    monteclora.from_pretrained(llama(), tmp_path)  # the same mean
    with torch.no_grad():
        next(p for n, p in plain.named_parameters() if "lora_A" in n).add_(1.0)
    plain.save_pretrained(tmp_path)
    base = llama()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"{POSTERIOR_FILE} is the posterior of another mean .*adapter_model"):
        monteclora.from_pretrained(base, tmp_path)
    assert base.state_dict().keys() == before.keys()
    model = wrapped(llama)
    for name in ("default", "second"):
        with pytest.raises(CheckpointError, match="another mean"):
            model.load_adapter(tmp_path, name)


def test_a_plain_adapter_saved_over_a_drawn_one_removes_its_posterior(tmp_path: Path) -> None:
    model = wrapped(llama)
    model.save_pretrained(tmp_path)
    model.add_adapter("plain", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "both")
    shutil.copy(tmp_path / POSTERIOR_FILE, tmp_path / "both" / "plain" / POSTERIOR_FILE)
    model.save_pretrained(tmp_path / "both")
    assert (tmp_path / "both" / POSTERIOR_FILE).exists()
    assert not (tmp_path / "both" / "plain" / POSTERIOR_FILE).exists()


def test_a_pickle_is_refused_when_saving(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="safe_serialization=False"):
        wrapped(llama).save_pretrained(tmp_path / "new", safe_serialization=False)
    assert not (tmp_path / "new").exists()


def test_a_state_dict_gives_mean_and_posterior(tmp_path: Path) -> None:
    model = wrapped(llama)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    steps(model, 2)
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = monteclora.from_pretrained(llama(), tmp_path)
    for name in ("rho", "eta"):
        assert torch.equal(getattr(posterior_of(loaded), name), state[f"posteriors.default.{name}"])
        assert not torch.equal(getattr(posterior_of(loaded), name), getattr(posterior_of(model), name))


def saved_weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_hotswap_refuses_another_mean_for_a_posterior(tmp_path: Path) -> None:
    wrapped(llama, seed=3).save_pretrained(tmp_path)
    model = wrapped(llama)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for trained in (True, False):
        model.requires_grad_(trained)
        with pytest.raises(ConfigError, match="'default' has a posterior, which would be paired with another mean"):
            hotswap_adapter(model, tmp_path, "default")
        weights = {name.replace(".weight", ".default.weight"): value for name, value in saved_weights(tmp_path).items()}
        with pytest.raises(ConfigError, match="'default' has a posterior"):
            hotswap.hotswap_adapter_from_state_dict(model, weights, "default", config_for(llama).plain_lora())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # what has no posterior is swapped as ever
    plain = peft.get_peft_model(llama(), config_for(llama).plain_lora())
    hotswap_adapter(plain, tmp_path, "default")
    model.add_adapter("plain", config_for(llama).plain_lora())
    weights = {name.replace(".weight", ".plain.weight"): value for name, value in saved_weights(tmp_path).items()}
    hotswap.hotswap_adapter_from_state_dict(model, weights, "plain", config_for(llama).plain_lora())
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights.items())
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(plain.eval()(**inputs()).logits, loaded.eval()(**inputs()).logits)


def test_loading_leaves_what_the_user_froze_frozen(tmp_path: Path) -> None:
    model = wrapped(llama)
    model.save_pretrained(tmp_path)
    posterior_of(model).rho.requires_grad_(False)
    for trainable in (False, True):
        model.load_adapter(tmp_path, "default", is_trainable=trainable)
        assert (posterior_of(model).rho.requires_grad, posterior_of(model).eta.requires_grad) == (False, True)
    for trainable in (False, True):
        model = monteclora.from_pretrained(llama(), tmp_path, is_trainable=trainable)
        for other in (False, True):
            model.load_adapter(tmp_path, f"other {other}", is_trainable=other)
            assert all(p.requires_grad is trainable for p in posterior_of(model).parameters())
            assert all(p.requires_grad is other for p in posterior_of(model, f"other {other}").parameters())
        model.add_adapter("added", config_for(llama))
        frozen = {"default": not trainable, "other False": True, "other True": False, "added": True}
        for name, expected in frozen.items():
            assert all(p.requires_grad is not expected for p in posterior_of(model, name).parameters())


# -- state dicts -------------------------------------------------------------------------------------------------------


def test_accelerate_state_resumes_with_the_draws_it_would_have_made(tmp_path: Path) -> None:
    def prepared() -> tuple[Accelerator, Any, torch.optim.Optimizer]:
        model, accelerator = wrapped(llama), Accelerator(cpu=True)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01)
        return accelerator, *accelerator.prepare(model, optimizer)

    accelerator, model, optimizer = prepared()
    steps(model, 3, optimizer)
    accelerator.save_state(str(tmp_path))
    expected = steps(model, 3, optimizer)
    accelerator, model, optimizer = prepared()
    accelerator.load_state(str(tmp_path))
    assert posterior_of(model).draws == 3
    assert steps(model, 3, optimizer) == expected


def test_adapters_in_another_order_keep_their_posteriors() -> None:
    def built(*names: str) -> Any:
        model = monteclora.get_peft_model(llama(), config_for(llama), adapter_name=names[0])
        model.add_adapter(names[1], config_for(llama))
        return model

    one, other = built("a", "b"), built("b", "a")
    stir(one)
    posterior_of(one, "a").draws = 5
    other.load_state_dict(one.state_dict())
    for name in ("a", "b"):
        assert torch.equal(posterior_of(one, name).rho, posterior_of(other, name).rho)
    assert (posterior_of(other, "a").draws, posterior_of(other, "b").draws) == (5, 0)
    assert not torch.equal(posterior_of(one, "a").rho, posterior_of(one, "b").rho)


def test_a_mean_without_its_posterior_is_refused() -> None:
    model, other = wrapped(llama), wrapped(llama, seed=3)
    own, foreign = get_peft_model_state_dict(model), get_peft_model_state_dict(other)
    set_peft_model_state_dict(model, {name: value.clone() for name, value in own.items()})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="adapter 'default' holds another mean and no posterior"):
        set_peft_model_state_dict(model, foreign)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# -- combinations and initialisations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
def test_a_combination_is_the_plain_lora_that_peft_makes(kind: str) -> None:
    model = wrapped(llama)
    model.add_adapter("second", config_for(llama))
    stir(model, seed=7)
    model.base_model.add_weighted_adapter(["default", "second"], [0.5, 2.0], "both", combination_type=kind)
    assert model.base_model.posterior("both") is None
    assert type(model.peft_config["default"]) is monteclora.MonteCLoRAConfig
    lora = peft.get_peft_model(llama(), config_for(llama).plain_lora())
    lora.add_adapter("second", config_for(llama).plain_lora())
    lora.load_state_dict(model.state_dict(), strict=False)
    lora.base_model.add_weighted_adapter(["default", "second"], [0.5, 2.0], "both", combination_type=kind)
    for one in (model, lora):
        one.base_model.set_adapter("both")
        one.eval()
    assert torch.equal(model(**inputs()).logits, lora(**inputs()).logits)


def test_eva_gives_the_ranks_and_the_scale_of_the_final_mean(tmp_path: Path) -> None:
    options = {"r": 2, "init_lora_weights": "eva", "eva_config": peft.EvaConfig(rho=2.0)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = monteclora.get_peft_model(llama(), config_for(llama, sample_scale="relative:0.5", **options))
        data = [{k: v for k, v in batch_for(llama, seed=seed).items() if k != "labels"} for seed in range(6)]
        peft.initialize_lora_eva_weights(model, data, show_progress_bar=False)
    steps(model, 0)
    posterior = posterior_of(model)
    assert {layer.rank for layer in posterior.layers} == {1, 2, 3}
    for layer, eps in zip(posterior.layers, posterior.scale.tolist(), strict=True):
        a = model.base_model.model.get_submodule(layer.name).lora_A["default"].weight
        assert a.shape[0] == layer.rank
        assert eps == pytest.approx(0.5 * a.square().mean().sqrt().item(), rel=1e-6)
    scale = posterior.scale.clone()
    steps(model, 2)
    assert torch.equal(posterior_of(model).scale, scale)  # not that of a trained A
    model.save_pretrained(tmp_path)
    assert posterior_of(monteclora.from_pretrained(llama(), tmp_path)).layers == posterior.layers


def test_an_adapter_that_was_not_trained_yet_is_converted_too(tmp_path: Path) -> None:
    """Its posterior is not fitted to A for good, which is asked for while peft sees plain configurations."""
    model = monteclora.get_peft_model(llama(), config_for(llama, init_lora_weights="pissa"))
    model.save_pretrained(tmp_path / "initial")
    stir(model)
    model.save_pretrained(tmp_path / "done", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "done").eval()
    assert not (tmp_path / "done" / POSTERIOR_FILE).exists()
    assert loaded.peft_config["default"].r == 8


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_a_converted_adapter_is_a_plain_lora_that_computes_the_mean(kind: str, tmp_path: Path) -> None:
    model = monteclora.get_peft_model(llama(), config_for(llama, init_lora_weights=kind))
    config = model.peft_config["default"]
    config.init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    config.init_lora_weights = kind
    steps(model, 2)
    model.save_pretrained(tmp_path / "done", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    assert not (tmp_path / "done" / POSTERIOR_FILE).exists()
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "done").eval()
    torch.testing.assert_close(loaded(**inputs()).logits, model.eval()(**inputs()).logits, rtol=0, atol=1e-5)
    assert list(model.peft_config) == ["default"]
    with pytest.raises(CheckpointError, match="plain LoRA"):
        monteclora.from_pretrained(llama(), tmp_path / "done")


# -- onto which model --------------------------------------------------------------------------------------------------


def test_a_head_of_another_number_of_labels_says_which(tmp_path: Path) -> None:
    wrapped(bert, base={"num_labels": 4}).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"has a head of 4 labels .* and the model one of 2") as caught:
        monteclora.from_pretrained(bert(num_labels=2), tmp_path)
    assert caught.value.hint == "Load the base model with num_labels=4."


def test_a_given_configuration_takes_the_place_of_the_saved_one(tmp_path: Path) -> None:
    model = wrapped(llama)
    model.save_pretrained(tmp_path)
    config = config_for(llama, kl_weight=7.0, noise_seed=3)
    loaded = monteclora.from_pretrained(llama(), tmp_path, config=config, is_trainable=True)
    assert loaded.peft_config["default"].kl_weight == posterior_of(loaded).settings.kl_weight == 7.0
    assert torch.equal(posterior_of(loaded).rho, posterior_of(model).rho)
    with pytest.raises(CheckpointError, match="eta has shape"):
        monteclora.from_pretrained(llama(), tmp_path, config=config_for(llama, num_components=9))


def test_an_adapter_of_a_compiled_model_fits_the_model(tmp_path: Path) -> None:
    base = llama()
    base.model = torch.compile(base.model)
    monteclora.get_peft_model(base, config_for(llama)).save_pretrained(tmp_path)
    names = [layer.name for layer in load_posterior(tmp_path / POSTERIOR_FILE).layers]
    assert names == [layer.name for layer in posterior_of(wrapped(llama)).layers]


def test_a_key_mapping_names_the_layers_of_the_posterior_too(tmp_path: Path) -> None:
    model = wrapped(llama, task_type=None).eval()
    model.save_pretrained(tmp_path)

    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core = llama()

        def forward(self, **batch: Tensor) -> Any:
            return self.core(**batch)

    loaded = monteclora.from_pretrained(Renamed(), tmp_path, key_mapping={"^model": "core.model"})
    assert torch.equal(loaded(**inputs()).logits, model(**inputs()).logits)
    assert torch.equal(posterior_of(loaded).rho, posterior_of(model).rho)


def test_the_hints_of_one_mistake_do_not_contradict_each_other(tmp_path: Path) -> None:
    wrapped(llama).save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path)
    with pytest.raises(ConfigError) as caught:
        variational_loss(loaded)
    assert "monteclora.from_pretrained" in caught.value.hint
    with pytest.raises(ConfigError) as caught:
        monteclora.get_peft_model(loaded, config_for(llama))
    assert "add_adapter" not in caught.value.hint


def test_a_cached_hub_adapter_loads_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--someone--adapter"
    snapshot = repository / "snapshots" / ("0" * 40)
    model = wrapped(llama)
    model.save_pretrained(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    loaded = monteclora.from_pretrained(llama(), "someone/adapter", cache_dir=str(tmp_path))
    assert torch.equal(posterior_of(loaded).rho, posterior_of(model).rho)
    with pytest.raises(CheckpointError, match="within reach"):
        monteclora.from_pretrained(llama(), "someone/other", cache_dir=str(tmp_path))


def test_copies_are_bound_to_their_own_mean(tmp_path: Path) -> None:
    model = wrapped(llama)
    copied = copy.deepcopy(model)
    steps(copied, 1)
    copied.save_pretrained(tmp_path)
    assert torch.equal(posterior_of(monteclora.from_pretrained(llama(), tmp_path)).rho, posterior_of(copied).rho)


def test_names_and_revisions_that_peft_warns_of_are_warned_of(tmp_path: Path) -> None:
    config = monteclora.MonteCLoRAConfig(r=4, target_modules=["q_proj"], revision="v1")
    with pytest.warns(UserWarning, match="revision to v1, overwriting with revision v2"):
        model = monteclora.get_peft_model(llama(), config, revision="v2")
    assert model.peft_config["default"].revision == "v2"
    with pytest.warns(UserWarning, match="Adapter name 'lora' should not be contained in the prefix 'lora_'"):
        model = monteclora.get_peft_model(
            llama(), monteclora.MonteCLoRAConfig(r=4, target_modules=["q_proj"]), adapter_name="lora"
        )
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="Adapter name 'lora' should not be"):
        monteclora.from_pretrained(llama(), tmp_path / "lora", adapter_name="lora")
