"""``training.temperature``: what is saved is calibrated, whatever loads it, and nothing else about it changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

import monteclora
from monteclora.errors import ConfigError
from monteclora.metrics.calibration import smoothed_nll
from monteclora.runs.recipe import load_recipe
from monteclora.runs.run_folder import RunFolder
from monteclora.training.tempering import head_of
from tests.models import bert
from tests.training.conftest import Recipe, StopAfter, adapter_content, quietly, train_until
from tests.training.processes import launch

MakeRecipe = Callable[..., Recipe]
# enough of it for a classifier that is sure of itself, and wrong about the validation rows
OVERFITTED: dict[str, Any] = {"learning_rate": 3e-2, "epochs": 12}


def logits(folder: Path, split: str = "validation") -> tuple[Any, Any]:
    found = monteclora.evaluate(folder, split, sampler="mean", progress=False)
    return found.scored.at_mean.log_probs[0], found.scored.at_mean.labels


def test_the_head_is_divided_by_the_best_temperature_and_nothing_else_changes(
    recipe: MakeRecipe, tmp_path: Path
) -> None:
    chosen = {**OVERFITTED, "best_metric": "tempered_nll"}
    plain = quietly(recipe(name="plain", **chosen))
    tempered = quietly(recipe(name="tempered", temperature=True, **chosen))
    before, labels = logits(plain.folder)

    def nll(logarithm: float) -> float:
        return smoothed_nll(log_softmax(before / np.exp(logarithm), axis=1), labels)

    best = minimize_scalar(nll, bounds=(-4, 4), method="bounded", options={"xatol": 1e-8})
    assert tempered.temperature == pytest.approx(np.exp(best.x), rel=1e-3)
    assert abs(best.x) > 0.1
    after, _ = logits(tempered.folder)
    np.testing.assert_allclose(after, log_softmax(before / tempered.temperature, axis=1), atol=1e-4)
    assert tempered.metrics["nll"] == pytest.approx(plain.metrics["tempered_nll"], abs=1e-5)
    assert tempered.metrics["accuracy"] == plain.metrics["accuracy"]
    one, other = (load_file(result.folder / "adapter" / "adapter_model.safetensors") for result in (plain, tempered))
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    assert changed
    assert all("classifier" in name for name in changed)


@pytest.mark.parametrize("method", ["lora", "full", "prompt_tuning"])
def test_every_method_has_it(method: str, recipe: MakeRecipe) -> None:
    made = recipe(temperature=True, **OVERFITTED)
    result = quietly({**made, "method": {"name": method}})
    assert result.temperature is not None
    validated = monteclora.evaluate(result.folder, "validation", sampler="mean", progress=False)
    assert validated.point["nll"] == pytest.approx(result.metrics["nll"], abs=1e-4)
    assert "tempered_nll" not in result.metrics  # it is measured where it chooses


@pytest.mark.parametrize(
    "options", [{"best_metric": "tempered_nll"}, {"mode": "post_hoc", "post_hoc": {"max_steps": 3}}]
)
def test_a_resumed_run_ends_the_same(
    options: dict[str, Any], recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = {**OVERFITTED, "temperature": True, "epochs": 3, **options}
    quietly(recipe(name="whole", **options))
    parts = recipe(name="parts", **options)
    train_until(monkeypatch, StopAfter(7), parts)
    with monkeypatch.context() as patch:  # killed when all is trained, and the head is divided
        patch.setattr("monteclora.training.run._save_adapter", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quietly(parts)
    quietly(parts)
    assert adapter_content(tmp_path / "whole") == adapter_content(tmp_path / "parts")
    whole, again = (RunFolder(tmp_path / name).finished for name in ("whole", "parts"))
    assert whole is not None
    assert again is not None
    assert whole["temperature"] == again["temperature"]


def test_a_head_that_does_not_give_the_logits_is_left_as_it_was(
    recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    quietly(recipe(name="plain", **OVERFITTED))
    monkeypatch.setattr(
        "monteclora.training.run.head_of",
        lambda model, *arguments: next(n for n, m in model.named_modules() if n.endswith("query.lora_B.default")),
    )
    result = quietly(recipe(name="tempered", temperature=True, **OVERFITTED))
    assert result.temperature is None
    assert adapter_content(tmp_path / "plain") == adapter_content(tmp_path / "tempered")


def test_the_head_is_the_last_trained_layer_of_its_width() -> None:
    model = bert()
    names = [name for name, _ in model.named_parameters()]
    classes = model.config.num_labels
    assert head_of(model, names, classes) == "classifier"
    with pytest.raises(ConfigError, match="no linear layer that is trained gives the 77 logits"):
        head_of(model, names, 77)
    with pytest.raises(ConfigError, match="no linear layer that is trained"):
        head_of(model, [], classes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "causal_lm", "temperature": True}, "is of the kind causal_lm: it is for a classifier's head"),
        ({"temperature": True, "post_hoc": {"adapter": "somewhere"}, "mode": "post_hoc"}, "its head too"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str, recipe: MakeRecipe) -> None:
    with pytest.raises(ConfigError, match=message):
        quietly(load_recipe(recipe(**options)))


def test_it_needs_validation_rows(recipe: MakeRecipe) -> None:
    made = recipe(temperature=True)
    made["data"]["validation_fraction"] = 0.0
    with pytest.raises(ConfigError, match=r"training\.temperature is true, and there are no validation rows"):
        quietly(made)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_two_processes_divide_as_one(sharded: bool, recipe: MakeRecipe, tmp_path: Path) -> None:
    def made(name: str, **training: Any) -> Recipe:
        options = {"sample_scale": 0.0, "lora_dropout": 0.0}
        return recipe(name=name, method_options=options, temperature=True, learning_rate=1e-2, epochs=6, **training)

    launch(made("one"), tmp_path / "one-process", 1)
    launch(made("two", micro_batch_size=2), tmp_path / "two-processes", 2, sharded=sharded)
    one, two = (RunFolder(tmp_path / name).finished for name in ("one", "two"))
    assert one is not None
    assert two is not None
    # their logits are far below 1, and are multiplied by 27: so is what rounding made of them in training
    assert two["temperature"] == pytest.approx(one["temperature"], rel=5e-2)
    assert two["metrics"]["nll"] == pytest.approx(one["metrics"]["nll"], abs=1e-2)
    found = monteclora.evaluate(tmp_path / "two", "validation", sampler="mean", progress=False)
    assert found.point["nll"] == pytest.approx(two["metrics"]["nll"], abs=1e-3)  # what is saved is what was measured
