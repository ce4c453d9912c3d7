"""Adapters as GGUF files: what is in them, read back with the package that llama.cpp's own tools use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from peft import AdaLoraConfig, LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

import monteclora
from monteclora.adapters.gguf import export_gguf
from monteclora.errors import ConfigError
from tests.models import gpt2, llama, llama_classifier, posterior_of, wrapped

LAYERS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
LLAMA_CPP = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)  # llama.cpp's own names
EVERY = [name.split(".")[1] for name in LAYERS]
PATTERNS = {"rank_pattern": {"k_proj": 2, "up_proj": 6}, "alpha_pattern": {"q_proj": 3, "layers.1.mlp.gate_proj": 10}}


def rows_of_a_head(rows: int, heads: int) -> list[int]:
    """Which row of transformers each row of llama.cpp is: of a head, row i of one half, then row i of the other."""
    half = rows // heads // 2
    return [head * 2 * half + part * half + i for head in range(heads) for i in range(half) for part in (0, 1)]


def read(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    reader = gguf.GGUFReader(path)
    facts = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return facts, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def check_file(path: Path, model: nn.Module, weights: dict[str, Any], alpha: float) -> None:
    facts, tensors = read(path)
    assert facts == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
    }
    expected = {}
    for key, value in weights.items():
        layer, part = key.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".lora_", 1)
        stored = LLAMA_CPP.get_name(layer)  # blk.1.attn_q
        matrix = value.float().numpy()
        module = model.get_submodule(f"base_model.model.{layer}")
        if part == "B":
            matrix = matrix * np.float32(module.scaling["default"] * matrix.shape[1] / alpha)
            heads = {"attn_q": 4, "attn_k": 2}.get(stored.split(".")[-1])
            matrix = matrix[rows_of_a_head(len(matrix), heads)] if heads else matrix
        expected[f"{stored}.weight.lora_{part.lower()}"] = matrix
    assert expected.keys() == tensors.keys()
    for name, matrix in expected.items():
        assert tensors[name].dtype == np.float32
        np.testing.assert_array_equal(tensors[name], matrix, err_msg=name)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_tensors_are_those_of_the_mean_and_of_each_sample(tmp_path: Path, rslora: bool) -> None:
    model = wrapped(llama, target_modules=EVERY, lora_alpha=6, use_rslora=rslora, **PATTERNS)
    draws = posterior_of(model).draws
    written = export_gguf(model, tmp_path / "gguf", num_samples=2, seed=5)
    assert [path.name for path in written] == ["mean.gguf", "sample-0.gguf", "sample-1.gguf"]
    assert sorted(path.name for path in (tmp_path / "gguf").iterdir()) == [path.name for path in written]
    assert posterior_of(model).draws == draws
    model.save_pretrained(tmp_path / "mean")
    folders = [tmp_path / "mean", *monteclora.export_samples(model, tmp_path / "samples", num_samples=2, seed=5)]
    for path, folder in zip(written, folders, strict=True):
        check_file(path, model, load_file(folder / "adapter_model.safetensors"), alpha=6.0)
    assert not np.array_equal(*(read(path)[1]["blk.0.attn_q.weight.lora_a"] for path in written[1:]))


def test_a_plain_lora_has_its_mean_alone_and_an_alpha_of_0_scales_by_0(tmp_path: Path) -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]))
    nn.init.normal_(model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
    (path,) = export_gguf(model, tmp_path / "plain")
    model.save_pretrained(tmp_path / "mean")
    check_file(path, model, load_file(tmp_path / "mean" / "adapter_model.safetensors"), alpha=4.0)
    with pytest.raises(ConfigError, match="expected one MonteCLoRA adapter"):
        export_gguf(model, tmp_path / "none", num_samples=1)
    silent = get_peft_model(llama(), LoraConfig(r=2, lora_alpha=0, target_modules=["q_proj"], init_lora_weights=False))
    (path,) = export_gguf(silent, tmp_path / "silent")
    facts, tensors = read(path)
    assert facts["adapter.lora.alpha"] == 1.0, "llama.cpp takes 0 for none, and scales by 1"
    assert not tensors["blk.0.attn_q.weight.lora_b"].any()


def test_a_head_that_is_not_tied_is_written(tmp_path: Path) -> None:
    model = wrapped(llama, target_modules=["lm_head"])
    (path,) = export_gguf(model, tmp_path)
    assert sorted(read(path)[1]) == ["output.weight.lora_a", "output.weight.lora_b"]


def lora(build: Any = llama, base: dict[str, Any] | None = None, **options: Any) -> nn.Module:
    options = {"target_modules": ["q_proj"], **options}
    return get_peft_model(build(**(base or {})), LoraConfig(r=2, **options))


REFUSED = {
    "modules_to_save": lambda: lora(modules_to_save=["lm_head"]),
    r"lora_B\.bias": lambda: lora(base={"attention_bias": True}, lora_bias=True),
    r"q_proj\.base_layer\.bias": lambda: lora(base={"attention_bias": True}, bias="lora_only"),
    "token_adapter": lambda: lora(trainable_token_indices=[1, 2]),
    "shares its weight": lambda: lora(base={"tie_word_embeddings": True}, target_modules=["q_proj", "lm_head"]),
    "embed_tokens": lambda: lora(target_modules=["embed_tokens"]),
    "not for GPT2LMHeadModel": lambda: lora(gpt2, target_modules=["c_attn"], fan_in_fan_out=True),
    "not for LlamaForSequenceClassification": lambda: lora(llama_classifier, task_type="SEQ_CLS"),
    "use_dora": lambda: lora(use_dora=True),
    "init_lora_weights": lambda: lora(init_lora_weights="pissa"),
    "ADALORA": lambda: get_peft_model(llama(), AdaLoraConfig(target_modules=["q_proj"], total_step=9)),
    "PROMPT_TUNING": lambda: get_peft_model(llama(), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")),
}


@pytest.mark.parametrize("reason", list(REFUSED))
def test_what_the_format_cannot_hold_is_refused(tmp_path: Path, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        export_gguf(REFUSED[reason](), tmp_path / "gguf")
    assert caught.value.hint
    assert not (tmp_path / "gguf").exists()


def test_arguments_and_the_extra_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped(llama)
    with pytest.raises(ConfigError, match="num_samples is -1"):
        export_gguf(model, tmp_path, num_samples=-1)
    model.add_adapter("second", LoraConfig(target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ConfigError, match="active adapters are"):
        export_gguf(model, tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package gguf.*monteclora\[gguf\]"):
        export_gguf(model, tmp_path)
    assert list(tmp_path.iterdir()) == []
