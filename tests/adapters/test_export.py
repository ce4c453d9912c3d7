"""Leaving the package: merged models, and plain adapters drawn from the posterior."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

import monteclora
from monteclora import export_merged, export_samples, posterior_sampling, variational_loss
from monteclora.errors import ConfigError
from tests.models import (
    TARGETS,
    batch_for,
    bert,
    config_for,
    gpt2,
    llama,
    perceptron,
    posterior_of,
    same_global_generators,
    t5,
    tokens,
    wrapped,
)

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")


@torch.no_grad()
def logits(model: nn.Module, build: Callable[..., nn.Module]) -> Tensor:
    return model(**batch_for(build)).logits


@pytest.mark.parametrize("build", [bert, llama, gpt2, t5])
def test_each_sample_is_one_posterior_draw(tmp_path: Path, build: Callable[..., nn.Module]) -> None:
    options = {"modules_to_save": ["classifier"]} if build is bert else {}
    model = wrapped(build, rank_pattern={TARGETS[build][0]: 2}, covariance="full", **options)
    model(**batch_for(build))
    draws = posterior_of(model).draws
    with same_global_generators():
        folders = export_samples(model, tmp_path, num_samples=3, seed=11)
    assert [folder.name for folder in folders] == ["sample-0", "sample-1", "sample-2"]
    assert posterior_of(model).draws == draws
    model.eval()
    with posterior_sampling(model, seed=11):
        expected = [logits(model, build) for _ in folders]
    assert not torch.equal(expected[0], expected[1])
    for folder, output in zip(folders, expected, strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # transformers' own, of peft
            plain = PeftModel.from_pretrained(build(), folder).eval()
        assert type(plain.peft_config["default"]) is LoraConfig
        torch.testing.assert_close(logits(plain, build), output, rtol=1e-5, atol=1e-6)
        assert not any("posterior" in key for key in load_file(folder / "adapter_model.safetensors"))


@pytest.mark.parametrize("how", ["asked", "calibrated"])
def test_samples_are_drawn_in_the_last_blocks_alone(tmp_path: Path, how: str) -> None:
    model = wrapped(llama)
    if how == "calibrated":
        posterior_of(model).calibration = {"factor": 1.0, "layers": 1}
    (folder,) = export_samples(model, tmp_path, num_samples=1, seed=11, layers=1 if how == "asked" else None)
    model.eval()
    with posterior_sampling(model, seed=11, layers=1):
        expected = logits(model, llama)
    plain = PeftModel.from_pretrained(llama(), folder).eval()
    torch.testing.assert_close(logits(plain, llama), expected, rtol=1e-5, atol=1e-6)
    with posterior_sampling(model, seed=11):
        assert not torch.allclose(logits(model, llama), expected, atol=1e-5)
    with pytest.raises(ConfigError, match="layers is 9, and the model has"):
        export_samples(model, tmp_path, layers=9)


def test_samples_are_seeded_and_their_mean_is_the_adapter(tmp_path: Path) -> None:
    model = wrapped(llama)
    first = export_samples(model, tmp_path / "a", num_samples=2, seed=1)
    second = export_samples(model, tmp_path / "b", num_samples=1, seed=1)
    other = export_samples(model, tmp_path / "c", num_samples=1, seed=2)
    read = [load_file(folders[0] / "adapter_model.safetensors") for folders in (first, second, other)]
    assert all(torch.equal(tensor, read[1][key]) for key, tensor in read[0].items())
    changed = {key for key, tensor in read[0].items() if not torch.equal(tensor, read[2][key])}
    assert changed == {key for key in read[0] if "lora_A" in key}


def test_samples_of_a_bf16_adapter_keep_its_dtype(tmp_path: Path) -> None:
    model = monteclora.get_peft_model(llama().to(torch.bfloat16), config_for(llama), autocast_adapter_dtype=False)
    (folder,) = export_samples(model, tmp_path, num_samples=1)
    assert {tensor.dtype for tensor in load_file(folder / "adapter_model.safetensors").values()} == {torch.bfloat16}


def test_samples_of_the_chosen_adapter(tmp_path: Path) -> None:
    model = wrapped(llama)
    model.add_adapter("second", config_for(llama, r=2, target_modules=["q_proj"]))
    model.set_adapter("second")
    (folder,) = export_samples(model, tmp_path, num_samples=1)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key} == {2}
    PeftModel.from_pretrained(llama(), folder)


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    model = wrapped(llama)
    for count in (0, -1):
        with pytest.raises(ConfigError, match="num_samples") as caught:
            export_samples(model, tmp_path, num_samples=count)
        assert caught.value.hint
    model.add_adapter("plain", LoraConfig(target_modules=["q_proj"]))
    for active in ("plain", ["default", "plain"]):
        model.base_model.set_adapter(active)
        with pytest.raises(ConfigError, match="active adapters") as caught:
            export_samples(model, tmp_path)
        assert "set_adapter" in caught.value.hint
    with pytest.raises(ConfigError, match="Perceptron") as caught:
        export_merged(wrapped(perceptron), tmp_path)
    assert "merge_and_unload" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


LOADERS = {
    bert: AutoModelForSequenceClassification,
    llama: AutoModelForCausalLM,
    gpt2: AutoModelForCausalLM,
    t5: AutoModelForSeq2SeqLM,
}


@pytest.mark.parametrize("build", list(LOADERS))
def test_the_merged_model_loads_in_transformers_and_gives_the_mean(
    tmp_path: Path, build: Callable[..., nn.Module]
) -> None:
    model = wrapped(build, modules_to_save=["classifier"] if build is bert else None)
    (model(**batch_for(build)).loss + variational_loss(model)).backward()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folder = export_merged(model, tmp_path / "merged")
    # the model is as it was: same weights, still training, still drawing
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert posterior_of(model).draws == 1
    assert not torch.equal(logits(model, build), logits(model, build))
    model.eval()
    merged = LOADERS[build].from_pretrained(folder).eval()
    torch.testing.assert_close(logits(merged, build), logits(model, build), rtol=1e-4, atol=1e-5)
    assert not any("lora" in name or "posterior" in name for name in merged.state_dict())


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, folder: str) -> None:
            (Path(folder) / "tokenizer.json").write_text("{}")

    folder = export_merged(wrapped(llama), tmp_path / "merged", Tokenizer())
    assert (folder / "tokenizer.json").is_file()
    assert (folder / "config.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


@pytest.mark.parametrize("build", [llama, t5])
def test_beams_under_draws_are_those_of_the_exported_adapters(tmp_path: Path, build: Callable[..., nn.Module]) -> None:
    """Also in an encoder-decoder, whose encoder runs before the first token, and with several draws at once."""
    model = wrapped(build).eval()
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4, "min_new_tokens": 4}
    expected = []
    for folder in export_samples(model, tmp_path, num_samples=2, seed=3):
        plain = PeftModel.from_pretrained(build(), folder).eval()
        expected.append(plain.generate(input_ids=tokens(2, 5), **options))
    with posterior_sampling(model, 3, num_samples=2, resample=False):
        found = model.generate(input_ids=tokens(2, 5).repeat(2, 1), **options)
    assert torch.equal(found, torch.cat(expected))
    assert build is t5 or not torch.equal(*expected)  # the words of a tiny t5 are the same under any draw
