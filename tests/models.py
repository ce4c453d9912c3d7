"""Tiny random models with every layer kind the adapters meet, and what the tests do with them again and again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from monteclora import MonteCLoRAConfig, get_peft_model, variational_loss
from monteclora.adapters.model import MonteCLoRAModel
from monteclora.posterior import AdapterPosterior

VOCABULARY = 96
PAD, END = 0, 1


def bert(seed: int = 0, **options: Any) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    options = {"num_hidden_layers": 2, "num_labels": 3, "hidden_dropout_prob": 0.0, **options}
    options = {"attention_probs_dropout_prob": 0.0, **options}
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_attention_heads=2,
            intermediate_size=40,
            max_position_embeddings=48,
            pad_token_id=PAD,
            **options,
        )
    )


def deberta(seed: int = 0, **options: Any) -> DebertaV2ForSequenceClassification:
    """With relative positions, and a layer of its own for the dropout of attention probabilities."""
    torch.manual_seed(seed)
    return DebertaV2ForSequenceClassification(
        DebertaV2Config(
            **{
                "vocab_size": VOCABULARY,
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 40,
                "max_position_embeddings": 48,
                "relative_attention": True,
                "pos_att_type": ["p2c", "c2p"],
                "type_vocab_size": 0,
                "pad_token_id": PAD,
                "num_labels": 3,
                "hidden_dropout_prob": 0.2,
                "attention_probs_dropout_prob": 0.3,
                **options,
            }
        )
    )


def _llama_config(**options: Any) -> LlamaConfig:
    return LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "pad_token_id": PAD,
            "eos_token_id": END,
            **options,
        }
    )


def llama(seed: int = 0, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(_llama_config(**options))


def llama_classifier(seed: int = 0, **options: Any) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(_llama_config(**{"num_labels": 3, **options}))


def gpt2(seed: int = 0, **options: Any) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            **{
                "vocab_size": VOCABULARY,
                "n_positions": 48,
                "n_embd": 32,
                "n_layer": 2,
                "n_head": 2,
                "attn_pdrop": 0.0,
                "embd_pdrop": 0.0,
                "resid_pdrop": 0.0,
                "bos_token_id": END,
                "eos_token_id": END,
                "pad_token_id": PAD,
                **options,
            }
        )
    )


def t5(seed: int = 0) -> T5ForConditionalGeneration:
    torch.manual_seed(seed)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=40,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=PAD,
            decoder_start_token_id=PAD,
        )
    )


class Perceptron(nn.Module):
    """A plain module: layers named ``first`` and ``second``, input of any rank."""

    def __init__(self, inputs: int = 12, hidden: int = 10, outputs: int = 5) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, hidden)
        self.second = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def perceptron(seed: int = 0, **sizes: int) -> Perceptron:
    torch.manual_seed(seed)
    return Perceptron(**sizes)


# every base model with the names of the layers that are adapted in it
TARGETS: dict[Callable[..., Any], list[str]] = {
    bert: ["query", "value", "dense"],
    deberta: ["query_proj", "value_proj", "dense"],
    llama: ["q_proj", "v_proj", "down_proj"],
    llama_classifier: ["q_proj", "v_proj", "down_proj"],
    gpt2: ["c_attn", "c_proj"],
    t5: ["q", "v", "wo"],
    perceptron: ["first", "second"],
}
TASKS = {
    bert: "SEQ_CLS",
    deberta: "SEQ_CLS",
    llama_classifier: "SEQ_CLS",
    llama: "CAUSAL_LM",
    gpt2: "CAUSAL_LM",
    t5: "SEQ_2_SEQ_LM",
}


def config_for(build: Callable[..., nn.Module], **options: Any) -> MonteCLoRAConfig:
    """A configuration that adapts the usual layers of ``build`` with visible noise."""
    defaults = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": list(TARGETS[build]),
        "task_type": TASKS.get(build),
        "sample_scale": "relative:0.5",
        "kl_weight": 1e-2,
        "coop_weight": 1e-1,
    }
    return MonteCLoRAConfig(**{**defaults, **options})


def stir(model: nn.Module, seed: int = 100) -> None:
    """Move every trainable tensor off its initial value: B is zero there, and rho and eta are constant."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "posteriors." in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_((0.2 * noise).to(parameter.dtype))


def wrapped(
    build: Callable[..., nn.Module] = llama,
    *,
    seed: int = 0,
    base: dict[str, Any] | None = None,
    wrap: dict[str, Any] | None = None,
    **options: Any,
) -> MonteCLoRAModel:
    """A wrapped tiny model in training mode, off its initial values."""
    model = get_peft_model(build(seed, **(base or {})), config_for(build, **options), **(wrap or {}))
    stir(model)
    return model.train()


def posterior_of(model: nn.Module, adapter_name: str = "default") -> AdapterPosterior:
    found = model.base_model.posterior(adapter_name)
    assert found is not None
    return found


def tokens(rows: int = 3, length: int = 6, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (rows, length), generator=generator)


def batch_for(build: Callable[..., nn.Module], rows: int = 3, length: int = 6, seed: int = 1) -> dict[str, Tensor]:
    """A batch with labels for the models of this file."""
    ids = tokens(rows, length, seed)
    if build in (bert, deberta, llama_classifier):
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(rows) % 3}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": tokens(rows, length, seed + 1)}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Every trainable tensor's gradient; all must have one."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"no gradient reached {name}"
            found[name] = parameter.grad.detach().clone()
    assert found
    return found


def relative_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of two sets of tensors, tensor by tensor relative to its size."""
    assert one.keys() == other.keys()
    worst = 0.0
    for name, tensor in one.items():
        size = max(tensor.abs().max().item(), 1e-12)
        worst = max(worst, (tensor - other[name]).abs().max().item() / size)
    return worst


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@contextmanager
def same_global_generators() -> Iterator[None]:
    """The block must leave the global generator as it is."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state()), "the global generator was used"


def step(model: nn.Module, build: Callable[..., nn.Module]) -> dict[str, Tensor]:
    """One objective backward; every trainable tensor must get a finite gradient."""
    (model(**batch_for(build)).loss + variational_loss(model)).backward()
    found = gradients(model)
    assert all(grad.isfinite().all() for grad in found.values())
    return found
