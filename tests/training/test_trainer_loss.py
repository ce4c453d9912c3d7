"""The mixin and losses that are someone's own: the plain Trainer's value and gradient, plus the regulariser once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import BertForSequenceClassification, Trainer

from monteclora import MonteCLoRAConfig, MonteCLoRATrainer, MonteCLoRATrainerMixin, get_peft_model, variational_loss
from monteclora.errors import ConfigError
from tests.models import bert, llama_classifier, posterior_of, relative_difference, stir, wrapped
from tests.training.test_trainer import TOLERANCE, TakesGradients, arguments, collate, head_model, rows, train

WEIGHTS = (1.0, 5.0, 20.0)


def weighted(logits: Tensor, labels: Tensor) -> Tensor:
    """A loss with class weights; its value is far from the unweighted one's."""
    return nn.functional.cross_entropy(logits.view(-1, 3).float(), labels.view(-1), weight=torch.tensor(WEIGHTS)) * 3


def loss_function(*, pooled_logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
    """In the place of a model's ``loss_function``."""
    return weighted(pooled_logits, labels)


class WeightedTrainer(Trainer):
    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = weighted(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


class PairTrainer(Trainer):
    """The first row of a batch is to have a larger logit than the others; there are no labels."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits[:, 0]
        loss = -nn.functional.logsigmoid(logits[:1] - logits[1:]).mean()
        return (loss, {"logits": logits}) if return_outputs else loss


class OwnModel(BertForSequenceClassification):
    """Someone's model under the name of one of the library's."""

    def forward(self, labels: Tensor | None = None, num_items_in_batch: Any = None, **inputs: Any) -> Any:
        outputs = super().forward(**inputs)
        if labels is not None:
            outputs["loss"] = weighted(outputs.logits, labels)
        return outputs


OwnModel.__name__ = "BertForSequenceClassification"


def plain_bert(**options: Any) -> Any:
    return wrapped(bert, sample_scale=0.0, lora_dropout=0.0, base=options)


def own_loss_function() -> Any:
    model = wrapped(llama_classifier, sample_scale=0.0, lora_dropout=0.0)
    model.get_base_model().loss_function = loss_function
    return model


def own_class() -> Any:
    torch.manual_seed(0)
    model = get_peft_model(
        OwnModel(bert().config),
        MonteCLoRAConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS", sample_scale=0.0, kl_weight=1e-2),
    )
    stir(model)
    return model


OWN: dict[str, tuple[Callable[[], Any], type[Trainer]]] = {
    "class weights in compute_loss": (plain_bert, WeightedTrainer),
    "pairs in compute_loss": (plain_bert, PairTrainer),
    "loss_function of the model": (own_loss_function, Trainer),
    "class with the library's name": (own_class, Trainer),
}


@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize("accumulated", [1, 4])
def test_a_loss_that_someone_wrote_is_left_alone(tmp_path: Path, own: str, accumulated: int) -> None:
    """The task's gradient is the plain Trainer's, rho and eta have the regulariser's once, the loss is their sum."""
    build, kind = OWN[own]
    mixed = type("Mixed", (MonteCLoRATrainerMixin, kind), {})
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulated}
    plain, ours = build(), build()
    variational = variational_loss(plain)
    variational.backward()
    expected = {n: p.grad.clone() for n, p in plain.named_parameters() if "posteriors" in n}
    plain.zero_grad()
    reference = train(plain, rows("classes", 8), tmp_path, kind, **sizes)
    trainer = train(ours, rows("classes", 8), tmp_path, mixed, **sizes)
    found = trainer.gradients[0]
    task = {n: g for n, g in reference.gradients[0].items() if "posteriors" not in n}
    assert max(g.abs().max() for g in task.values()) > 1e-5
    assert relative_difference(task, {n: g for n, g in found.items() if n in task}) < TOLERANCE
    assert relative_difference(expected, {n: g for n, g in found.items() if n in expected}) < TOLERANCE
    assert trainer.logged[0]["loss"] == pytest.approx(reference.logged[0]["loss"] + variational.item(), rel=1e-4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(reference.evaluate()["eval_loss"], rel=1e-5)


def test_a_subclass_that_overrides_compute_loss_keeps_the_regulariser(tmp_path: Path) -> None:
    class Own(MonteCLoRATrainer):
        compute_loss = WeightedTrainer.compute_loss

    class Calling(MonteCLoRATrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs)

    model = plain_bert()
    variational_loss(model).backward()
    expected = posterior_of(model).rho.grad
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    for kind in (Own, Calling):
        (found,) = train(plain_bert(), rows("classes", 8), tmp_path, kind, **sizes).gradients
        torch.testing.assert_close(found["posteriors.default.rho"], expected, rtol=1e-5, atol=1e-8)
    # whoever calls the mixin's compute_loss gets its correction as well
    (ours,) = train(plain_bert(), rows("classes", 8), tmp_path, MonteCLoRATrainer, **sizes).gradients
    assert relative_difference(ours, found) < TOLERANCE


def test_users_own_loss_functions_are_respected(tmp_path: Path) -> None:
    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return outputs["logits"].square().sum() / num_items_in_batch

    found = []
    for batch, accumulated in ((8, 1), (2, 4)):
        model, data = head_model("inline loss")
        callback = TakesGradients()
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
        MonteCLoRATrainer(
            model=model,
            args=arguments(tmp_path, **sizes),
            train_dataset=data,
            data_collator=collate,
            compute_loss_func=loss,
            callbacks=[callback],
        ).train()
        found += callback.steps
    assert relative_difference(found[0], found[1]) < TOLERANCE


def test_tuples_instead_of_output_objects_keep_their_predictions(tmp_path: Path) -> None:
    """``return_dict=False``: the loss comes first and the logits follow."""
    results = []
    for return_dict in (True, False):
        model = plain_bert(return_dict=return_dict)
        sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
        trainer = train(model, rows("classes"), tmp_path, **sizes)
        predicted = trainer.predict(rows("classes"))
        assert predicted.predictions.shape == (7, 3)
        results.append((trainer.gradients[0], predicted.predictions, predicted.metrics["test_loss"]))
    (one, logits, loss), (other, others, other_loss) = results
    assert relative_difference(one, other) < TOLERANCE
    assert logits == pytest.approx(others, abs=1e-6)
    assert loss == pytest.approx(other_loss, rel=1e-6)


def test_a_head_that_takes_no_count_is_the_trainers_to_divide(tmp_path: Path) -> None:
    found = []
    for kind in (Trainer, MonteCLoRATrainer):
        model = plain_bert()
        model.get_base_model().accepts_loss_kwargs = False
        sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
        (gradients,) = train(model, rows("classes", 8), tmp_path, kind, **sizes).gradients
        found.append({name: g for name, g in gradients.items() if "posteriors" not in name})
    assert relative_difference(found[0], found[1]) < TOLERANCE


def test_probing_the_head_leaves_generators_draws_and_modes(tmp_path: Path) -> None:
    """Also where a batch has no label that counts."""
    data = rows("classes", 8)
    for row in data[:2]:
        row["labels"] = -100
    calls: list[bool] = []
    states = []
    model = wrapped(bert, base={"hidden_dropout_prob": 0.1}, lora_dropout=0.1)
    model.get_base_model().bert.register_forward_hook(lambda module, *_: calls.append(module.training))
    trainer = MonteCLoRATrainer(
        model=model, args=arguments(tmp_path, gradient_accumulation_steps=4), data_collator=collate
    )
    trainer.current_gradient_accumulation_steps = 4
    model.train()
    model.get_base_model().bert.embeddings.eval()
    modes = [module.training for module in model.modules()]
    for _ in range(2):
        states.append((torch.get_rng_state(), posterior_of(model).draws))
        assert trainer._share_of_items(model, collate(data), torch.tensor(24)) == pytest.approx(6 / 24)
        states.append((torch.get_rng_state(), posterior_of(model).draws))
    assert calls == [False, False], "the head is probed once, by two forward passes in evaluation mode"
    assert all(torch.equal(state, states[0][0]) and draws == 0 for state, draws in states)
    assert [module.training for module in model.modules()] == modes


# -- what the mixin assumes of the Trainer ------------------------------------------------------------------------


class OtherScale(Trainer):
    """As a version of the Trainer that scales the loss in another way would be."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().training_step(*args, **kwargs) / 4


class NoComputeLoss(Trainer):
    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss = model.train()(**inputs).loss
        self.accelerator.backward(loss)
        return loss.detach()


@pytest.mark.parametrize(
    ("base", "problem"),
    [(OtherScale, "training_step made .* of a loss"), (NoComputeLoss, "did not call compute_loss")],
    ids=["other scale", "no compute_loss"],
)
def test_a_trainer_of_other_habits_ends_in_an_error(tmp_path: Path, base: type[Trainer], problem: str) -> None:
    mixed = type("Mixed", (MonteCLoRATrainerMixin, base), {})
    model = plain_bert()
    before = posterior_of(model).rho.detach().clone()
    with pytest.raises(ConfigError, match=problem) as caught:
        train(model, rows("classes"), tmp_path, mixed)
    assert f"transformers {transformers.__version__}" in str(caught.value)
    assert "compute_loss" in caught.value.hint
    assert torch.equal(posterior_of(model).rho, before)
