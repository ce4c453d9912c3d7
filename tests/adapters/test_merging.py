"""Merging a target whose weight another layer uses: separated in what is written, refused in place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import monteclora
from monteclora.adapters.merging import shared_targets
from monteclora.errors import ConfigError
from tests.models import batch_for, llama, stir, t5, wrapped


def tied(build: Callable[..., Any], targets: list[str]) -> Any:
    base = {"tie_word_embeddings": True} if build is llama else {}
    return wrapped(build, base=base, target_modules=targets).eval()


def inputs() -> dict[str, Any]:
    return {key: value for key, value in batch_for(llama).items() if key != "labels"}


def test_a_tied_head_is_written_apart(tmp_path: Path) -> None:
    model = tied(llama, ["lm_head", "q_proj"])
    assert shared_targets(model) == ["base_model.model.lm_head"]
    with torch.no_grad():
        expected = model(**inputs()).logits
        monteclora.export_merged(model, tmp_path)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        found = merged(**inputs()).logits
        assert torch.equal(model(**inputs()).logits, expected)
    assert not merged.config.tie_word_embeddings
    assert (found - expected).norm() / expected.norm() < 1e-6
    assert shared_targets(model) == ["base_model.model.lm_head"]


def test_an_architecture_that_always_shares_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lm_head' shares its weight .* T5ForConditionalGeneration knows no other"):
        monteclora.export_merged(tied(t5, ["lm_head", "q"]), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_merging_in_place_is_refused_before_anything_changes(merge: str) -> None:
    model = tied(llama, ["lm_head"])
    before = {name: value.clone() for name, value in model.state_dict().items() if "_extra_state" not in name}
    with pytest.raises(ConfigError, match=r"'lm_head' shares its weight with another layer") as caught:
        getattr(model, merge)()
    assert "export_merged" in caught.value.hint
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_what_is_not_shared_merges_as_before() -> None:
    assert shared_targets(wrapped(llama)) == []
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["lm_head"])).eval()
    stir(model)
    batch = inputs()
    expected = model(**batch).logits
    torch.testing.assert_close(model.merge_and_unload()(**batch).logits, expected)
