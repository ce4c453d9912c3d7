import json
import re
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

import monteclora
from monteclora.errors import CheckpointError, ConfigError, ServerError
from monteclora.evaluation.calibrate import calibrate
from monteclora.evaluation.run import evaluate
from monteclora.runs.adapter_folder import FACTS_FILE
from monteclora.runs.loading import load_run
from monteclora.tasks import DataSpec
from tests.finished_runs import LABELS, texts, tiny_recipe

TEXTS = [row["text"] for row in texts(5, seed=4)]


@pytest.fixture(scope="module")
def published(trained, assets, tmp_path_factory):
    """The exported adapter of an evaluated run, whose base model is at hand as ``owner/base``."""
    folder = tmp_path_factory.mktemp("published")
    run = shutil.copytree(trained["texts"], folder / "run")
    evaluate(run, "test", progress=False)
    return monteclora.export_adapter(run, folder / "out", "owner/tickets")


def logits(model, tokenizer):
    with torch.no_grad():
        return model(**tokenizer(TEXTS, return_tensors="pt", padding=True)).logits


def test_the_cards_own_lines_load_it_with_peft_alone_and_give_the_runs_logits(published, trained, assets):
    text = (published / "README.md").read_text()
    base = ModelCard.load(published / "README.md").data.base_model
    code = re.search("```python\n(.*?)```", text, re.DOTALL)[1]
    assert "monteclora" not in code
    names = {}
    exec(code.replace(f'"{base}"', repr(str(assets / "bert"))).replace('"owner/tickets"', repr(str(published))), names)
    loaded = load_run(trained["texts"])
    torch.testing.assert_close(logits(names["model"], names["tokenizer"]), logits(loaded.model, loaded.tokenizer))
    assert tuple(names["model"].config.id2label.values()) == LABELS


def test_the_card_has_data_metrics_and_calibration_and_no_path_of_the_machine(published, assets):
    card = ModelCard.load(published / "README.md")
    stored = json.loads((published.parent / "run" / "evaluation.json").read_text())["splits"]["test"]["adapter"]
    found = {each.metric_type: each.metric_value for each in card.data.eval_results}
    assert found["nll"] == pytest.approx(stored["posterior"]["nll"], abs=1e-6)
    for value in (stored["point"]["accuracy"], stored["posterior"]["nll"], stored["calibration"]["smooth"]):
        assert f"{value:.4f}" in card.text
    assert "| train | 33 |" in card.text
    assert all(f"`{label}`" in card.text for label in LABELS)
    for file in published.iterdir():
        if file.suffix != ".safetensors":
            assert str(assets.parent) not in file.read_text()


def test_load_restores_labels_and_draws_and_takes_the_base_that_is_named(published, trained, assets):
    with pytest.raises(ConfigError, match=r"names a base model that can be found.*monteclora\.load\(folder, base="):
        monteclora.load(published)
    model = monteclora.load(published, base=str(assets / "bert"))
    found, expected = model.predict(TEXTS, seed=2), monteclora.load(trained["texts"]).predict(TEXTS, seed=2)
    assert (found.labels, found.confidence, found.epistemic) == (
        expected.labels,
        pytest.approx(expected.confidence),
        pytest.approx(expected.epistemic),
    )
    assert "does not say which rows it was trained on" in found.notes[0]


@pytest.mark.parametrize("where", [FACTS_FILE, "adapter_config.json", "README.md"])
def test_the_base_is_found_in_each_file(published, assets, tmp_path, where):
    folder = shutil.copytree(published, tmp_path / "adapter")
    base = str(assets / "bert")
    if where == "README.md":
        card = ModelCard.load(folder / where)
        card.data.base_model = base
        card.save(folder / where)
    else:
        key = "base" if where == FACTS_FILE else "base_model_name_or_path"
        (folder / where).write_text(json.dumps({**json.loads((folder / where).read_text()), key: base}))
    assert monteclora.load(folder).notes == (f"the base model is {base}, as {where} says",)


