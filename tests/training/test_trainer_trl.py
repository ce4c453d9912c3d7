"""The mixin in front of trl's SFTTrainer, which checkpoints activations by default and brings a loss of its own."""

from __future__ import annotations

import gc
import importlib.util
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, TrainerCallback

import monteclora
from monteclora import MonteCLoRATrainerMixin, variational_loss
from monteclora.adapters.model import MonteCLoRAModel
from monteclora.errors import ConfigError
from tests.models import END, TARGETS, config_for, llama, posterior_of, relative_difference, trainable, wrapped

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
]


def completions(count: int = 7) -> Dataset:
    """Prompts and completions of different lengths."""
    return Dataset.from_list(
        [
            {
                "prompt": " ".join(f"w{(3 * row + word) % 50}" for word in range(2 + row % 3)) + " ",
                "completion": " ".join(f"w{(5 * row + word) % 90}" for word in range(1 + row % 4)),
            }
            for row in range(count)
        ]
    )


class TakesGradients(TrainerCallback):
    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self.steps.append({n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None})


def train(model: nn.Module, tokenizer: PreTrainedTokenizerFast, folder: Path, **options: Any) -> Any:
    """Train with the mixin, or with trl's class alone where there is no posterior."""
    from trl import SFTConfig, SFTTrainer

    class Mixed(MonteCLoRATrainerMixin, SFTTrainer):
        pass

    Sft = Mixed if isinstance(model, MonteCLoRAModel) else SFTTrainer

    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_grad_norm": 0.0,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "max_length": 32,
        "dataloader_pin_memory": False,
    }
    callback, resume = TakesGradients(), options.pop("resume", None)
    trainer = Sft(
        model=model,
        args=SFTConfig(**{**defaults, **options}),
        train_dataset=completions(),
        eval_dataset=completions(3),
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.gradients = callback.steps
    trainer.logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    gc.collect()
    return trainer


def test_it_trains_draws_and_logs(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = wrapped(llama)
    before = trainable(model)
    trainer = train(
        model,
        tokenizer,
        tmp_path,
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=1,
    )
    assert trainer.args.gradient_checkpointing, "trl's default"
    assert all(block.gradient_checkpointing for block in model.modules() if type(block).__name__ == "LlamaDecoderLayer")
    assert len(trainer.logged) == 3
    assert all(
        {"posterior/kl", "posterior/pi_squared_norm", "mean_token_accuracy"} <= entry.keys() for entry in trainer.logged
    )
    after = trainable(model)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert posterior_of(model).draws == 6


@pytest.mark.parametrize("noise", ["shared", "per_example"])
def test_its_checkpointed_gradient_is_the_plain_one(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, noise: str
) -> None:
    found = []
    for mode in (
        {"gradient_checkpointing": False},
        {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ):
        trainer = train(wrapped(llama, noise=noise), tokenizer, tmp_path, per_device_train_batch_size=8, **mode)
        found += trainer.gradients
    assert relative_difference(found[0], found[1]) < 1e-6
    assert relative_difference(found[0], found[2]) < 1e-6


def test_accumulation_and_completion_only_loss(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """The mean over all completion tokens of the accumulated batch, plus the regulariser once."""
    reference = wrapped(llama, sample_scale=0.0)
    total, count = 0.0, 0
    for row in completions():
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor([prompt + tokenizer(row["completion"])["input_ids"] + [END]])
        logits = reference(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        total = total + nn.functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum")
        count += ids.shape[1] - len(prompt)
    objective = total / count + variational_loss(reference)
    objective.backward()
    expected = {n: p.grad for n, p in reference.named_parameters() if p.requires_grad}
    for batch, accumulated in ((8, 1), (4, 2), (2, 4), (1, 8)):
        trainer = train(
            wrapped(llama, sample_scale=0.0),
            tokenizer,
            tmp_path,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulated,
        )
        assert relative_difference(expected, trainer.gradients[0]) < 1e-5
        assert trainer.logged[0]["loss"] == pytest.approx(objective.item(), rel=1e-4)


@pytest.mark.parametrize(
    "mode",
    [
        {"completion_only_loss": True},
        {"completion_only_loss": False},
        {"packing": True, "packing_strategy": "wrapped", "completion_only_loss": True},
        {"packing": True},
        {"loss_type": "dft"},
    ],
    ids=str,
)
def test_without_noise_and_weights_it_is_lora(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, mode: dict[str, Any]
) -> None:
    """Losses, token counts, accuracies and trained weights are those of peft's LoRA in trl's own Trainer."""
    ours = wrapped(llama, sample_scale=0.0, kl_weight=0.0, coop_weight=0.0)
    plain = peft.get_peft_model(
        llama(), LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS[llama], task_type="CAUSAL_LM")
    )
    weights = ours.state_dict()
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    results = []
    for model in (plain, ours):
        trainer = train(
            model,
            tokenizer,
            tmp_path,
            max_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            eval_strategy="steps",
            eval_steps=3,
            **mode,
        )
        results.append([known(entry) for entry in trainer.state.log_history[:-1]])
    assert len(results[0]) == 4
    assert results[1] == [pytest.approx(entry, rel=1e-5, abs=1e-6) for entry in results[0]]
    trained = plain.state_dict()
    found = {name: value for name, value in ours.state_dict().items() if name in trained}
    assert relative_difference(trained, found) < 1e-5


def known(entry: dict[str, float]) -> dict[str, float]:
    """What a plain LoRA logs too, and no clock."""
    clocks = ("runtime", "per_second")
    return {name: value for name, value in entry.items() if "posterior/" not in name and not name.endswith(clocks)}


def test_resuming_is_the_uninterrupted_run_bitwise(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole, resumed = wrapped(llama, lora_dropout=0.1), wrapped(llama, lora_dropout=0.1)
    train(whole, tokenizer, tmp_path / "whole", **settings)
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    train(resumed, tokenizer, tmp_path / "resumed", resume=checkpoint, **settings)
    assert posterior_of(resumed).draws == 4
    after = trainable(resumed)
    assert all(torch.equal(value, after[name]) for name, value in trainable(whole).items())


def test_a_configuration_instead_of_a_wrapped_model_is_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """trl would make a plain LoRA of it."""
    from trl import SFTConfig, SFTTrainer

    class Sft(MonteCLoRATrainerMixin, SFTTrainer):
        pass

    with pytest.raises(ConfigError, match="plain LoRA") as caught:
        Sft(
            model=llama(),
            args=SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[]),
            train_dataset=completions(),
            processing_class=tokenizer,
            peft_config=config_for(llama),
        )
    assert "monteclora.get_peft_model" in caught.value.hint


def test_saved_by_the_trainer_and_loaded(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = wrapped(llama)
    trainer = train(model, tokenizer, tmp_path / "out")
    trainer.save_model(str(tmp_path / "saved"))
    loaded = monteclora.from_pretrained(llama(), tmp_path / "saved")
    assert torch.equal(posterior_of(loaded).rho, posterior_of(model).rho)
    assert posterior_of(loaded).draws == 1
