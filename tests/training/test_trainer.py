"""The Trainer mixin: the right objective, whatever is accumulated, logged, clipped, evaluated or resumed."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments

import monteclora
from monteclora import MonteCLoRATrainer, MonteCLoRATrainerMixin, variational_loss
from monteclora.adapters.active import train_posterior_only
from monteclora.errors import ConfigError, DivergenceError
from tests.models import (
    PAD,
    VOCABULARY,
    bert,
    llama,
    llama_classifier,
    posterior_of,
    relative_difference,
    trainable,
    wrapped,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
TOLERANCE = 1e-5


# -- ragged data ---------------------------------------------------------------------------------------------------


def rows(head: str, count: int = 7, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of different lengths; for language modelling with different numbers of completion tokens, one has none."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        length = 4 + (number * 3) % 6
        ids = torch.randint(2, VOCABULARY, (length,), generator=generator).tolist()
        label: Any = number % 3
        if head == "language":
            prompt = [1, 4, 2, 3, 1, length, 2][number % 7]
            label = [-100] * prompt + ids[prompt:]
        elif head == "regression":
            label = float(torch.randn((), generator=generator))
        elif head == "multilabel":
            label = torch.randint(0, 2, (3,), generator=generator).float().tolist()
        found.append({"input_ids": ids, "labels": label})
    return found


def collate(batch: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Pad on the right to the longest row of the batch."""
    longest = max(len(row["input_ids"]) for row in batch)

    def pad(values: list[int], filler: int) -> list[int]:
        return values + [filler] * (longest - len(values))

    per_token = isinstance(batch[0]["labels"], list) and len(batch[0]["labels"]) == len(batch[0]["input_ids"])
    labels = [pad(row["labels"], -100) if per_token else row["labels"] for row in batch]
    return {
        "input_ids": torch.tensor([pad(row["input_ids"], PAD) for row in batch]),
        "attention_mask": torch.tensor([pad([1] * len(row["input_ids"]), 0) for row in batch]),
        "labels": torch.tensor(labels),
    }


