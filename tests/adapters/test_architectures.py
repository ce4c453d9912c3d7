"""Some thirty architectures, tiny: several draws at once are the draws one by one, and a forward pass has one draw."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import monteclora
from monteclora import MonteCLoRAConfig, posterior_sampling
from monteclora.adapters.row_checks import RowOrderError
from monteclora.errors import ConfigError
from tests.models import posterior_of, stir

pytestmark = pytest.mark.filterwarnings("ignore")

ROWS, LENGTH, VOCABULARY, WIDTH = 3, 8, 60, 32
GPT = {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 40}
USUAL = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 40,
}
BART = {
    "d_model": WIDTH,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 40,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
T5 = {
    "d_model": WIDTH,
    "d_kv": 16,
    "d_ff": 40,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 16}


class Case(NamedTuple):
    """A model and what is expected of it; ``apart`` if its draws cannot share a forward pass."""

    model: str
    config: dict[str, Any]
    targets: list[str]
    apart: bool = False
    kind: str = "text"


def classifier(name: str, targets: list[str], apart: bool = False, **config: Any) -> Case:
    return Case(f"{name}ForSequenceClassification", {**USUAL, **config}, targets, apart)


def decoder(name: str, targets: list[str], apart: bool = False, **config: Any) -> Case:
    return Case(f"{name}ForCausalLM", {**USUAL, **config}, targets, apart)


def seq2seq(name: str, targets: list[str], apart: bool = False, **config: Any) -> Case:
    return Case(f"{name}ForConditionalGeneration", config, targets, apart, "seq2seq")


EXPERTS = {"num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 16}
CASES = [
    classifier("Bert", ["query", "value", "dense"]),
    classifier("Roberta", ["query", "value"], pad_token_id=1),
    classifier("Electra", ["query", "value"], embedding_size=16),
    classifier("Albert", ["query", "value", "ffn"], embedding_size=16),
    Case(
        "DistilBertForSequenceClassification", {"dim": WIDTH, "n_layers": 2, "n_heads": 2, "hidden_dim": 40}, ["q_lin"]
    ),
    classifier("MPNet", ["q", "v"]),
    classifier("RoFormer", ["query", "value"], embedding_size=WIDTH),
    classifier(
        "ModernBert", ["Wqkv", "Wo"], global_attn_every_n_layers=2, pad_token_id=0, cls_token_id=2, sep_token_id=3
    ),
    classifier("Nystromformer", ["query", "value"], num_landmarks=LENGTH, segment_means_seq_len=LENGTH),
    classifier("DebertaV2", ["query_proj", "key_proj"], True, share_att_key=True, position_buckets=8, **RELATIVE),
    classifier("Deberta", ["pos_proj", "pos_q_proj"], True, **RELATIVE),
    classifier("Longformer", ["query", "value"], True, attention_window=4),
    Case(
        "XLNetForSequenceClassification",
        {"d_model": WIDTH, "n_layer": 2, "n_head": 2, "d_inner": 40},
        ["layer_1"],
        True,
    ),
    decoder("Llama", ["q_proj", "down_proj"]),
    decoder("Mistral", ["q_proj", "v_proj"], num_key_value_heads=2),
    decoder("Qwen2", ["q_proj", "v_proj"], num_key_value_heads=2),
    decoder("Gemma", ["q_proj", "v_proj"], num_key_value_heads=2, head_dim=16),
    decoder("Phi", ["q_proj", "fc1"]),
    decoder("GPTNeoX", ["query_key_value"]),
    decoder("Mixtral", ["q_proj", "v_proj"], num_key_value_heads=2, **EXPERTS),
    decoder("Bloom", ["query_key_value"], n_head=2, n_layer=2),
    Case("GPT2LMHeadModel", GPT, ["c_attn", "c_proj"]),
    Case("GPTJForCausalLM", {**GPT, "rotary_dim": 8}, ["q_proj", "fc_in"]),
    Case("OPTForCausalLM", {**USUAL, "ffn_dim": 40, "word_embed_proj_dim": WIDTH}, ["q_proj", "fc1"]),
    Case("MambaForCausalLM", {"hidden_size": WIDTH, "state_size": 4, "num_hidden_layers": 2}, ["in_proj", "x_proj"]),
    seq2seq("T5", ["q", "v", "wo"], **T5),
    seq2seq("Bart", ["q_proj", "fc1"], **BART),
    seq2seq(
        "SwitchTransformers", ["wi", "wo"], True, num_sparse_encoder_layers=1, num_experts=4, expert_capacity=64, **T5
    ),
    seq2seq("LED", ["query", "value"], True, attention_window=4, **BART),
    Case("CLIPModel", {}, ["q_proj", "fc1"], kind="images"),
    Case(
        "ViTForImageClassification",
        {**USUAL, "image_size": 8, "patch_size": 4},
        ["query", "value", "q_proj"],
        kind="vision",
    ),
]


def build(case: Case) -> Any:
    torch.manual_seed(0)
    cls = getattr(transformers, case.model)
    base = {} if case.kind == "vision" else {"vocab_size": VOCABULARY}
    if case.kind == "images":
        text = {**USUAL, "vocab_size": VOCABULARY, "eos_token_id": 3, "projection_dim": 16}
        vision = {**USUAL, "image_size": 8, "patch_size": 4, "projection_dim": 16}
        config = cls.config_class(text_config=text, vision_config=vision, projection_dim=16)
    else:
        tokens = {} if case.kind == "vision" else {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
        config = cls.config_class(**{**base, **tokens, **case.config})
    model = cls(config).eval()
    with torch.no_grad():
        for module in model.modules():  # initial weights of such narrow models let nothing through
            if isinstance(module, (nn.Linear, nn.Embedding, Conv1D)):
                module.weight.normal_(std=0.25)
    return model


def wrapped(case: Case, **options: Any) -> Any:
    names = {name.rpartition(".")[2] for name, module in build(case).named_modules() if isinstance(module, nn.Module)}
    targets = [target for target in case.targets if target in names]
    assert targets, f"{case.model} has {sorted(names)}"
    config = MonteCLoRAConfig(r=4, lora_alpha=8, target_modules=targets, sample_scale="relative:0.5", **options)
    model = monteclora.get_peft_model(build(case), config)
    stir(model)
    return model.eval()


def inputs(case: Case) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(4, VOCABULARY, (ROWS, LENGTH), generator=generator)
    images = torch.randn(ROWS, 3, 8, 8, generator=generator)
    mask = torch.ones_like(ids)
    found = {
        "text": {"input_ids": ids, "attention_mask": mask},
        "seq2seq": {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids.flip(1)},
        "images": {"input_ids": ids, "attention_mask": mask, "pixel_values": images},
        "vision": {"pixel_values": images},
    }[case.kind]
    if case.model.startswith("Mamba"):
        del found["attention_mask"]
    return found


def output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    result = model(**batch)
    found: Tensor = (
        result.logits if hasattr(result, "logits") else torch.cat([result.text_embeds, result.image_embeds], -1)
    )
    return found


def name_of(case: Case) -> str:
    return case.model


@pytest.mark.parametrize("case", CASES, ids=name_of)
@torch.no_grad()
def test_draws_at_once_are_the_draws_one_by_one_or_refused_by_name(case: Case) -> None:
    model, batch = wrapped(case), inputs(case)
    with posterior_sampling(model, seed=5):
        separate = torch.stack([output(model, batch) for _ in range(2)])
    assert (separate[0] - separate[1]).abs().max() > 1e-3, "the adapters are not in use"
    repeated = {name: torch.cat([value, value]) for name, value in batch.items()}
    with posterior_sampling(model, seed=5, num_samples=2):
        if case.apart:
            with pytest.raises(RowOrderError, match="cannot be distinguished in layer '"):
                output(model, repeated)
            return
        together = output(model, repeated)
    torch.testing.assert_close(together.view_as(separate), separate, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", [case for case in CASES if case.apart], ids=name_of)
def test_predictions_fall_back_to_a_draw_at_a_time_and_say_why(case: Case) -> None:
    model, batch = wrapped(case), inputs(case)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = monteclora.predict(model, batch, num_samples=3, seed=5).probs
    assert any("one at a time" in str(warning.message) and "'" in str(warning.message) for warning in caught)
    one_by_one = [monteclora.predict(model, batch, num_samples=n, seed=5).probs[-1] for n in (1, 2, 3)]
    torch.testing.assert_close(found, torch.stack(one_by_one), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_training_draws_once_for_each_forward(case: Case) -> None:
    model, batch = wrapped(case).train(), inputs(case)
    for count in (1, 2):
        output(model, batch)
        assert posterior_of(model).draws == count


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_examples_have_noise_of_their_own_or_are_refused_by_name(case: Case) -> None:
    """One example in every row: only with noise of its own does each row have another output."""
    model, batch = wrapped(case, noise="per_example").train(), inputs(case)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    same = {name: value[:1].expand_as(value).contiguous() for name, value in batch.items()}
    if case.apart:
        with pytest.raises(ConfigError, match=r"per_example.*in layer '"):
            output(model, same)
        return
    rows = output(model, same)
    assert posterior_of(model).draws == 1
    assert (rows[0] - rows[1]).abs().max() > 1e-3
