"""Models that accelerate has placed: on a device they are what they are elsewhere, offloaded layers are refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import monteclora
from monteclora.errors import ConfigError
from tests.models import batch_for, config_for, gradients, llama, posterior_of, relative_difference, step, wrapped

CPU = torch.device("cpu")
TOP = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")


def placed(folder: Path, **places: str) -> LlamaForCausalLM:
    """A model from disk, with everything on the CPU but what is said."""
    llama().save_pretrained(folder / "base")
    everywhere = dict.fromkeys([*TOP, "model.layers.0", "model.layers.1"], "cpu")
    where = {**everywhere, **{name.replace("__", "."): place for name, place in places.items()}}
    return LlamaForCausalLM.from_pretrained(folder / "base", device_map=where, offload_folder=folder / "offloaded")


def results(model: nn.Module) -> dict[str, Tensor]:
    """Two training steps' gradients, the draws of a prediction, and the mean."""
    step(model, llama)
    found = {**gradients(model), "loss": model(**batch_for(llama)).loss.detach()}
    found["mean"] = model.eval()(**batch_for(llama)).logits.detach()
    return {**found, "draws": monteclora.predict(model, batch_for(llama), num_samples=2).probs}


@pytest.mark.parametrize("case", ["dispatched", "device_map", "others_on_disk"])
def test_on_a_device_it_is_the_model_it_is_elsewhere(case: str, tmp_path: Path) -> None:
    if case == "dispatched":
        model = dispatch_model(wrapped(llama), {"": "cpu"}, force_hooks=True)
    else:
        on_disk = {"lm_head": "disk", "model__embed_tokens": "disk"} if case == "others_on_disk" else {}
        model = monteclora.get_peft_model(placed(tmp_path, **on_disk), config_for(llama)).train()
        if on_disk:
            assert model.get_base_model().lm_head.weight.is_meta
        reference = wrapped(llama)
        model.load_state_dict(
            {k: v for k, v in reference.state_dict().items() if "lora_" in k or "posteriors" in k}, strict=False
        )
    assert relative_difference(results(model), results(wrapped(llama))) < 1e-6


def adapted_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


OFFLOADED: dict[str, Callable[[Path], nn.Module]] = {
    "cpu_offload": lambda folder: cpu_offload(llama(), CPU),
    "disk_offload": lambda folder: disk_offload(llama(), folder / "offloaded", CPU),
    "device_map": lambda folder: placed(folder, model__layers__1="disk"),
}


@pytest.mark.parametrize("way", [*OFFLOADED])
@pytest.mark.parametrize("loads", [False, True])
def test_an_offloaded_target_is_refused_and_the_model_left_as_it_was(way: str, loads: bool, tmp_path: Path) -> None:
    base = OFFLOADED[way](tmp_path)
    wrapped(llama).save_pretrained(tmp_path / "adapter")
    layer = "model.layers.1.self_attn.q_proj" if way == "device_map" else "model.layers.0.self_attn.q_proj"
    load_or_wrap: Callable[[nn.Module], object] = partial(monteclora.get_peft_model, peft_config=config_for(llama))
    if loads:
        load_or_wrap = partial(monteclora.from_pretrained, model_id=tmp_path / "adapter")
    with pytest.raises(ConfigError, match=rf"'{layer}' is offloaded"):
        load_or_wrap(base)
    assert not adapted_layers(base)


def offload_a_block(model: nn.Module, folder: Path) -> nn.Module:
    prefix = "base_model.model."
    where = {**{prefix + name: "cpu" for name in (*TOP, "model.layers.0")}, prefix + "model.layers.1": "disk"}
    return dispatch_model(model, {**where, "posteriors": "cpu"}, main_device="cpu", offload_dir=folder)


AFTERWARDS: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "cpu_offload": lambda model, folder: cpu_offload(model, CPU),
    "disk_offload": lambda model, folder: disk_offload(model, folder, CPU),
    "a_block": offload_a_block,
    "the_posterior": lambda model, folder: cpu_offload(model.posteriors, CPU) and model,
}


@pytest.mark.parametrize("way", [*AFTERWARDS])
@pytest.mark.parametrize("training", [True, False])
def test_an_adapter_offloaded_later_is_refused_before_anything_is_computed(
    way: str, training: bool, tmp_path: Path
) -> None:
    """Plain LoRA on such a model trains what is on a device and leaves the rest as it was, without a word."""
    model = wrapped(llama)
    model(**batch_for(llama))  # the posterior is measured: its layers are not asked again
    model = AFTERWARDS[way](model.train(training), tmp_path)
    draws, calls = posterior_of(model).draws, []
    for layer in adapted_layers(model):
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ConfigError, match=r"are offloaded|is offloaded"):
        _ = model(**batch_for(llama)) if training else monteclora.predict(model, batch_for(llama), num_samples=2)
    assert (posterior_of(model).draws, calls) == (draws, [])


def test_what_is_offloaded_is_back_when_its_hooks_are_taken_away(tmp_path: Path) -> None:
    from accelerate.hooks import remove_hook_from_submodules

    model = wrapped(llama)
    before = results(model)
    model = wrapped(llama)
    cpu_offload(model, CPU)
    remove_hook_from_submodules(model)
    assert relative_difference(results(model), before) == 0.0
