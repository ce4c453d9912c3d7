"""``monteclora check`` of the bundled recipes without a network, on made-up rows in the schema of the hub's data."""

import json

import pytest

from monteclora.cli import main
from monteclora.data.models import STARTERS as MODELS
from monteclora.data.sources import DATA_FOLDER_VARIABLE
from monteclora.errors import ConfigError, NotAtHandError
from monteclora.methods import list_methods
from monteclora.runs.bundled import bundled_recipes
from monteclora.runs.recipe import load_recipe
from monteclora.tasks import DataSpec, get_task, list_tasks, load
from monteclora.training import check as module
from monteclora.training.check import check
from tests.tasks.rows import data_folder

RECIPES = sorted(bundled_recipes())
METHODS = [method.name for method in list_methods() if type(method).__module__.startswith("monteclora.")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return data_folder(tmp_path_factory.mktemp("data"), 120)


@pytest.fixture(autouse=True)
def offline(folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv(DATA_FOLDER_VARIABLE, str(folder))
    monkeypatch.setattr(module, "_LARGEST_TO_LOAD", 0)  # no step is measured: the shapes are enough


def needs_model(name):
    model = load_recipe(name).model.name
    if model in MODELS and MODELS[model].path() is None:
        pytest.skip("the starter model's package is not installed")


def assert_passes(name, *overrides):
    report = check(name, overrides)
    assert len(report.views) == 5
    assert report.sizes.trained == sum(report.trained.values()) > 0
    assert report.memory.total > 0
    assert report.steps > 0
    assert 0 < report.least_seconds < float("inf")
    assert json.dumps(report.facts())
    return report


@pytest.mark.parametrize("name", RECIPES)
def test_bundled_recipes_pass(name):
    needs_model(name)
    report = assert_passes(name)
    published = report.recipe.model.name not in MODELS
    assert report.tokens_estimated == published
    assert any("is not available: lengths are estimated" in note for note in report.notes) == published


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_bundled_recipes_pass_with_every_method(name):
    needs_model(name)
    for method in METHODS:
        assert_passes(name, ("method.name", method))


# counted by hand in tests/methods/test_counts.py
@pytest.mark.parametrize(
    ("name", "trained"), [("paper-mrpc", 1_919_234), ("paper-commonsense", 25_165_824), ("paper-gsm8k", 12_845_056)]
)
def test_parameters_are_counted_without_rows(name, trained, tmp_path, monkeypatch, capsys):
    with_rows = check(name, [("method.name", "lora")])
    monkeypatch.setenv(DATA_FOLDER_VARIABLE, str(tmp_path))
    report = check(name, [("method.name", "lora")])
    assert report.sizes.trained == with_rows.sizes.trained == trained
    assert report.memory.weights == with_rows.memory.weights
    assert report.memory.activations >= with_rows.memory.activations  # of rows as long as they may be
    assert (report.rows, report.tokens, report.phases, report.operations, report.views) == ({}, None, (), None, ())
    (note,) = report.notes
    assert f"{report.recipe.data.task} is not available" in note
    assert "MONTECLORA_DATA" in note
    assert main(["check", name, "--method.name", "lora"]) == 0
    shown = capsys.readouterr().out
    assert f"{trained:,} trained" in shown
    assert "for rows of full length" in shown


def test_what_is_not_known_is_an_error(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"a {i}", "label": "xy"[i % 2]}) + "\n" for i in range(20)))
    recipe = {"name": "own", "model": {"name": "some/model"}, "data": {"task": str(rows)}, "method": {"name": "lora"}}
    with pytest.raises(NotAtHandError, match="cannot load the model some/model"):
        check(recipe)
    recipe["model"]["name"] = "FacebookAI/roberta-base"
    assert_passes(recipe)
    with pytest.raises(NotAtHandError, match="hub"):
        check({**recipe, "data": {"task": "some/data"}})
    with pytest.raises(ConfigError, match="takes 20 of the 512 positions"):
        check({**recipe, "method": {"name": "prompt_tuning"}, "data": {"task": str(rows), "max_length": 500}})


@pytest.mark.parametrize("task", [task.name for task in list_tasks()])
def test_every_task_is_read_from_a_folder(task, folder):
    """Its training rows, else those it has: five of them have all that their kind needs."""
    found = get_task(task)
    split = "train" if "train" in found.splits else found.splits[0]
    rows = load(DataSpec(task=task, folder=str(folder), validation_fraction=0), splits=[split]).split(split)
    assert len(rows) >= 5
    columns = {"text", "label"} if found.kind == "classification" else {"prompt", "completion"}
    assert columns <= set(rows.column_names)
