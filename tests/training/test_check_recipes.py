"""``monteclora check`` of the bundled recipes, on made-up rows in the schema of the hub's data sets."""

import json

import pytest

from monteclora.data.models import STARTERS as MODELS
from monteclora.runs.bundled import bundled_recipes
from monteclora.runs.recipe import load_recipe
from monteclora.tasks import DataSpec, get_task, list_tasks, load
from monteclora.training import check as module
from monteclora.training.check import check
from tests.tasks.rows import data_folder

AT_HAND = [name for name in bundled_recipes() if load_recipe(name).model.name in MODELS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return data_folder(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", AT_HAND)
def test_bundled_recipes_pass(name, folder, monkeypatch):
    if MODELS[load_recipe(name).model.name].path() is None:
        pytest.skip("the starter model's package is not installed")
    monkeypatch.setenv("MONTECLORA_DATA", str(folder))
    monkeypatch.setattr(module, "_LARGEST_TO_LOAD", 0)  # no step is measured: the shapes are enough
    report = check(name)
    assert len(report.views) == 5
    assert report.sizes.trained == sum(report.trained.values()) > 0
    assert report.memory.total > 0
    assert json.dumps(report.facts())


@pytest.mark.parametrize("task", [task.name for task in list_tasks()])
def test_every_task_is_read_from_a_folder(task, folder):
    """Its training rows, else those it has: five of them have all that their kind needs."""
    found = get_task(task)
    split = "train" if "train" in found.splits else found.splits[0]
    rows = load(DataSpec(task=task, folder=str(folder), validation_fraction=0), splits=[split]).split(split)
    assert len(rows) >= 5
    columns = {"text", "label"} if found.kind == "classification" else {"prompt", "completion"}
    assert columns <= set(rows.column_names)
