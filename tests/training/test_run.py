"""What a run leaves behind, what it depends on, and how it ends when it must not go on."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification

from monteclora import from_pretrained
from monteclora.errors import CheckpointError, ConfigError, DataError, DivergenceError
from monteclora.metrics.registry import measure
from monteclora.runs.manifest import newest_complete, read_checkpoint
from monteclora.runs.prepare import prepare_data, prepare_model
from monteclora.runs.recipe import load_recipe
from monteclora.runs.run_folder import RunFolder
from monteclora.system.tree import load_tree
from monteclora.training.run import _FreshModel, train
from tests.training.conftest import Recipe, StopAfter, adapter_content, quietly, trace, train_until

MakeRecipe = Callable[..., Recipe]


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in RunFolder(folder).metrics.read() if event["event"] == kind]


def test_the_old_model_is_gone_before_a_new_one_is_made() -> None:
    made: list[weakref.ref[nn.Module]] = []

    def prepare() -> nn.Module:
        assert all(old() is None for old in made)
        model = nn.Linear(1, 1)
        model.register_forward_hook(lambda *_: model.bias)  # a cycle, as hooks of adapters make them
        made.append(weakref.ref(model))
        return model

    gc.disable()
    try:
        fresh = _FreshModel(prepare)
        fresh.renew()
    finally:
        gc.enable()
    assert [old() is None for old in made] == [True, False]


# -- what it leaves behind -------------------------------------------------------------------------------------------


def test_the_run_folder(recipe: MakeRecipe) -> None:
    result = quietly(recipe(keep_checkpoints=1))
    names = {path.name for path in result.folder.iterdir() if not path.name.startswith(".")}
    assert names == {"recipe.yaml", "environment.json", "metrics.jsonl", "adapter", "checkpoints"}
    assert load_recipe(result.folder / "recipe.yaml") == result.recipe == load_recipe(recipe(keep_checkpoints=1))
    assert [path.name for path in (result.folder / "checkpoints").iterdir()] == ["checkpoint-10"]
    unsafe = (".bin", ".pt", ".pth", ".pkl")
    assert not [path for path in result.folder.rglob("*") if path.suffix in unsafe]
    environment = json.loads((result.folder / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["seeds"] == {"run": 0, "data": 0}
    assert environment["data"]["splits"]["train"]["rows"] == 38
    assert environment["data"]["label_names"] == ["0", "1"]


def test_the_metrics_log(recipe: MakeRecipe) -> None:
    result = quietly(recipe())
    train_events = events(result.folder, "train")
    assert [event["step"] for event in train_events] == [3, 6, 9, 10]
    assert [event["step"] for event in events(result.folder, "eval")] == [5, 10]
    for event in train_events:
        assert {"loss", "objective", "kl", "pi_squared_norm", "learning_rate", "grad_norm", "tokens"} <= set(event)
        weights = result.recipe.method
        # the regulariser changes slowly: its last value is close to the mean over the logged steps
        regulariser = weights.kl_weight * event["kl"] + weights.coop_weight * event["pi_squared_norm"]
        assert event["objective"] - event["loss"] == pytest.approx(regulariser, abs=5e-3)
    (finished,) = events(result.folder, "finished")
    assert finished["metrics"] == result.metrics
    assert finished["trained_parameters"] == result.trained_parameters


def test_a_plain_lora_logs_the_task_alone(recipe: MakeRecipe) -> None:
    result = quietly(recipe(method="lora"))
    assert not {"objective", "kl", "pi_squared_norm"} & set(events(result.folder, "train")[0])


def test_validation_is_that_of_the_saved_adapter(recipe: MakeRecipe, assets: Path) -> None:
    """Measured anew with peft alone, in one batch."""
    result = quietly(recipe(eval_batch_size=4))
    data = prepare_data(result.recipe)
    base = AutoModelForSequenceClassification.from_pretrained(assets / "bert", num_labels=2)
    model = PeftModel.from_pretrained(base, result.adapter).eval()
    batch = data.collate([dict(row) for row in data.validation])
    labels = batch.pop("labels")
    with torch.no_grad():
        probs = model(**batch).logits.softmax(-1)
    assert dict(result.metrics) == pytest.approx(measure("classes", probs, labels.numpy()), abs=1e-5)


def test_causal_lm_validation_is_the_mean_over_learned_tokens(recipe: MakeRecipe) -> None:
    result = quietly(recipe(kind="causal_lm", eval_batch_size=4))
    data = prepare_data(result.recipe)
    model = prepare_model(result.recipe, data.task.kind, data.task.label_names, data.tokenizer)
    trained = from_pretrained(model.unload(), result.adapter).eval()
    total, tokens = 0.0, 0
    for row in data.validation:
        batch = data.collate([dict(row)])
        learned = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            total += trained(**batch).loss.item() * learned
        tokens += learned
    assert result.metrics["nll"] == pytest.approx(total / tokens, rel=1e-5)


# -- what it depends on ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        {"eval_every": 1, "logging_every": 1, "save_every": 2, "keep_checkpoints": 1, "eval_batch_size": 2},
        {"num_workers": 2},
    ],
)
@pytest.mark.parametrize("kind", ["classification", "causal_lm"])
def test_how_a_run_is_watched_does_not_change_it(
    other: dict[str, Any], kind: str, recipe: MakeRecipe, tmp_path: Path
) -> None:
    quietly(recipe(kind=kind, name="one"))
    quietly(recipe(kind=kind, name="other", **other))
    assert adapter_content(tmp_path / "one") == adapter_content(tmp_path / "other")


def test_the_same_recipe_five_times(recipe: MakeRecipe, tmp_path: Path) -> None:
    """Adapter, posterior, optimiser, generators and metrics, to the bit."""
    for number in range(5):
        quietly({**recipe(max_steps=4, logging_every=1, best_metric="nll"), "output": str(tmp_path / str(number))})
    first = trace(tmp_path / "0")
    assert all(trace(tmp_path / str(number)) == first for number in range(1, 5))


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_evaluating_quantized_weights_does_not_change_training(
    quantization: str, recipe: MakeRecipe, assets: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    for name, often in (("seldom", 10), ("often", 1)):
        made = recipe(kind="causal_lm", name=name, eval_every=often, precision="bf16")
        made["model"] = {"name": str(assets / "wide"), "quantization": quantization, "dtype": "bfloat16"}
        quietly(made)
    assert adapter_content(tmp_path / "seldom") == adapter_content(tmp_path / "often")


def test_the_seed_changes_it(recipe: MakeRecipe, tmp_path: Path) -> None:
    for seed in (0, 1):
        quietly({**recipe(name=f"seed{seed}"), "seed": seed})
    assert adapter_content(tmp_path / "seed0") != adapter_content(tmp_path / "seed1")


def test_lora_and_monteclora_are_paired(recipe: MakeRecipe, tmp_path: Path) -> None:
    """The same initial weights, and the same numbers from the global generators: dropout masks and data order."""
    models = {}
    for method in ("lora", "monteclora"):
        found = load_recipe(recipe(method=method, name=method))
        torch.rand(17 if method == "lora" else 3)  # whatever happened before must not matter
        data = prepare_data(found)
        model = prepare_model(found, data.task.kind, data.task.label_names, data.tokenizer)
        models[method] = model.state_dict()
        quietly(recipe(method=method, name=method))
    for name, tensor in models["lora"].items():
        assert torch.equal(tensor, models["monteclora"][name]), name
    states = [load_tree(tmp_path / m / "checkpoints/checkpoint-10/training_state")["generators"][0] for m in models]
    assert torch.equal(states[0]["torch"], states[1]["torch"])
    assert states[0]["python"] == states[1]["python"]


def test_the_first_phase_of_post_hoc_is_plain_lora(recipe: MakeRecipe, tmp_path: Path) -> None:
    """And the second one leaves the adapter as it was, and learns the posterior."""
    quietly(recipe(method="lora", name="lora"))
    quietly(recipe(name="post_hoc", mode="post_hoc"))
    plain, both = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("lora", "post_hoc"))
    assert both.keys() == plain.keys()
    assert all(torch.equal(tensor, both[name]) for name, tensor in plain.items())
    posterior = load_file(tmp_path / "post_hoc/adapter/posterior.safetensors")
    assert posterior["rho"].abs().max() > 1e-3
    phases = [event["phase"] for event in events(tmp_path / "post_hoc", "phase")]
    assert phases == ["adapter", "posterior"]
    steps = [event["step"] for event in events(tmp_path / "post_hoc", "train")]
    assert steps == [3, 6, 9, 10, 13, 15]
    rates = [event["learning_rate"] for event in events(tmp_path / "post_hoc", "train")]
    assert max(rates[4:]) > 2 * max(rates[:4])


def test_accumulation_changes_rounding_only(recipe: MakeRecipe, tmp_path: Path) -> None:
    weights = []
    for micro in (8, 2):
        options = {"lora_dropout": 0.0, "num_components": 2, "sample_scale": 0.0}
        made = recipe(kind="causal_lm", name=f"micro{micro}", micro_batch_size=micro, method_options=options)
        quietly(made)
        weights.append(load_file(tmp_path / f"micro{micro}/adapter/adapter_model.safetensors"))
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=2e-3, atol=2e-4)


def test_max_steps_and_epochs_whichever_ends_first(recipe: MakeRecipe) -> None:
    assert quietly(recipe(name="a", max_steps=7)).steps == 7
    assert quietly(recipe(name="b", epochs=1, max_steps=7)).steps == 5
    assert quietly(recipe(name="c", epochs=0.5)).steps == 3


def test_the_best_step_is_kept(recipe: MakeRecipe) -> None:
    """With a learning rate that ruins the model in the end, the best step is an early one."""
    made = recipe(best_metric="nll", eval_every=1, learning_rate=0.3, schedule="constant", warmup_ratio=0.0)
    result = quietly({**made, "training": {**made["training"], "keep_checkpoints": 1, "epochs": 4}})
    values = {event["step"]: event["nll"] for event in events(result.folder, "eval")}
    best = min(values, key=lambda step: (values[step], step))
    assert 1 <= best < result.steps
    assert result.kept_step == best
    assert result.metrics["nll"] == values[best]
    kept = {path.name for path in (result.folder / "checkpoints").iterdir()}
    assert kept == {f"checkpoint-{best}", f"checkpoint-{result.steps}"}
    weights = load_file(result.adapter / "adapter_model.safetensors")
    saved = load_file(result.folder / f"checkpoints/checkpoint-{best}/adapter_model.safetensors")
    assert all(torch.equal(weights[name], saved[name]) for name in saved)


def test_early_stopping(recipe: MakeRecipe) -> None:
    made = recipe(best_metric="nll", eval_every=1, learning_rate=0.3, epochs=8, early_stopping_patience=2)
    result = quietly(made)
    values = [event["nll"] for event in events(result.folder, "eval")]
    assert result.steps < 40
    assert len(values) == result.steps
    assert min(values[-2:]) >= min(values)
    assert result.kept_step == values.index(min(values)) + 1 == result.steps - 2


def test_a_run_without_validation_rows(recipe: MakeRecipe) -> None:
    made = recipe()
    result = quietly({**made, "data": {**made["data"], "validation_fraction": 0}})
    assert dict(result.metrics) == {}
    assert not events(result.folder, "eval")


def test_bfloat16_and_activation_checkpointing(recipe: MakeRecipe) -> None:
    made = recipe(precision="bf16", gradient_checkpointing=True, kind="causal_lm")
    result = quietly({**made, "model": {**made["model"], "dtype": "bfloat16"}})
    weights = load_file(result.adapter / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert result.metrics["nll"] < 5


# -- how it ends when it must not go on ------------------------------------------------------------------------------


def test_a_changed_recipe_is_refused_by_its_keys(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    train_until(monkeypatch, StopAfter(2), recipe())
    changed = [("training.learning_rate", "0.5"), ("method.coop_weight", "0.25")]
    with pytest.raises(CheckpointError, match=r"method\.coop_weight, training\.learning_rate changed"):
        train(recipe(), changed, progress=False)
    harmless = [("training.keep_checkpoints", "2"), ("training.logging_every", "1"), ("evaluation.bins", "10")]
    assert train(recipe(), harmless, progress=False).steps == 10


def test_a_recipe_that_could_not_be_trained_may_be_corrected(recipe: MakeRecipe) -> None:
    with pytest.raises(ConfigError):
        quietly(recipe(method_options={"target_modules": ["qeury"]}))
    assert quietly(recipe(method_options={"target_modules": ["query"]})).steps == 10


def test_changed_data_are_refused(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = recipe()
    copy = tmp_path / "rows.jsonl"
    copy.write_bytes(Path(made["data"]["task"]).read_bytes())
    made["data"]["task"] = str(copy)
    train_until(monkeypatch, StopAfter(2), made)
    copy.write_text(copy.read_text() + '{"text": "w1", "label": 0}\n')
    with pytest.raises(CheckpointError, match=r"the train rows of .*rows.jsonl changed"):
        quietly(made)


def test_a_run_in_use_is_refused(recipe: MakeRecipe) -> None:
    made = recipe()
    with RunFolder(Path(made["output"])).locked(), pytest.raises(CheckpointError, match="another process"):
        quietly(made)


def test_too_little_memory(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("monteclora.training.loop.Loop.step", refuse)
    with pytest.raises(ConfigError, match=r"a pass over 4 rows does not fit .* Lower training\.micro_batch_size"):
        quietly(recipe(micro_batch_size=4))


def test_divergence_within_a_step(recipe: MakeRecipe) -> None:
    made = recipe(learning_rate=1e30, max_grad_norm=None, warmup_ratio=0.0, save_every=1)
    with pytest.raises(DivergenceError, match="is not finite at step 2") as error:
        quietly(made)
    assert error.value.exit_code == 3
    checkpoint = newest_complete(Path(made["output"]) / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.step == 1
    weights = load_file(checkpoint.path / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_a_posterior_that_is_destroyed_is_divergence_though_every_number_is_finite(
    recipe: MakeRecipe, tmp_path: Path
) -> None:
    """Post-hoc training moves nothing but the posterior, so that validation, at the mean, would look as before."""
    made = recipe(mode="post_hoc", post_hoc={"learning_rate_factor": 1e7}, warmup_ratio=0.0)
    with pytest.raises(DivergenceError, match=r"rho is at its bound of 20 in \d+ of \d+ rows") as error:
        quietly(made)
    assert error.value.exit_code == 3
    output = Path(made["output"])
    checkpoint = newest_complete(output / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.phase == "adapter"
    assert not (output / "adapter").exists()


def test_a_weight_that_overflows_is_never_saved(recipe: MakeRecipe) -> None:
    made = recipe(learning_rate=1e39, max_grad_norm=None, warmup_ratio=0.0, save_every=1)
    with pytest.raises(DivergenceError, match="is not finite after step 1"):
        quietly(made)
    assert newest_complete(Path(made["output"]) / "checkpoints") is None


def test_a_damaged_checkpoint_is_named_and_passed_over(
    recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    quietly(recipe(name="whole", save_every=2))
    train_until(monkeypatch, StopAfter(6), recipe(name="parts", save_every=2))
    folder = tmp_path / "parts/checkpoints"
    weights = folder / "checkpoint-6/adapter_model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    (folder / "checkpoint-4/manifest.json").unlink()
    quietly(recipe(name="parts", save_every=2))
    assert "checkpoint-6" in caplog.text
    assert "checkpoint-4" in caplog.text
    assert adapter_content(tmp_path / "whole") == adapter_content(tmp_path / "parts")
    assert read_checkpoint(folder / "checkpoint-10").complete


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"training": {"best_metric": "perplexity"}}, ConfigError, "best_metric is perplexity"),
        ({"training": {"best_metric": "nll"}, "data": {"validation_fraction": 0}}, ConfigError, "no validation rows"),
        ({"training": {"precision": "fp16"}}, ConfigError, "fp16 needs a CUDA device"),
        ({"model": {"dtype": "bfloat16"}}, ConfigError, "trained in half precision"),
        ({"report_to": ["tensorbord"]}, ConfigError, "tensorbord"),
        ({"data": {"task": "nowhere.csv"}}, DataError, "there is no file nowhere.csv"),
        ({"method": {"target_modules": ["qeury"]}}, ConfigError, "qeury"),
    ],
)
def test_what_cannot_be_trained(
    change: dict[str, Any], error: type[Exception], message: str, recipe: MakeRecipe
) -> None:
    if torch.cuda.is_available() and "fp16" in message:
        pytest.skip("there is one")
    made = recipe()
    for section, values in change.items():
        made[section] = {**made.get(section, {}), **values} if isinstance(values, dict) else values
    with pytest.raises(error, match=message):
        quietly(made)