@pytest.mark.parametrize("named", [True, False])
def test_without_facts_labels_are_those_of_the_posterior_or_numbers(published, assets, tmp_path, named):
    folder = shutil.copytree(published, tmp_path / "adapter")
    (folder / FACTS_FILE).unlink()
    if not named:
        (folder / "posterior.safetensors").unlink()
    model = monteclora.load(folder, base=str(assets / "bert"))
    assert model.run.label_names == (LABELS if named else ("LABEL_0", "LABEL_1", "LABEL_2"))
    assert any("names the labels" in note for note in model.notes) != named
    assert set(model.predict(TEXTS).labels) <= set(model.run.label_names)
    pairs = model.predict([(text, text) for text in TEXTS])  # nobody wrote down whether it reads pairs
    assert len(pairs.labels) == 5


def test_a_damaged_fact_is_named(published, tmp_path, assets):
    folder = shutil.copytree(published, tmp_path / "adapter")
    facts = json.loads((folder / FACTS_FILE).read_text())
    (folder / FACTS_FILE).write_text(json.dumps({**facts, "label_names": None}))
    with pytest.raises(CheckpointError, match=rf"{FACTS_FILE} is damaged"):
        monteclora.load(folder, base=str(assets / "bert"))


def test_the_adapter_folder_of_a_run_is_the_run(trained):
    model = monteclora.load(trained["lora"] / "adapter")
    assert model.run.label_names == LABELS
    assert "is the adapter of the run" in model.notes[0]
    with pytest.raises(ConfigError, match="is no adapter without a run"):
        monteclora.load(trained["lora"], base="minilm")


def test_a_language_model_is_loaded_from_its_adapter(trained, assets, tmp_path):
    folder = monteclora.export_adapter(trained["pairs"], tmp_path / "out")
    model = monteclora.load(folder, base=str(assets / "llama"))
    prompts = ["w1 w2", "w3 w4 w5"]
    found = model.predict(prompts, max_new_tokens=3, seed=1)
    expected = monteclora.load(trained["pairs"]).predict(prompts, max_new_tokens=3, seed=1)
    assert (found.labels, found.total) == (expected.labels, pytest.approx(expected.total))


class FakeApi:
    """Of the hub's client what is used, as huggingface_hub has it."""

    def __init__(self, token=None, library_name=None):
        self.calls = []
        FakeApi.made = self

    def create_repo(self, repo_id, *, private=None, exist_ok=False):
        self.calls.append(("create_repo", repo_id, private, exist_ok))
        return SimpleNamespace(repo_id=repo_id, __str__=lambda: repo_id)

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        from pathlib import Path

        self.calls.append(("upload_folder", repo_id, sorted(path.name for path in Path(folder_path).iterdir())))


def test_push_makes_the_repository_and_sends_the_folder(trained, monkeypatch):
    for name in ("create_repo", "upload_folder"):  # the client has what is asked of the fake
        asked, real = vars(FakeApi)[name].__code__, getattr(huggingface_hub.HfApi, name)
        import inspect

        assert set(asked.co_varnames[: asked.co_argcount + asked.co_kwonlyargcount]) <= {
            *inspect.signature(real).parameters
        }
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monteclora.push_to_hub(trained["texts"], "owner/tickets", private=True)
    (made, sent) = FakeApi.made.calls
    assert made == ("create_repo", "owner/tickets", True, True)
    expected = {"README.md", "adapter_config.json", "adapter_model.safetensors", "monteclora.json", "tokenizer.json"}
    assert sent[:2] == ("upload_folder", "owner/tickets")
    assert expected | {"posterior.safetensors", "tokenizer_config.json"} == set(sent[2])


