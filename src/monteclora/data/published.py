"""Configurations of the models in the paper's experiments, to build them without their weights."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["CHAT_MODELS", "PUBLISHED", "published_config"]

_ROBERTA_BASE = {
    "model_type": "roberta",
    "vocab_size": 50265,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
_LLAMA_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_LLAMA_3_2_3B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 128000,
    "eos_token_id": 128009,
    "tie_word_embeddings": True,
}

PUBLISHED: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "FacebookAI/roberta-base": _ROBERTA_BASE,
        "huggyllama/llama-7b": _LLAMA_7B,
        "meta-llama/Llama-3.2-3B": _LLAMA_3_2_3B,
        "meta-llama/Llama-3.2-3B-Instruct": _LLAMA_3_2_3B,
    }
)
"""Values of configurations, by the models' names on the hub."""
CHAT_MODELS = frozenset(name for name in PUBLISHED if name.endswith("-Instruct"))
"""Those whose tokenizers have a chat template."""


def published_config(name: str) -> PretrainedConfig | None:
    """The configuration of a model of :data:`PUBLISHED`; None for any other name."""
    import transformers

    if name not in PUBLISHED:
        return None
    values = dict(PUBLISHED[name])
    found: PretrainedConfig = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    return found