class TakesGradients(TrainerCallback):
    """Keeps the gradient of every optimiser step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        found = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
        self.steps.append(found)


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_grad_norm": 0.0,
        "learning_rate": 1e-2,
        "max_steps": 1,
        "seed": 3,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**defaults, **options})


def train(
    model: nn.Module, data: list[dict[str, Any]], folder: Path, kind: type[Trainer] = MonteCLoRATrainer, **options: Any
) -> Any:
    """Train, and give the Trainer back, with ``gradients`` of every step and ``logged`` values."""
    callback = TakesGradients()
    resume = options.pop("resume", None)
    trainer = kind(
        model=model,
        args=arguments(folder, **options),
        train_dataset=data,
        eval_dataset=data,
        data_collator=collate,
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.gradients = callback.steps
    trainer.logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return trainer


HEADS: dict[str, tuple[Callable[..., nn.Module], str, dict[str, Any]]] = {
    "inline loss": (bert, "classes", {}),
    "loss function": (llama_classifier, "classes", {}),
    "regression": (bert, "regression", {"num_labels": 1}),
    "multilabel": (bert, "multilabel", {"problem_type": "multi_label_classification"}),
    "language model": (llama, "language", {}),
}
SPLITS = [(8, 1), (4, 2), (2, 4), (1, 8)]


def head_model(head: str, **options: Any) -> tuple[Any, list[dict[str, Any]]]:
    build, kind, base = HEADS[head]
    # without noise, so that it does not differ between the batches that are accumulated
    model = wrapped(build, base=base, sample_scale=0.0, lora_dropout=0.0, **options)
    return model, rows(kind)


def expected_gradients(head: str, *, task: bool = True, variational: bool = True) -> dict[str, Tensor]:
    """Of the mean over all rows (or tokens) plus the regulariser once, by one backward pass."""
    model, data = head_model(head)
    loss = variational_loss(model) * float(variational)
    if task:
        loss = loss + model(**collate(data)).loss
    loss.backward()
    return {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize(
    ("head", "split"),
    [
        *itertools.product(["inline loss", "loss function", "language model"], SPLITS),
        *itertools.product(["regression", "multilabel"], [(2, 4)]),
    ],
    ids=str,
)
def test_accumulation_does_not_change_the_gradient(tmp_path: Path, head: str, split: tuple[int, int]) -> None:
    batch, accumulated = split
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
    # both parts together; without noise rho and eta see the regulariser only, and the rest sees the task only
    model, data = head_model(head)
    (found,) = train(model, data, tmp_path, **sizes).gradients
    expected = expected_gradients(head)
    assert relative_difference(expected, found) < TOLERANCE
    variational = expected_gradients(head, task=False)
    for name, gradient in found.items():
        if "posteriors" in name:
            assert relative_difference({name: variational[name]}, {name: gradient}) < TOLERANCE
            assert gradient.abs().max() > 0
    # the task alone
    model, data = head_model(head, kl_weight=0.0, coop_weight=0.0)
    (alone,) = train(model, data, tmp_path, **sizes).gradients
    task = expected_gradients(head, variational=False)
    names = [name for name in task if "posteriors" not in name]
    assert relative_difference({n: task[n] for n in names}, {n: alone[n] for n in names}) < TOLERANCE
    assert all(alone[name].eq(0).all() for name in alone if "posteriors" in name)


def test_the_plain_trainer_multiplies_the_gradient_of_an_inline_loss(tmp_path: Path) -> None:
    """The control: the comparison above would see it."""
    model, data = head_model("inline loss", kl_weight=0.0, coop_weight=0.0)
    (found,) = train(
        model, data, tmp_path, Trainer, per_device_train_batch_size=2, gradient_accumulation_steps=4
    ).gradients
    expected = expected_gradients("inline loss", variational=False)
    name = next(name for name in expected if "lora_B" in name)
    assert float(found[name].norm() / expected[name].norm()) > 3.0


def test_label_smoothing_under_accumulation(tmp_path: Path) -> None:
    found = []
    for batch, accumulated in SPLITS[::2]:
        model, data = head_model("inline loss")
        found += train(
            model,
            data,
            tmp_path,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulated,
            label_smoothing_factor=0.1,
        ).gradients
    assert all(relative_difference(found[0], other) < TOLERANCE for other in found[1:])


@pytest.mark.parametrize("accumulated", [1, 3, 4])
def test_the_regulariser_counts_once_a_step_also_in_a_short_last_step(tmp_path: Path, accumulated: int) -> None:
    model = wrapped(bert, sample_scale=0.0)
    trainer = train(
        model,
        rows("classes", 11),
        tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulated,
        max_steps=-1,
        num_train_epochs=1,
        learning_rate=0.0,
    )
    model = wrapped(bert, sample_scale=0.0)
    variational_loss(model).backward()
    expected = posterior_of(model).rho.grad
    assert len(trainer.gradients) == -(-6 // accumulated)
    for step in trainer.gradients:
        torch.testing.assert_close(step["posteriors.default.rho"], expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("split", [(8, 1), (2, 4)], ids=str)
def test_the_logged_loss_is_the_objective_with_the_regulariser_once(tmp_path: Path, split: tuple[int, int]) -> None:
    model, data = head_model("inline loss")
    with torch.no_grad():
        expected = (model(**collate(data)).loss + variational_loss(model)).item()
        parts = posterior_of(model).regulariser()
    sizes = {"per_device_train_batch_size": split[0], "gradient_accumulation_steps": split[1]}
    (logged,) = train(head_model("inline loss")[0], data, tmp_path, **sizes).logged
    assert logged["loss"] == pytest.approx(expected, rel=1e-4)
    assert logged["posterior/kl"] == pytest.approx(parts.kl.item(), rel=1e-5)
    assert logged["posterior/pi_squared_norm"] == pytest.approx(parts.coop.item(), rel=1e-5)


def test_every_batch_has_its_own_draw_and_the_posterior_learns(tmp_path: Path) -> None:
    model = wrapped(llama)
    before = trainable(model)
    trainer = train(
        model,
        rows("language"),
        tmp_path,
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    assert posterior_of(model).draws == 6
    after = trainable(model)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert len(trainer.logged) == 3
    assert all({"posterior/kl", "posterior/pi_squared_norm"} <= entry.keys() for entry in trainer.logged)
    first, last = trainer.logged[0]["posterior/kl"], trainer.logged[-1]["posterior/kl"]
    assert first != last


def test_weight_decay_leaves_rho_and_eta_alone(tmp_path: Path) -> None:
    model = wrapped(bert, sample_scale=0.0, kl_weight=0.0, coop_weight=0.0)
    before = trainable(model)
    trainer = train(model, rows("classes"), tmp_path, max_steps=3, weight_decay=0.5)
    after = trainable(model)
    for name in ("posteriors.default.rho", "posteriors.default.eta"):
        assert torch.equal(before[name], after[name])
    groups = trainer.optimizer.param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    posterior = posterior_of(model)
    assert decays[id(posterior.rho)] == decays[id(posterior.eta)] == 0.0
    assert {decays[id(p)] for n, p in model.named_parameters() if "lora_" in n} == {0.5}
    assert len(decays) == sum(p.requires_grad for p in model.parameters())


def test_rho_and_eta_train_at_the_base_rate_of_a_lora_plus_optimiser(tmp_path: Path) -> None:
    """peft's helper gives every vector, and so rho, the rate of lora_B."""
    model = wrapped(bert)
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1
    )
    trainer = MonteCLoRATrainer(
        model=model,
        args=arguments(tmp_path, lr_scheduler_type="constant", max_steps=2),
        train_dataset=rows("classes"),
        data_collator=collate,
        optimizers=(optimizer, None),
    )
    trainer.train()
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(groups) == sum(p.requires_grad for p in model.parameters())
    posterior = posterior_of(model)
    (own,) = {id(groups[id(p)]): groups[id(p)] for p in (posterior.rho, posterior.eta)}.values()
    assert len(own["params"]) == 2
    assert own["lr"] == pytest.approx(1e-3)
    assert own["weight_decay"] == 0.0
    rates = {name: groups[id(p)]["lr"] for name, p in model.named_parameters() if p.requires_grad}
    assert {rate for name, rate in rates.items() if "lora_B" in name} == {1e-3 * 16.0}
    assert {rate for name, rate in rates.items() if "lora_A" in name} == {1e-3}


