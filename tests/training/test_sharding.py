"""Two processes take the steps of one, each with the whole model (DDP) or sharded (FSDP2)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from monteclora.errors import ConfigError
from monteclora.evaluation.run import evaluate
from monteclora.methods import get_method
from monteclora.runs.run_folder import RunFolder
from monteclora.training import run, sharding
from monteclora.training.run import train
from tests.models import bert, llama
from tests.training.conftest import Recipe, adapter_content, quietly
from tests.training.processes import launch, losses

MakeRecipe = Callable[..., Recipe]


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_two_processes_take_the_steps_of_one(sharded: bool, recipe: MakeRecipe, tmp_path: Path) -> None:
    """Without noise and dropout; 38 rows, so that the last batch of an epoch is ragged and unevenly shared."""

    def made(name: str, scale: float, **training: Any) -> Recipe:
        return recipe(
            kind="causal_lm",
            name=name,
            method_options={"sample_scale": scale, "lora_dropout": 0.0},
            logging_every=1,
            **training,
        )

    one, two = made("one", 0.0), made("two", 0.0, micro_batch_size=2)
    launch(one, tmp_path / "one-process", 1)
    ranks = launch(two, tmp_path / "two-processes", 2, sharded=sharded)
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    assert all(rank["share"].item() == pytest.approx(0.5 if sharded else 1.0, abs=0.05) for rank in ranks)
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ("rho", "eta"))
    noisy = launch(made("noisy", 0.1, micro_batch_size=2), tmp_path / "noisy-processes", 2, sharded=sharded)
    assert all(torch.equal(noisy[0][name], noisy[1][name]) for name in ("rho", "eta"))
    assert not torch.equal(noisy[0]["noise"], noisy[1]["noise"])
    plain, shared = (load_file(tmp_path / run / "adapter/adapter_model.safetensors") for run in ("one", "two"))
    assert {name: tensor.shape for name, tensor in plain.items()} == {n: t.shape for n, t in shared.items()}
    PeftModel.from_pretrained(llama(), str(tmp_path / "two/adapter"))


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_two_processes_resume_to_the_bit(sharded: bool, recipe: MakeRecipe, tmp_path: Path) -> None:
    """Killed in the second phase, which takes up the best step of the first one."""
    options: dict[str, Any] = {
        "micro_batch_size": 2,
        "save_every": 2,
        "mode": "post_hoc",
        "best_metric": "nll",
        "eval_every": 2,
        "max_steps": 6,
        "post_hoc": {"max_steps": 5},
    }
    whole, parts = recipe(name="whole", **options), recipe(name="parts", **options)
    launch(whole, tmp_path / "uninterrupted", 2, sharded=sharded)
    launch(parts, tmp_path / "killed", 2, sharded=sharded, kill_at=9)
    assert RunFolder(tmp_path / "parts").finished is None
    launch(parts, tmp_path / "resumed", 2, sharded=sharded)
    assert adapter_content(tmp_path / "whole") == adapter_content(tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.parametrize(("full_at", "sharded"), [("checkpoint-4", False), ("adapter", True)])
def test_a_full_disk_ends_all_processes(full_at: str, sharded: bool, recipe: MakeRecipe, tmp_path: Path) -> None:
    """By the error of the main process, which alone writes; the same command goes on when there is room."""
    options: dict[str, Any] = {"kind": "causal_lm", "micro_batch_size": 2, "save_every": 2, "max_steps": 6}
    made = recipe(name="run", **options)
    launch(made, tmp_path / "full", 2, sharded=sharded, full_at=full_at)
    assert RunFolder(tmp_path / "run").finished is None
    launch(made, tmp_path / "again", 2, sharded=sharded)
    assert (RunFolder(tmp_path / "run").finished or {})["step"] == 6


@pytest.mark.slow
def test_sharded_full_fine_tuning_is_that_of_one_process(recipe: MakeRecipe, assets: Path, tmp_path: Path) -> None:
    def made(name: str, **training: Any) -> Recipe:
        found = recipe(name=name, learning_rate=1e-3, max_steps=4, logging_every=1, **training)
        return {**found, "method": {"name": "full"}, "model": {"name": str(assets / "still")}}

    bert().bert.save_pretrained(assets / "still")  # without dropout
    for file in (assets / "bert").glob("*token*"):
        (assets / "still" / file.name).write_bytes(file.read_bytes())
    one, two = made("one"), made("two", micro_batch_size=4)
    quietly(one)
    launch(two, tmp_path / "processes", 2, sharded=True)
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    probabilities = [
        evaluate(tmp_path / run, "validation", num_samples=0, progress=False).scored.at_mean.probs
        for run in ("one", "two")
    ]
    np.testing.assert_allclose(*probabilities, atol=1e-4)


@pytest.mark.parametrize(
    ("environment", "changes", "message"),
    [
        ({"FSDP_VERSION": "1"}, {}, "FSDP 1, which flattens"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, {}, "FSDP_OFFLOAD_PARAMS"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "FSDP_ACTIVATION_CHECKPOINTING"),
        ({}, {"model": {"quantization": "4bit"}}, "model.quantization 4bit cannot be sharded by FSDP"),
        ({}, {"training": {"precision": "fp16"}}, "fp16 cannot be combined with FSDP"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "launched with DeepSpeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, "launched with Megatron-LM"),
    ],
)
def test_launches_that_cannot_be_trained_are_refused_by_name(
    environment: dict[str, str],
    changes: dict[str, dict[str, Any]],
    message: str,
    recipe: MakeRecipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "2"} | environment).items():
        monkeypatch.setenv(name, value)
    made = recipe()
    for section, values in changes.items():
        made[section] |= values
    with pytest.raises(ConfigError, match=message):
        train(made, progress=False)
    assert not Path(made["output"]).exists()


def test_a_model_that_is_made_anew_for_its_best_step_begins_the_phase_too(
    recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a sharded model is replaced by, which takes whole weights, is what the method saves."""
    options: dict[str, Any] = {"best_metric": "nll", "eval_every": 2, "learning_rate": 0.3}
    plain = quietly(recipe(name="plain", **options))
    assert plain.kept_step < plain.steps
    made, begun = [], []
    prepare, begin = run.prepare_model, type(get_method("monteclora")).begin_phase
    monkeypatch.setattr(run, "prepare_model", lambda *arguments: made.append(prepare(*arguments)) or made[-1])
    monkeypatch.setattr(
        type(get_method("monteclora")),
        "begin_phase",
        lambda *arguments: begun.append(arguments[1]) or begin(*arguments),
    )
    monkeypatch.setattr(sharding, "is_sharded", lambda model: True)
    quietly(recipe(name="anew", **options))
    assert len(made) == 2
    assert all(one is other for one, other in zip(made, begun, strict=True))
    assert adapter_content(tmp_path / "anew") == adapter_content(tmp_path / "plain")


def test_one_process_is_not_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert not sharding.is_requested()
