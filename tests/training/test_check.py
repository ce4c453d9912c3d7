"""The dry run: what it says must be what training does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from monteclora.errors import ConfigError
from monteclora.runs.prepare import prepare_data, prepare_model
from monteclora.runs.recipe import load_recipe
from monteclora.training.check import CheckReport, check
from monteclora.training.estimate import Sizes
from tests.training.conftest import Recipe, quietly

MakeRecipe = Callable[..., Recipe]


@pytest.mark.parametrize("kind", ["classification", "causal_lm"])
@pytest.mark.parametrize("method", ["lora", "monteclora"])
def test_says_what_training_does(kind: str, method: str, recipe: MakeRecipe) -> None:
    made = recipe(kind=kind, method=method)
    report = check(made)
    assert not Path(made["output"]).exists()
    result = quietly(made)
    assert report.steps == result.steps
    assert report.sizes.trained == sum(report.trained.values()) == result.trained_parameters
    assert report.rows == (
        {"train": 38, "validation": 6} if kind == "classification" else {"train": 37, "validation": 7}
    )
    assert report.tokens[0] * report.rows["train"] * 2 == pytest.approx(result.tokens)
    assert report.measured is not None
    assert report.seconds is not None
    assert 0 < report.seconds < 600
    assert json.dumps(report.facts())


def test_shows_rows_and_what_is_learned(recipe: MakeRecipe) -> None:
    report = check(recipe(kind="causal_lm"))
    assert len(report.views) == 5
    for view in report.views:
        assert "[[" in str(view)
        assert 0 < view.learned_tokens < view.tokens
    labels = {view.label for view in check(recipe()).views}
    assert labels <= {"0", "1"}


def test_phases_of_post_hoc(recipe: MakeRecipe) -> None:
    report = check(recipe(mode="post_hoc", max_steps=7))
    assert [(phase.name, phase.steps) for phase in report.phases] == [("adapter", 7), ("posterior", 5)]
    assert report.phases[1].learning_rate == pytest.approx(5e-2)


def test_a_model_without_its_weights(recipe: MakeRecipe, assets: Path, tmp_path: Path) -> None:
    """Its configuration and tokenizer are enough, at any size."""
    made = recipe(kind="causal_lm", method_options={"target_modules": ["q_proj", "v_proj"]})
    folder = tmp_path / "large"
    folder.mkdir()
    for path in (assets / "llama").iterdir():
        if path.suffix == ".json":
            (folder / path.name).write_bytes(path.read_bytes())
    config = AutoConfig.from_pretrained(folder)
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000}
    config.update({**sizes, "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128})
    config.save_pretrained(folder)
    made["model"] = {"name": str(folder), "dtype": "bfloat16"}
    report = check(made, [("training.precision", "bf16")])
    assert report.measured is None
    assert report.seconds is None
    parameters = 6_738_415_616
    assert report.sizes.parameters - report.sizes.trained == parameters
    assert report.memory.weights == pytest.approx(2 * parameters, rel=0.01)
    quantized = check(made, [("training.precision", "bf16"), ("model.quantization", "4bit")])
    tables = 2 * 32000 * 4096  # the embeddings and the head stay as they are
    assert quantized.memory.weights == pytest.approx(0.5625 * (parameters - tables) + 2 * tables, rel=0.01)
    assert report.operations == pytest.approx(4 * parameters * report.tokens[0] * report.steps * 8, rel=0.05)


def test_activations_are_those_that_a_step_keeps(recipe: MakeRecipe) -> None:
    """Within a factor of two on a tiny model, counted tensor by tensor."""
    made = recipe(kind="causal_lm", micro_batch_size=8)
    found = load_recipe(made)
    data = prepare_data(found)
    model = prepare_model(found, data.task.kind, data.task.label_names, data.tokenizer).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    lengths = [len(ids) for ids in data.train["input_ids"]]
    longest = sorted(range(len(lengths)), key=lambda i: -lengths[i])[:8]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(**data.collate([dict(data.train[i]) for i in longest])).loss
    loss.backward()
    assert sum(kept.values()) / 2 < check(made).memory.activations < sum(kept.values()) * 2


def test_sizes_of_tied_embeddings(recipe: MakeRecipe) -> None:
    from tests.models import gpt2

    sizes = Sizes.of(gpt2())
    assert sizes.embeddings == 48 * 32  # positions: the other table is the head as well


def test_what_training_would_refuse(recipe: MakeRecipe) -> None:
    with pytest.raises(ConfigError, match="qeury"):
        check(recipe(method_options={"target_modules": ["qeury"]}))
    with pytest.raises(ConfigError, match="best_metric is perplexity"):
        check(recipe(best_metric="perplexity"))


def test_what_a_method_keeps_and_takes_is_in_the_estimate(recipe: MakeRecipe) -> None:
    """IVON's four numbers a weight; rows that are longer by the prompt; a gradient of every weight."""

    def report(method: str, **options: object) -> CheckReport:
        made = recipe(method=method)
        made["method"] = {"name": method, **options}
        return check(made)

    lora, ivon = report("lora"), report("ivon")
    assert ivon.memory.optimizer - lora.memory.optimizer == 16 * lora.sizes.trained
    few, many = (report("prompt_tuning", num_virtual_tokens=count) for count in (1, 11))
    longest = few.tokens[1]
    assert many.memory.activations / few.memory.activations == pytest.approx((longest + 11) / (longest + 1))
    full = report("full")
    multiplied = full.sizes.parameters - full.sizes.embeddings
    tokens = full.steps * 8 * full.tokens[0]
    assert full.operations == pytest.approx(6 * multiplied * tokens)


def test_a_schedule_that_leaves_nothing_to_prune_is_refused(recipe: MakeRecipe) -> None:
    made = recipe(method="adalora")
    made["method"] = {"name": "adalora", "tinit": 6, "tfinal": 5}
    with pytest.raises(ConfigError, match=r"method\.tinit 6 and method\.tfinal 5 leave none of 10 steps"):
        check(made)