def test_gradient_clipping_sees_the_whole_gradient(tmp_path: Path) -> None:
    norms = []
    for limit in (0.0, 0.05):
        model = wrapped(bert)
        trainer = train(model, rows("classes"), tmp_path, max_grad_norm=limit, per_device_train_batch_size=8)
        (found,) = trainer.gradients
        norms.append(torch.stack([gradient.norm() for gradient in found.values()]).norm().item())
    assert norms[0] > 0.1
    assert norms[1] == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize("noise", ["shared", "per_example"])
def test_evaluating_during_training_changes_nothing(tmp_path: Path, noise: str) -> None:
    """Neither noise nor dropout nor the order of the data."""
    results = []
    for options in ({}, {"eval_strategy": "steps", "eval_steps": 1}, {"eval_strategy": "steps", "eval_steps": 2}):
        model = wrapped(bert, base={"hidden_dropout_prob": 0.1}, noise=noise, lora_dropout=0.1)
        trainer = train(model, rows("classes", 9), tmp_path, max_steps=5, per_device_train_batch_size=2, **options)
        results.append((trainable(model), posterior_of(model).draws))
        evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
        assert bool(evaluations) == bool(options)
    weights, draws = results[0]
    for other, count in results[1:]:
        assert count == draws == 5
        assert all(torch.equal(weights[name], other[name]) for name in weights)


