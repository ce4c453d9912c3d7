"""What an adapter's folder says to people and to other machines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import monteclora
from monteclora.adapters.card import portable_name
from monteclora.errors import CheckpointError
from tests.models import TARGETS, bert, config_for, llama, wrapped

NAMES = {"bug": 0, "billing": 1, "other": 2}


def named(**options: Any) -> Any:
    base = bert(id2label={index: name for name, index in NAMES.items()}, label2id=NAMES)
    base.name_or_path = "/home/someone/models/tiny-bert"
    return monteclora.get_peft_model(base, config_for(bert, **options))


@pytest.mark.parametrize(
    ("name", "portable"),
    [
        ("org/model", "org/model"),
        ("/home/someone/models/tiny", "tiny"),
        ("C:\\models\\tiny", "tiny"),
        ("/cache/hub/models--org--model/snapshots/0123", "org/model"),
        ("model", "model"),
        ("", None),
        (None, None),
    ],
)
def test_names_that_mean_the_same_elsewhere(name: str | None, portable: str | None) -> None:
    assert portable_name(name) == portable


def test_a_task_type_may_be_pefts_enumeration(tmp_path: Path) -> None:
    named(task_type=peft.TaskType.SEQ_CLS).save_pretrained(tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data["pipeline_tag"] == "text-classification"


def test_a_folder_names_no_path_and_has_the_labels(tmp_path: Path) -> None:
    named().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny-bert"
    assert all(b"/home/" not in path.read_bytes() for path in tmp_path.iterdir())
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data["base_model"] == "tiny-bert"
    assert card.data["library_name"] == "peft"
    assert card.data["pipeline_tag"] == "text-classification"
    assert {"lora", "monteclora", "transformers", "base_model:adapter:tiny-bert"} <= set(card.data["tags"])
    assert "More Information Needed" not in card.text
    for word in ("monteclora.from_pretrained", "0. bug", "1. billing", "relative:0.5"):
        assert word in card.text
    base = bert()
    monteclora.from_pretrained(base, tmp_path)
    assert base.config.label2id == NAMES
    # names that a model has of its own stay
    base = bert(id2label={0: "x", 1: "y", 2: "z"}, label2id={"x": 0, "y": 1, "z": 2})
    monteclora.from_pretrained(base, tmp_path)
    assert base.config.id2label[0] == "x"


def test_the_text_of_a_card_that_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(
        "---\nlicense: mit\ntags:\n- mine\n- base_model:adapter:org/other\n---\nMine.\n"
    )
    base = llama()
    base.name_or_path = "org/tiny"
    base.add_model_tags(["of-the-base"])
    monteclora.get_peft_model(base, config_for(llama)).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    expected = {"mine", "of-the-base", "transformers", "lora", "monteclora", "peft", "base_model:adapter:org/tiny"}
    assert set(card.data["tags"]) == expected
    assert card.text.strip() == "Mine."
    assert (card.data["license"], card.data["pipeline_tag"]) == ("mit", "text-generation")


def test_the_tokenizer_that_is_given_is_saved_along(tmp_path: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, folder: str) -> None:
            (Path(folder) / "tokenizer.json").write_text("{}")

    wrapped(llama).save_pretrained(tmp_path, tokenizer=Tokenizer())
    assert (tmp_path / "tokenizer.json").read_text() == "{}"


def test_peft_loads_the_folder_without_a_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    named().save_pretrained(tmp_path)
    recwarn.clear()
    peft.PeftModel.from_pretrained(bert(), tmp_path)
    assert not [w for w in recwarn if not issubclass(w.category, (FutureWarning, DeprecationWarning))]


def test_a_vocabulary_that_was_resized_is_saved(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """The embeddings go along as in peft, also from a base in a folder, whose name is not written, and once loaded."""
    llama().save_pretrained(tmp_path / "base")

    def resized() -> Any:
        base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        base.resize_token_embeddings(base.config.vocab_size + 3)
        return base

    model = monteclora.get_peft_model(resized(), config_for(llama))
    plain = peft.get_peft_model(resized(), LoraConfig(r=4, target_modules=TARGETS[llama], task_type="CAUSAL_LM"))
    with torch.no_grad():
        model.get_input_embeddings().weight[-3:] = 0.5
    model.save_pretrained(tmp_path / "ours")
    plain.save_pretrained(tmp_path / "plain")
    loaded = monteclora.from_pretrained(resized(), tmp_path / "ours")
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)
    loaded.save_pretrained(tmp_path / "again")
    monteclora.export_samples(loaded, tmp_path / "samples", num_samples=1)
    names = set(load_file(tmp_path / "plain" / "adapter_model.safetensors"))
    assert any("embed_tokens" in name for name in names)
    for folder in ("ours", "again", "samples/sample-0"):
        assert set(load_file(tmp_path / folder / "adapter_model.safetensors")) == names
        assert json.loads((tmp_path / folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    assert not [warning for warning in recwarn if "Could not find a config file" in str(warning.message)]
    with pytest.raises(CheckpointError, match="with the same vocabulary"):
        monteclora.from_pretrained(llama(), tmp_path / "ours")
