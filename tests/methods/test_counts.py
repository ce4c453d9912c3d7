"""How many parameters each method trains, on models of the paper's shapes without weights, against counts by hand."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from accelerate import init_empty_weights

from monteclora.data.published import published_config
from monteclora.methods import get_method, list_methods
from tests.methods import registered
from tests.methods.common import wrap

ROBERTA = ("FacebookAI/roberta-base", "classification", ["key", "value", "query", "dense"], 8)
LLAMA_7B = ("huggyllama/llama-7b", "causal_lm", ["q_proj", "k_proj", "v_proj"], 32)
LLAMA_3B = ("meta-llama/Llama-3.2-3B-Instruct", "causal_lm", ["q_proj", "k_proj", "v_proj"], 32)

# RoBERTa-base, a block: query, key, value and attention output are 768 x 768, the others 768 -> 3072 -> 768.
# LoRA at rank r: r (4 (768 + 768) + 2 (768 + 3072)) = 13,824 r. Head: 768 * 768 + 768 + 768 * 2 + 2 = 592,130.
# LLaMA-7B, a block: q, k, v are 4096 x 4096. LoRA: 3 r (4096 + 4096) = 24,576 r.
# Llama-3.2-3B, a block: q is 3072 -> 3072; k, v are 3072 -> 1024. LoRA: r (6144 + 2 * 4096) = 14,336 r.
HEAD = 592_130
LORA = {
    ROBERTA[0]: 12 * 13_824 * 8 + HEAD,  # 1,919,234
    LLAMA_7B[0]: 32 * 24_576 * 32,  # 25,165,824
    LLAMA_3B[0]: 28 * 14_336 * 32,  # 12,845,056
}
ADAPTED = {ROBERTA[0]: 12 * 6, LLAMA_7B[0]: 32 * 3, LLAMA_3B[0]: 28 * 3}  # layers
OUTPUTS = {ROBERTA[0]: 12 * (5 * 768 + 3072), LLAMA_7B[0]: 32 * 3 * 4096, LLAMA_3B[0]: 28 * (3072 + 2 * 1024)}
VIRTUAL = {ROBERTA[0]: 20 * 768 + HEAD, LLAMA_7B[0]: 20 * 4096, LLAMA_3B[0]: 20 * 3072}
FULL = {
    # embeddings 50265, 514, 1 and a norm; 12 blocks of 7,087,872; the head
    ROBERTA[0]: 768 * (50_265 + 514 + 1 + 2) + 12 * 7_087_872 + HEAD,
    LLAMA_7B[0]: 6_738_415_616,
    LLAMA_3B[0]: 3_212_749_824,
}
# peft's choice: key, value and both dense layers called output.dense (of attention, of the feed-forward part), whose
# vectors have the inputs' sizes 768 and 3072; k_proj, v_proj and down_proj (its input)
IA3 = {
    ROBERTA[0]: 12 * (768 + 768 + 768 + 3072) + HEAD,
    LLAMA_7B[0]: 32 * (4096 + 4096 + 11_008),
    LLAMA_3B[0]: 28 * (1024 + 1024 + 8192),
}
COMPONENTS = {"monteclora": 4, "peft_monteclora": 8}  # rho and eta: r + N a layer


def by_hand(method: str, model: str, rank: int) -> int:
    lora, layers = LORA[model], ADAPTED[model]
    if method == "adalora":  # at rank 12 in place of r, and 12 singular values a layer
        head = HEAD if model == ROBERTA[0] else 0
        return (lora - head) // rank * 12 + 12 * layers + head
    if method in COMPONENTS:
        return lora + layers * (rank + COMPONENTS[method])
    if method == "dora":  # a length for each output
        return lora + OUTPUTS[model]
    return {"full": FULL, "ia3": IA3, "prompt_tuning": VIRTUAL}.get(method, LORA)[model]


@pytest.mark.parametrize("method", [m.name for m in list_methods() if m.name != registered.HeadOnly.name])
@pytest.mark.parametrize("shape", [ROBERTA, LLAMA_7B, LLAMA_3B], ids=lambda shape: shape[0].rpartition("/")[2])
def test_trained_parameters_are_those_counted_by_hand(method: str, shape: tuple[str, str, list[str], int]) -> None:
    name, kind, targets, rank = shape
    config = published_config(name)
    assert config is not None
    auto: Any = transformers.AutoModelForSequenceClassification
    if kind == "causal_lm":
        auto = transformers.AutoModelForCausalLM
    with init_empty_weights(include_buffers=True):
        model = auto.from_config(config)
    own: dict[str, Any] = {"target_modules": targets, "r": rank}
    if method == "adalora":
        del own["r"]
    if method in ("full", "ia3", "prompt_tuning"):
        own = {}
    wrapped = wrap(get_method(method), model, kind, **own)
    assert sum(p.numel() for p in wrapped.parameters() if p.requires_grad) == by_hand(method, name, rank)
