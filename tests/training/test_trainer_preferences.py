"""trl's trainers of preferences and rewards: what compares a policy with its reference sees no noise of ours."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast

from monteclora import MonteCLoRATrainerMixin, get_peft_model
from monteclora.errors import ConfigError
from tests.models import TARGETS, config_for, llama, llama_classifier, posterior_of, stir, trainable

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
]


def words(row: int, count: int, step: int = 3) -> str:
    return " ".join(f"w{(step * row + word) % 90}" for word in range(count)) + " "


def pairs(count: int = 6) -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": words(i, 2 + i % 3), "chosen": words(i, 1 + i % 4, 5), "rejected": words(i, 2 + i % 2, 7)}
            for i in range(count)
        ]
    )


def judged(count: int = 6) -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": words(i, 2 + i % 3), "completion": words(i, 1 + i % 4, 5), "label": i % 2 == 0}
            for i in range(count)
        ]
    )


def prompts(count: int = 6) -> Dataset:
    return Dataset.from_list([{"prompt": words(i, 2 + i % 3)} for i in range(count)])


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text.split()))) + 0.1 * len(text) for text in completions]


def policy(method: bool, *, trained: bool = True, build: Any = llama, **options: Any) -> Any:
    """Ours or peft's LoRA with the same weights; ``trained``: lora_B is set."""
    base: dict[str, Any] = {"num_labels": 1} if build is llama_classifier else {}
    config = config_for(build, **options)
    ours = get_peft_model(build(0, **base), config)
    if trained:
        stir(ours)
    if method:
        return ours.train()
    plain = peft.get_peft_model(
        build(0, **base), LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS[build], task_type=config.task_type)
    )
    weights = ours.state_dict()
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    return plain.train()


MODELS = {"Reward": llama_classifier}
DATA: dict[str, Any] = {"DPO": pairs, "Reward": pairs, "KTO": judged, "GRPO": prompts, "RLOO": prompts}
GENERATES: dict[str, Any] = {
    "num_generations": 2,
    "max_completion_length": 6,
    "num_iterations": 2,
    "per_device_train_batch_size": 4,
    "steps_per_generation": 2,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "DPO": {"max_length": 24},
    "KTO": {"max_length": 24, "per_device_train_batch_size": 3},
    "Reward": {"max_length": 24},
    "GRPO": GENERATES,
    "RLOO": GENERATES,
}


def run(kind: str, model: Any, tokenizer: Any, folder: Path, **options: Any) -> list[dict[str, float]]:
    """Train with ours where it has a posterior, else with trl's class; what was logged, step by step."""
    import trl

    base, config = getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")
    trainer_class = type(kind, (MonteCLoRATrainerMixin, base), {}) if hasattr(model, "posteriors") else base
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": 4,
        "learning_rate": 0.0,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "dataloader_pin_memory": False,
        "seed": 5,
    }
    if kind != "Reward":
        defaults["beta"] = 1.0
    more = {"reward_funcs": reward} if kind in ("GRPO", "RLOO") else {}
    trainer = trainer_class(
        model=model,
        args=config(**{**defaults, **OPTIONS[kind], **options}),
        train_dataset=DATA[kind](),
        eval_dataset=DATA[kind](4),
        processing_class=tokenizer,
        **more,
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]


