"""Runs that train the posterior of a plain LoRA adapter from elsewhere."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from monteclora.cli import main
from monteclora.errors import CheckpointError, ConfigError, DataError
from monteclora.evaluation.run import evaluate
from monteclora.runs.run_folder import RunFolder
from monteclora.training.check import check
from tests.training.conftest import Recipe, StopAfter, quietly, train_until
from tests.training.test_checkpoint import assert_same

MakeRecipe = Callable[..., Recipe]
MODELS = {
    "classification": ("bert", AutoModelForSequenceClassification, "SEQ_CLS"),
    "causal_lm": ("llama", AutoModelForCausalLM, "CAUSAL_LM"),
}


def adapter(assets: Path, folder: Path, kind: str = "classification", **options: object) -> Path:
    """As peft alone makes and saves it, with options that are none of the recipe's defaults."""
    name, auto, task = MODELS[kind]
    given = {"r": 3, "lora_alpha": 5, "rank_pattern": {"layers.0.self_attn.q_proj": 2} if kind == "causal_lm" else {}}
    config = peft.LoraConfig(task_type=task, **{**given, **options})
    labels = {"id2label": {0: "a", 1: "b"}} if task == "SEQ_CLS" else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)  # peft draws A, and transformers a head
        model = peft.get_peft_model(auto.from_pretrained(assets / name, **labels), config)
    generator = torch.Generator().manual_seed(7)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


def started(recipe: MakeRecipe, folder: Path, kind: str = "classification", **training: object) -> Recipe:
    post_hoc = {"adapter": str(folder), "max_steps": 5, "epochs": 2}
    made = recipe(kind=kind, mode="post_hoc", post_hoc=post_hoc, **training)
    made["method"] = {"name": "monteclora"}  # r is the adapter's
    return made


@pytest.mark.parametrize("kind", list(MODELS))
def test_the_weights_stay_to_the_bit_and_the_posterior_is_learned(
    kind: str, assets: Path, recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a run that was stopped is resumed to the bit."""
    folder = adapter(assets, tmp_path / "theirs", kind)
    whole = quietly(started(recipe, folder, kind, name="whole"))
    before, after = (load_file(place / "adapter_model.safetensors") for place in (folder, whole.adapter))
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    posterior = load_file(whole.adapter / "posterior.safetensors")
    assert posterior["rho"].abs().max() > 1e-3
    assert (posterior["eta"] - posterior["eta"].mean()).abs().max() > 1e-6  # all equal before training
    assert whole.trained_parameters == posterior["rho"].numel() + posterior["eta"].numel()
    phases = [event["phase"] for event in RunFolder(whole.folder).metrics.read() if event["event"] == "phase"]
    assert phases == ["posterior"]
    assert (whole.recipe.method.r, whole.recipe.method.lora_alpha) == (3, 5)
    parts = started(recipe, folder, kind, name="parts")
    train_until(monkeypatch, StopAfter(2), parts)
    quietly(parts)
    assert_same(whole.folder, tmp_path / "parts")
    # the run no longer needs the folder that it started from
    shutil.rmtree(folder)
    found = evaluate(whole.folder, split="train", num_samples=2)
    assert len(found.rows) > 30


def test_a_run_from_patterns_and_a_fractional_alpha_reads_its_own_recipe(
    assets: Path, recipe: MakeRecipe, tmp_path: Path
) -> None:
    """peft and unsloth write a regular expression as one text."""
    options = {"target_modules": r".*layer\.[01]\.attention\.self\.(query|key)", "exclude_modules": r".*\.1\..*key"}
    folder = adapter(assets, tmp_path / "theirs", lora_alpha=0.5, alpha_pattern={"query": 0.25}, **options)
    run = RunFolder(quietly(started(recipe, folder)).folder)
    method = run.recipe.method
    assert {name: getattr(method, name) for name in options} == options
    assert (method.lora_alpha, method.alpha_pattern, method.modules_to_save) == (0.5, {"query": 0.25}, [])
    adapted = {name for name in load_file(run.adapter / "adapter_model.safetensors") if "lora_A" in name}
    assert len(adapted) == 3
    assert evaluate(run.path, split="train", num_samples=1).rows


def test_an_adapter_that_changed_stops_a_resumption(
    assets: Path, recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = adapter(assets, tmp_path / "theirs")
    made = started(recipe, folder)
    train_until(monkeypatch, StopAfter(2), made)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(CheckpointError, match=r"theirs of training\.post_hoc\.adapter changed since"):
        quietly(made)


def test_what_does_not_fit_is_refused_and_nothing_is_begun(assets: Path, recipe: MakeRecipe, tmp_path: Path) -> None:
    folder = adapter(assets, tmp_path / "theirs")
    made = started(recipe, folder)
    with pytest.raises(ConfigError, match=r"method\.r is 4, and the adapter .*theirs of .* has 3"):
        quietly({**made, "method": {"name": "monteclora", "r": 4}})
    with pytest.raises(ConfigError, match=r"training\.post_hoc\.adapter is given, and training\.mode is cooperative"):
        quietly({**made, "training": {**made["training"], "mode": "cooperative"}})
    with pytest.raises(ConfigError, match="learning_rate is auto"):
        quietly({**made, "training": {**made["training"], "learning_rate": "auto"}})
    with pytest.raises(ConfigError, match="there is no such folder"):
        quietly(started(recipe, tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="use_dora"):
        quietly(started(recipe, adapter(assets, tmp_path / "dora", use_dora=True)))
    with pytest.raises(DataError, match=r"the rows are for CAUSAL_LM, and the adapter .* is one for SEQ_CLS"):
        quietly(started(recipe, folder, "causal_lm"))
    for options, message in (
        ({"lora_alpha": -4}, r"adapter_config\.json: lora_alpha is -4, expected above 0"),
        ({"target_modules": "(.*query"}, r"adapter_config\.json: target_modules is .* no regular expression"),
        ({"alpha_pattern": {"query": "2"}}, r"adapter_config\.json: alpha_pattern\.query: expected"),
    ):
        shutil.copytree(folder, tmp_path / "odd", dirs_exist_ok=True)
        written = json.loads((folder / "adapter_config.json").read_text())
        (tmp_path / "odd" / "adapter_config.json").write_text(json.dumps({**written, **options}))
        with pytest.raises(ConfigError, match=message):
            quietly(started(recipe, tmp_path / "odd"))
    assert not any((tmp_path / "run" / name).exists() for name in ("adapter", "checkpoints"))


def test_a_dry_run_and_the_command_know_of_it(
    assets: Path, recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    made = started(recipe, adapter(assets, tmp_path / "theirs"))
    assert [phase.name for phase in check(made).phases] == ["posterior"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(made))
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    said = capsys.readouterr()
    assert "rho and eta alone are trained" in said.err
    assert RunFolder(Path(made["output"])).environment["start"]["adapter"] == str(tmp_path / "theirs")
    assert main(["report", made["output"]]) == 0