def test_the_evaluation_loss_is_the_mean_task_loss(tmp_path: Path) -> None:
    for head in ("inline loss", "loss function", "regression", "multilabel"):
        model, data = head_model(head)
        trainer = MonteCLoRATrainer(
            model=model,
            args=arguments(tmp_path, per_device_eval_batch_size=8),
            eval_dataset=data,
            data_collator=collate,
        )
        found = trainer.evaluate()
        with torch.no_grad():
            expected = model.eval()(**collate(data)).loss.item()
        assert found["eval_loss"] == pytest.approx(expected, rel=1e-5), head
        assert "eval_kl" not in found


def test_paired_with_plain_lora(tmp_path: Path) -> None:
    """Turning the method on leaves initial weights, head, dropout masks and the order of the data bitwise."""
    import peft
    from peft import LoraConfig

    from tests.models import TARGETS, config_for

    results = []
    for method in (True, False):
        seen: list[Tensor] = []
        base = bert(hidden_dropout_prob=0.2)
        base.register_forward_pre_hook(
            lambda m, a, kwargs, seen=seen: seen.append(kwargs["input_ids"]), with_kwargs=True
        )
        for module in base.modules():
            if isinstance(module, nn.Dropout):
                module.register_forward_hook(lambda m, i, output, seen=seen: seen.append(output.eq(0)))
        torch.manual_seed(8)
        if method:
            model = monteclora.get_peft_model(base, config_for(bert))
        else:
            model = peft.get_peft_model(
                base, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS[bert], task_type="SEQ_CLS")
            )
        initial = {n: t.clone() for n, t in model.state_dict().items() if "posteriors" not in n}
        kind = MonteCLoRATrainer if method else Trainer
        train(model, rows("classes", 9), tmp_path, kind, max_steps=4, per_device_train_batch_size=2)
        results.append((initial, seen))
    (ours, ours_seen), (plain, plain_seen) = results
    assert all(torch.equal(ours[name], plain[name]) for name in plain)
    assert len(ours_seen) == len(plain_seen) > 20
    zeros_apart = [a for a, b in zip(ours_seen, plain_seen, strict=True) if not torch.equal(a, b)]
    assert not zeros_apart


@pytest.mark.parametrize("options", [{}, {"noise": "per_example", "regulariser": "sampled"}], ids=str)
def test_resuming_is_the_uninterrupted_run_bitwise(tmp_path: Path, options: dict[str, Any]) -> None:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 1,
        "weight_decay": 0.1,
    }

    def model() -> Any:
        return wrapped(bert, base={"hidden_dropout_prob": 0.1}, lora_dropout=0.1, **options)

    whole = model()
    train(whole, rows("classes", 9), tmp_path / "whole", **settings)
    resumed = model()
    trainer = train(
        resumed, rows("classes", 9), tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-4"), **settings
    )
    assert len(trainer.gradients) == 2
    assert posterior_of(resumed).draws == posterior_of(whole).draws == 10
    after = trainable(resumed)
    assert all(torch.equal(value, after[name]) for name, value in trainable(whole).items())


def test_the_checkpoint_holds_the_posterior_and_the_best_one_comes_back(tmp_path: Path) -> None:
    model = wrapped(bert)
    trainer = train(
        model,
        rows("classes", 9),
        tmp_path,
        max_steps=4,
        per_device_train_batch_size=4,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        learning_rate=0.3,
    )
    best = Path(trainer.state.best_model_checkpoint)
    assert (best / "posterior.safetensors").is_file()
    loaded = monteclora.from_pretrained(bert(), best, is_trainable=True)
    for name in ("rho", "eta"):
        assert torch.equal(getattr(posterior_of(loaded), name), getattr(posterior_of(model), name))
    assert posterior_of(model).draws == posterior_of(loaded).draws
    assert posterior_of(model).rho.requires_grad


