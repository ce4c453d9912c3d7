"""Names of layers: files have those of the model as it was built, whatever was compiled or renamed since."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

import monteclora
from monteclora.adapters import storage
from monteclora.adapters.names import plain_name
from monteclora.errors import CheckpointError
from tests.models import VOCABULARY, bert, config_for, llama, posterior_of, stir, tokens, wrapped


def compiled_blocks(base: Any) -> nn.Module:
    for number, block in enumerate(base.model.layers):
        base.model.layers[number] = torch.compile(block)
    return base


BASES: dict[str, Callable[[], nn.Module]] = {
    "plain": llama,
    "whole": lambda: torch.compile(llama()),
    "blocks": lambda: compiled_blocks(llama()),
    "both": lambda: torch.compile(compiled_blocks(llama())),
}


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors, posterior included, by their plain names."""
    named = {plain_name(name): value for name, value in model.named_parameters()}
    return {name: value for name, value in named.items() if "lora_" in name or "posteriors" in name}


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    found, expected = weights(one), weights(other)
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert posterior_of(one).layers == posterior_of(other).layers


@pytest.mark.parametrize("source", [*BASES])
def test_an_adapter_of_a_compiled_model_fits_every_other(source: str, tmp_path: Path) -> None:
    pattern = {"model.layers.1.self_attn.q_proj": 2}
    model = monteclora.get_peft_model(BASES[source](), config_for(llama, rank_pattern=pattern))
    stir(model)
    model.save_pretrained(tmp_path)
    assert sorted(load_file(tmp_path / "adapter_model.safetensors")) == sorted(
        f"base_model.model.{layer.name}.lora_{part}.weight" for layer in posterior_of(model).layers for part in "AB"
    )
    assert peft.PeftConfig.from_pretrained(str(tmp_path)).rank_pattern == pattern
    assert posterior_of(model).layers[3].rank == 2
    for base in BASES.values():
        assert_equal(monteclora.from_pretrained(base(), tmp_path), model)
    mean = peft.PeftModel.from_pretrained(llama(), tmp_path)
    assert all(torch.equal(value, weights(model)[name]) for name, value in weights(mean).items())


@pytest.mark.parametrize("source", ["plain", "blocks"])
def test_blocks_compiled_after_wrapping(source: str, tmp_path: Path) -> None:
    """Between wrapping and training the posterior is compared with its layers: it must not be made anew."""
    model = monteclora.get_peft_model(BASES[source](), config_for(llama))
    stir(model)
    model.save_pretrained(tmp_path / "saved")
    other = monteclora.get_peft_model(llama(), config_for(llama))
    posterior = posterior_of(other)
    compiled_blocks(other.get_base_model())
    other.load_adapter(tmp_path / "saved", "default", is_trainable=True)
    assert posterior_of(other) is posterior
    assert_equal(other, model)
    other.save_pretrained(tmp_path / "again")
    assert_equal(monteclora.from_pretrained(llama(), tmp_path / "again"), model)


def test_a_classifiers_head_that_is_trained_beside_the_adapter(tmp_path: Path) -> None:
    model = monteclora.get_peft_model(torch.compile(bert()), config_for(bert))
    head = model.get_base_model()._orig_mod.classifier.modules_to_save["default"].weight
    nn.init.normal_(head)
    model.save_pretrained(tmp_path)
    for base in (bert(seed=1), torch.compile(bert(seed=1))):
        loaded = monteclora.from_pretrained(base, tmp_path).get_base_model()
        loaded = getattr(loaded, "_orig_mod", loaded)
        assert torch.equal(loaded.classifier.modules_to_save["default"].weight, head)


def test_exports_of_a_compiled_model_are_those_of_the_model(tmp_path: Path) -> None:
    models = {name: wrapped(llama).eval() for name in ("plain", "blocks")}
    compiled_blocks(models["blocks"].get_base_model())
    models["whole"] = monteclora.get_peft_model(torch.compile(llama()), config_for(llama)).eval()
    stir(models["whole"])
    with torch.no_grad():
        expected = models["plain"](input_ids=tokens()).logits
    for name, model in models.items():
        monteclora.export_samples(model, tmp_path / name, num_samples=1)
        monteclora.export_merged(model, tmp_path / name / "merged")
        merged = LlamaForCausalLM.from_pretrained(tmp_path / name / "merged").eval()
        with torch.no_grad():
            torch.testing.assert_close(merged(input_ids=tokens()).logits, expected, rtol=0, atol=1e-5)
    drawn = [load_file(tmp_path / name / "sample-0" / "adapter_model.safetensors") for name in models]
    assert drawn[0].keys() == drawn[1].keys() == drawn[2].keys()
    assert all(torch.equal(value, other[name]) for other in drawn[1:] for name, value in drawn[0].items())


def llava() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
    return LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=LlamaConfig(vocab_size=VOCABULARY, **sizes),
            vision_config=CLIPVisionConfig(image_size=16, patch_size=8, **sizes),
            image_token_index=5,
        )
    )


def as_named_before(folder: Path, now: str, before: str) -> None:
    """Rename an adapter's layers as a version of transformers that called them so would have written them."""
    path = folder / "adapter_model.safetensors"
    save_file({name.replace(now, before): value for name, value in load_file(path).items()}, path)
    document, tensors = storage.read_document(folder / storage.POSTERIOR_FILE)
    document["layers"] = [[name.replace(now, before), *shape] for name, *shape in document["layers"]]
    document["mean_sha256"] = storage._mean_checksum(path)
    storage.write_document(folder, document, tensors)


def test_layers_that_transformers_renamed_since_are_found_as_peft_finds_them(tmp_path: Path) -> None:
    options = {"task_type": None, "target_modules": ["q_proj", "v_proj"], "exclude_modules": ".*vision.*"}
    model = monteclora.get_peft_model(llava(), config_for(llama, **options))
    stir(model)
    model.save_pretrained(tmp_path)
    as_named_before(tmp_path, "model.language_model.layers", "language_model.model.layers")
    mean = peft.PeftModel.from_pretrained(llava(), tmp_path)
    assert all(torch.equal(value, weights(model)[name]) for name, value in weights(mean).items())
    assert_equal(monteclora.from_pretrained(llava(), tmp_path), model)
    existing = monteclora.get_peft_model(llava(), config_for(llama, **options))
    existing.load_adapter(tmp_path, "default")
    assert_equal(existing, model)


def test_other_names_are_refused(tmp_path: Path) -> None:
    wrapped(llama).save_pretrained(tmp_path)
    as_named_before(tmp_path, "model.layers", "model.blocks")
    with pytest.raises(CheckpointError, match=r"layer 'model\.(blocks|layers)\.0\.mlp\.down_proj'"):
        monteclora.from_pretrained(llama(), tmp_path)


def test_a_weight_that_is_missing_is_named_also_for_an_adapter_that_exists(tmp_path: Path) -> None:
    model = wrapped(llama)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"q_proj\.lora_B"):
        model.load_adapter(tmp_path, "default")