@pytest.mark.parametrize("error", [OfflineModeIsEnabled("no network"), PermissionError("no token")])
def test_what_the_hub_refuses_is_one_line(trained, monkeypatch, error):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(FakeApi, "create_repo", refuse)
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    with pytest.raises(ServerError, match=r"owner/tickets cannot be written to the hub .*hf auth login"):
        monteclora.push_to_hub(trained["texts"], "owner/tickets")
    assert issubclass(HfHubHTTPError, OSError)


@pytest.mark.parametrize("name", ["tickets", "a/b/c", "owner/name:config", "../x"])
def test_what_is_no_repository_is_refused_before_anything_is_written(name):
    with pytest.raises(ConfigError, match="is no owner/name"):
        monteclora.push_to_hub("no-such-run", name)


def test_a_full_model_is_published_as_one(assets, tmp_path):
    from transformers import AutoModelForSequenceClassification

    from monteclora.training.run import train

    recipe = tiny_recipe(assets, tmp_path / "run")
    recipe["method"], recipe["training"]["max_steps"] = {"name": "full"}, 1
    train(recipe, progress=False)
    folder = monteclora.export_adapter(tmp_path / "run", tmp_path / "out")
    assert "With transformers alone" in (folder / "README.md").read_text()
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    loaded = load_run(tmp_path / "run")
    torch.testing.assert_close(logits(model, loaded.tokenizer), logits(loaded.model, loaded.tokenizer))


def from_elsewhere(trained, folder):
    """An adapter as others publish one: a tokenizer with templates, and files that are none of an adapter."""
    shutil.copytree(trained["lora"] / "adapter", folder)
    tokenizer = load_run(trained["lora"]).tokenizer
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ messages[0] }}"}
    tokenizer.save_pretrained(str(folder))
    (folder / "special_tokens_map.json").write_text("{}")
    (folder / "added_tokens.json").write_text("{}")
    (folder / "spiece.model").write_bytes(b"")
    expected = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    (folder / "optimizer.pt").write_bytes(b"")
    (folder / "trainer_state.json").write_text("{}")
    return expected


def test_of_an_adapter_on_the_hub_all_that_belongs_to_it_is_fetched(trained, assets, tmp_path, monkeypatch):
    expected = from_elsewhere(trained, tmp_path / "hub")

    def snapshot_download(name, *, allow_patterns):
        files = [str(path.relative_to(tmp_path / "hub")) for path in (tmp_path / "hub").rglob("*") if path.is_file()]
        for file in huggingface_hub.utils.filter_repo_objects(files, allow_patterns=allow_patterns):
            (tmp_path / "cache" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(tmp_path / "hub" / file, tmp_path / "cache" / file)
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model = monteclora.load("owner/tickets", base=str(assets / "bert"))
    fetched = sorted(str(path.relative_to(tmp_path / "cache")) for path in (tmp_path / "cache").rglob("*.*"))
    assert fetched == expected
    assert model.run.tokenizer.chat_template == {"default": "{{ messages }}", "tool_use": "{{ messages[0] }}"}


def test_an_adapter_from_elsewhere_is_published_without_its_run_and_no_training_is_claimed(trained, assets, tmp_path):
    folder = tmp_path / "theirs"
    expected = from_elsewhere(trained, folder)
    rows = DataSpec(validation_file=str(assets / "texts-test.jsonl"), max_length=16)
    calibrate(folder, base=str(assets / "bert"), data=rows, progress=False)
    evaluate(folder, "validation", progress=False)
    assert {"evaluation.json", "calibration.json", "recipe.yaml"} <= {path.name for path in folder.iterdir()}
    out = monteclora.export_adapter(folder, tmp_path / "out")
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert found == {*expected, "posterior.safetensors", FACTS_FILE, "README.md"}
    card = (out / "README.md").read_text()
    assert "that was trained elsewhere. monteclora" in card
    assert "`posterior.safetensors` holds the posterior" in card
    assert not any(claim in card for claim in ("## Training", "training.learning_rate", "fine-tuned on"))
    assert "## Metrics" in card