COMPARED = {
    "DPO": ("rewards/chosen", "rewards/rejected", "rewards/margins"),
    "KTO": ("rewards/chosen", "rewards/rejected", "rewards/margins", "kl"),
    "GRPO": ("kl", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"),
    "RLOO": ("kl", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"),
}


@pytest.mark.parametrize("kind", COMPARED)
def test_at_learning_rate_0_a_trained_policy_is_its_reference(
    kind: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Margins, rewards, ratios and KL are those of peft's LoRA, 0: both have the draw of the batch, or no draw."""
    # so that any ratio but 1 is clipped
    options = {"epsilon": 1e-7} if kind in ("GRPO", "RLOO") else {}
    for method in (False, True):
        logged = run(kind, policy(method), tokenizer, tmp_path, **options)
        assert len(logged) == 4
        found = {name: [entry[name] for entry in logged if name in entry] for name in COMPARED[kind]}
        assert all(found.values())
        assert found == {name: [0.0] * len(values) for name, values in found.items()}, method


@pytest.mark.parametrize("kind", ["DPO", "KTO"])
def test_precomputed_references(kind: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Exact for a new adapter, whose lora_B is 0; refused for a trained one before anything is computed."""
    options = {"precompute_ref_log_probs": True}
    for method in (False, True):
        logged = run(kind, policy(method, trained=False), tokenizer, tmp_path / str(method), **options)
        assert all(entry[name] == 0.0 for entry in logged for name in COMPARED[kind] if name in entry)
    model = policy(True)
    with pytest.raises(ConfigError, match="precompute_ref_log_probs=True compares a drawn policy") as caught:
        run(kind, model, tokenizer, tmp_path, **options)
    assert caught.value.hint
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_signs_of_their_own_are_refused_where_batches_are_cut_anew(
    kind: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="noise='per_example'"):
        run(kind, policy(True, noise="per_example"), tokenizer, tmp_path)


@pytest.mark.parametrize("noise", ["shared", "per_example"])
def test_a_pair_has_one_draw_in_policy_and_reference(
    noise: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = policy(True, noise=noise)
    logged = run("DPO", model, tokenizer, tmp_path)
    assert all(entry["rewards/margins"] == 0.0 for entry in logged)
    assert posterior_of(model).draws == len(logged)
    assert len({entry["logps/chosen"] for entry in logged}) == len(logged)


def test_completions_are_scored_under_the_draw_that_made_them(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Two batches per generation, each used twice: a draw for every four steps."""
    model = policy(True)
    run("GRPO", model, tokenizer, tmp_path, max_steps=10)
    assert posterior_of(model).draws == 3


@pytest.mark.parametrize("kind", DATA)
def test_training_moves_everything_and_logs_the_kl(
    kind: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = policy(True, build=MODELS.get(kind, llama))
    before = trainable(model)
    logged = run(kind, model, tokenizer, tmp_path, learning_rate=1e-2)
    for entry in logged:
        assert math.isfinite(entry["loss"])
        assert entry["posterior/kl"] > 0.0
    assert logged[0]["posterior/kl"] != logged[-1]["posterior/kl"]
    after = trainable(model)
    assert all(value.isfinite().all() for value in after.values())
    unmoved = [name for name, value in before.items() if torch.equal(value, after[name])]
    assert not unmoved


@pytest.mark.parametrize("kind", ["DPO", "KTO", "Reward"])
def test_evaluation_is_that_of_lora(kind: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """At the mean: every number is that of peft's LoRA with the same weights."""
    build = MODELS.get(kind, llama)
    found = []
    for method in (False, True):
        logged = run(
            kind, policy(method, build=build), tokenizer, tmp_path, max_steps=1, eval_strategy="steps", eval_steps=1
        )
        (entry,) = [entry for entry in logged if "eval_loss" in entry]
        found.append(
            {name: value for name, value in entry.items() if "per_second" not in name and "runtime" not in name}
        )
    assert found[0].keys() == found[1].keys()
    assert found[1] == pytest.approx(found[0], abs=1e-6)


def rewards(method: bool, tokenizer: Any, folder: Path, steps: int, **options: Any) -> list[dict[str, float]]:
    """What a reward model logs in training at learning rate 0, all pairs in every batch."""
    model = policy(method, build=llama_classifier, kl_weight=0.0, coop_weight=0.0, **options)
    logged = run("Reward", model, tokenizer, folder, per_device_train_batch_size=6, max_steps=steps)
    assert len(logged) == steps
    return [{name: entry[name] for name in REWARD_NUMBERS} for entry in logged]


REWARD_NUMBERS = ("loss", "accuracy", "margin", "min_reward", "mean_reward", "max_reward")


def test_rewards_in_training_are_those_of_lora_without_noise(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """A reward model has no reference to share a draw with: what it logs in training mode has the noise of the draw."""
    plain = rewards(False, tokenizer, tmp_path, 2)
    ours = rewards(True, tokenizer, tmp_path, 2, sample_scale=0.0)
    assert ours == plain
    assert plain[0]["margin"] != 0.0


def test_rewards_in_training_are_those_of_lora_on_average(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Within four standard errors of the draws' mean, at a scale at which a reward is as good as linear in lora_A."""
    (plain,) = rewards(False, tokenizer, tmp_path, 1)
    drawn = rewards(True, tokenizer, tmp_path, 48, sample_scale="relative:0.05")
    for name in ("margin", "mean_reward"):
        values = torch.tensor([entry[name] for entry in drawn], dtype=torch.float64)
        assert len(values.unique()) == len(values), "each batch has a draw"
        assert abs(values.mean().item() - plain[name]) < 4 * values.std().item() / math.sqrt(len(values))