def test_post_hoc_training_moves_only_rho_and_eta(tmp_path: Path) -> None:
    model = wrapped(bert)
    posterior_of(model).enabled = False
    first = train(model, rows("classes"), tmp_path, max_steps=2, per_device_train_batch_size=4)
    assert posterior_of(model).draws == 0
    assert not any("posterior/kl" in entry for entry in first.logged)
    middle = trainable(model)
    train_posterior_only(model)
    train(model, rows("classes"), tmp_path, max_steps=2, per_device_train_batch_size=4)
    assert posterior_of(model).draws == 2
    moved = {name for name, p in model.named_parameters() if name in middle and not torch.equal(p, middle[name])}
    assert moved == {"posteriors.default.rho", "posteriors.default.eta"}


def test_a_model_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no MonteCLoRA adapter") as caught:
        MonteCLoRATrainer(model=llama(), args=arguments(tmp_path), train_dataset=rows("language"))
    assert "monteclora.get_peft_model" in caught.value.hint


def test_the_plain_trainer_warns_of_the_missing_regulariser_and_the_mixin_does_not(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="without its regulariser"):
        train(wrapped(llama), rows("language"), tmp_path, Trainer, max_steps=5)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without its regulariser")
        train(wrapped(llama), rows("language"), tmp_path, max_steps=5)


def test_a_trainer_in_front_of_the_mixin_is_refused() -> None:
    class Base(Trainer):
        pass

    with pytest.raises(ConfigError, match="Wrong has Base in front of MonteCLoRATrainerMixin") as caught:

        class Wrong(Base, MonteCLoRATrainerMixin):
            pass

    assert "class Wrong(MonteCLoRATrainerMixin, Base)" in caught.value.hint

    class Right(MonteCLoRATrainerMixin, Base):
        pass

    # the mixin is in front of Trainer here, though not of every class
    class Mixed(Base, MonteCLoRATrainer):
        pass


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    """peft's and the plain Trainer's run goes on to a normal exit."""
    model = wrapped(bert)
    before = trainable(model)
    with torch.no_grad():
        model.get_base_model().bert.embeddings.word_embeddings.weight[5:].fill_(float("nan"))
    with pytest.raises(DivergenceError, match="not finite at step 1") as caught:
        train(model, rows("classes"), tmp_path, max_steps=3)
    assert caught.value.hint
    assert all(torch.equal(before[name], value) for name, value in trainable(model).items())


@pytest.mark.parametrize("mode", [{"gradient_checkpointing": True}, {"bf16": True}], ids=str)
def test_usual_modes_of_the_trainer(tmp_path: Path, mode: dict[str, Any]) -> None:
    losses = []
    for options in ({}, mode):
        model = wrapped(llama)
        trainer = train(model, rows("language"), tmp_path, max_steps=3, per_device_train_batch_size=4, **options)
        assert posterior_of(model).draws == 3
        losses.append([entry["loss"] for entry in trainer.logged])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2 if "bf16" in mode else 1e-5)


def test_columns_the_model_does_not_take_are_removed(tmp_path: Path) -> None:
    """The Trainer finds the columns of the model inside the wrapper."""
    from datasets import Dataset

    class Tokenizer:
        model_input_names = ("input_ids", "attention_mask")
        padding_side = "right"

        def pad(self, features: list[dict[str, Any]], **_: Any) -> dict[str, Tensor]:
            return collate([{**row, "labels": row["label"]} for row in features])

    data = Dataset.from_list([{**row, "note": "text"} for row in rows("classes")])
    model = wrapped(bert)
    MonteCLoRATrainer(
        model=model,
        args=arguments(tmp_path, remove_unused_columns=True),
        train_dataset=data.rename_column("labels", "label"),
        data_collator=DataCollatorWithPadding(Tokenizer()),
    ).train()
    assert posterior_of(model).draws == 1
