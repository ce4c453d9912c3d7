"""Paths lead from the recipe's file, runs work from any directory."""

import json
import os
import shutil
from contextlib import contextmanager

import pytest

import monteclora
from monteclora.cli.app import main
from monteclora.evaluation.prediction import predict_file
from monteclora.evaluation.run import evaluate
from monteclora.runs.determining import differences, recipe_sha256
from monteclora.runs.new_recipe import new_recipe
from monteclora.runs.recipe import Recipe, load_recipe, recipe_content
from monteclora.runs.recipe_paths import PATH_KEYS, absolute, started_in
from monteclora.runs.recipe_reference import recipe_keys
from monteclora.runs.run_folder import RunFolder
from monteclora.studies.plan import make_plan
from monteclora.studies.recipe import load_study
from monteclora.training.run import train
from tests.finished_runs import texts, write_assets, write_rows
from tests.training.conftest import StopAfter

RECIPE = """
model: {name: bert}
data: {train_file: texts-train.jsonl, test_file: [texts-test.jsonl], max_length: 16}
method: {name: lora, r: 4}
training: {max_steps: 2, batch_size: 8}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with a recipe whose paths lead from it."""
    folder = write_assets(tmp_path_factory.mktemp("projects") / "my project")
    (folder / "tiny.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def run(project):
    """A run of it that was started in the recipe's folder."""
    before = os.getcwd()
    os.chdir(project)
    try:
        train("tiny.yaml", progress=False)
    finally:
        os.chdir(before)
    return project / "runs" / "tiny"


def test_paths_lead_from_the_recipes_folder_wherever_the_process_is(project, tmp_path, monkeypatch):
    monkeypatch.chdir(project)
    here = load_recipe("tiny.yaml")
    assert (here.model.name, here.data.train_file) == ("bert", "texts-train.jsonl")  # as it is written: the same run
    monkeypatch.chdir(tmp_path)
    there = load_recipe(project / "tiny.yaml")
    assert there.data.test_file == [str(project / "texts-test.jsonl")]
    assert there.model.name == str(project / "bert")
    assert recipe_content(project / "tiny.yaml")["data"]["train_file"] == there.data.train_file
    monkeypatch.chdir(project.parent)
    assert load_recipe(f"{project.name}/tiny.yaml").data.train_file == f"{project.name}/texts-train.jsonl"


def test_what_is_not_beside_the_recipe_leads_from_the_working_directory(project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    shutil.copy(project / "tiny.yaml", "configs")
    write_rows(tmp_path / "texts-train.jsonl", texts(6, 0))
    assert load_recipe("configs/tiny.yaml").data.train_file == "texts-train.jsonl"
    write_rows(tmp_path / "configs" / "texts-train.jsonl", texts(6, 0))
    assert load_recipe("configs/tiny.yaml").data.train_file == "configs/texts-train.jsonl"
    (tmp_path / "mine").mkdir()
    write_rows(tmp_path / "mine" / "texts-train.jsonl", texts(6, 0))
    changed = load_recipe("configs/tiny.yaml", [("data.train_file", "mine/texts-train.jsonl")])
    assert changed.data.train_file == "mine/texts-train.jsonl"  # of the command line: from here


@pytest.mark.parametrize("key", ["data.train_file", "data.test_file"])
def test_the_home_folder_is_meant_by_its_sign(project, monkeypatch, key):
    monkeypatch.setenv("HOME", str(project))
    recipe = load_recipe(project / "tiny.yaml", [(key, "~/texts-train.jsonl"), ("output", "~/out")])
    assert getattr(recipe.data, key.partition(".")[2]) == str(project / "texts-train.jsonl")
    assert recipe.folder == project / "out"
    assert load_recipe("~/tiny.yaml").name == "tiny"


def test_names_are_no_paths_whatever_files_there_are(tmp_path, monkeypatch):
    for name in ("minilm", "helpdesk", "chatml", "rte"):
        (tmp_path / name).mkdir()
    (tmp_path / "r.yaml").write_text(
        "model: {name: minilm}\ndata: {task: helpdesk, chat_template: chatml}\nmethod: {name: lora}\n"
    )
    recipe = load_recipe(tmp_path / "r.yaml")
    assert (recipe.model.name, recipe.data.task, recipe.data.chat_template) == ("minilm", "helpdesk", "chatml")


def test_every_path_of_the_schema_is_known():
    """A key of whose value the reference says that it is a path, a folder or files."""
    about = {key.name: key.description.lower() for key in recipe_keys()}
    told = {
        key for key, text in about.items() if any(word in text for word in ("the path of", "a folder", "own files"))
    }
    assert told - {"output"} <= set(PATH_KEYS) <= about.keys()
    assert len(told) >= 4


def test_a_run_works_from_any_directory(run, project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = evaluate(run, "test", progress=False)
    assert found.source.rows == 15
    file = write_rows(tmp_path / "in.jsonl", texts(3, 1))
    predicted = predict_file(run, file, tmp_path / "out.jsonl", progress=False)
    assert not any("left out: there is no" in note for note in predicted.notes)
    assert json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])["novelty"] is not None


def test_a_run_works_after_a_move_with_its_data(run, project, tmp_path, monkeypatch):
    moved = shutil.copytree(project, tmp_path / "elsewhere")
    project.rename(project.with_name("gone"))
    try:
        monkeypatch.chdir(tmp_path)
        assert evaluate(moved / "runs" / "tiny", "test", progress=False).source.rows == 15
        assert len(monteclora.load(moved / "runs" / "tiny").predict(["w1"]).labels) == 1
    finally:
        project.with_name("gone").rename(project)


def test_the_same_run_is_gone_on_with_from_another_directory(run, project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(project / "tiny.yaml", [("output", str(run))])
    assert differences(RunFolder(run).recipe, recipe) == []
    assert recipe_sha256(recipe) != RunFolder(run).environment["recipe_sha256"]  # in other words
    assert train(recipe, progress=False).steps == 2  # finished, and known as the same


@pytest.fixture
def places(project, tmp_path):
    """A copy of the project, the folder it is in, and one beside it: where the same command is given from."""
    inside = shutil.copytree(project, tmp_path / "outer" / "project", ignore=shutil.ignore_patterns("runs"))
    beside = tmp_path / "beside"
    beside.mkdir()
    return inside, inside.parent, beside


def command(project, output, *more):
    recipe = os.path.relpath(project / "tiny.yaml")
    return main(["train", recipe, "--output", str(output), "--training.save_every", "1", *more])


def stop_after(monkeypatch, steps):
    @contextmanager
    def signals(acknowledgement):
        yield StopAfter(steps)

    monkeypatch.setattr("monteclora.training.phases.stop_on_signals", signals)


@pytest.mark.parametrize("ensemble", [1, 2])
def test_the_same_command_from_three_directories_leaves_the_run_as_it_is(places, tmp_path, monkeypatch, ensemble):
    """Unfinished and finished; a tracker that is asked for is noted, and the paths keep their words."""
    inside, _, beside = places
    more = [] if ensemble == 1 else ["--ensemble", "2"]
    run, words = tmp_path / "run", None
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        for place in places:
            patch.chdir(place)
            assert command(inside, run, "--training.max_steps", "5", *more) == 130
            words = words or (run / "recipe.yaml").read_text()
            assert (run / "recipe.yaml").read_text() == words
    for place in (*places, inside):
        monkeypatch.chdir(place)
        logging = 3 if place == beside else 7
        arguments = ("--training.max_steps", "5", "--training.logging_every", str(logging), *more)
        assert command(inside, run, *arguments) == 0
        raw = load_recipe(run / "recipe.yaml", places=())
        assert (raw.data.train_file, raw.model.name) == ("texts-train.jsonl", "bert")
        assert raw.training.logging_every == logging


def test_changes_given_elsewhere_lead_from_where_the_run_was_started(places, tmp_path, monkeypatch):
    """One path is changed from another directory and is found from there, the others keep their words."""
    inside, outer, beside = places
    run = tmp_path / "run"
    monkeypatch.chdir(inside)
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        assert command(inside, run) == 130
    write_rows(beside / "more.jsonl", texts(15, 9))
    changes = ("--data.test_file", "[more.jsonl]", "--training.learning_rate", "1e-3")
    monkeypatch.chdir(beside)
    assert command(inside, run, *changes, "--override") == 0
    raw = load_recipe(run / "recipe.yaml", places=())
    assert (raw.data.train_file, raw.data.test_file) == ("texts-train.jsonl", [str(beside / "more.jsonl")])
    for place in places:
        monkeypatch.chdir(place)
        changes = ("--data.test_file", f"[{os.path.relpath(beside / 'more.jsonl')}]", *changes[2:])
        assert command(inside, run, *changes) == 0
        assert RunFolder(run).recipe.training.learning_rate == 1e-3
    monkeypatch.chdir(outer)
    assert evaluate(run, "test", progress=False).source.rows == 15


def test_paths_that_an_earlier_version_wrote_elsewhere_are_mended_from_there(places, tmp_path, monkeypatch):
    inside, outer, beside = places
    run = RunFolder(tmp_path / "run")
    monkeypatch.chdir(inside)
    run.write_environment({"started_in": started_in(run.path)})
    monkeypatch.chdir(outer)
    run.write_recipe(recipe := load_recipe("project/tiny.yaml"))
    assert recipe.data.train_file == "project/texts-train.jsonl"
    run.record_recipe(recipe)
    monkeypatch.chdir(beside)
    assert RunFolder(run.path).recipe.data.train_file == str(inside / "texts-train.jsonl")


def test_an_ensemble_works_after_a_move_with_its_data(places, tmp_path, monkeypatch):
    inside, outer, _ = places
    monkeypatch.chdir(inside)
    assert main(["train", "tiny.yaml", "--ensemble", "2"]) == 0
    monkeypatch.chdir(outer)
    moved = inside.rename(inside.with_name("elsewhere"))
    assert evaluate(moved / "runs" / "tiny", "test", progress=False).source.rows == 15


def test_absolute_paths_keep_names_and_lists(project, monkeypatch):
    monkeypatch.chdir(project)
    found: Recipe = absolute(load_recipe("tiny.yaml"))
    assert found.data.test_file == [str(project / "texts-test.jsonl")]
    assert (found.data.task, found.data.chat_template) == (None, None)


def test_paths_of_a_study_lead_from_its_recipe(project, tmp_path, monkeypatch):
    write_rows(project / "more.jsonl", texts(36, 7))
    (project / "study.yaml").write_text(
        "base: {model: {name: bert}, data: {train_file: texts-train.jsonl, max_length: 16}, method: {name: lora}}\n"
        "set: {data.test_file: texts-test.jsonl}\n"
        "grid: {data.train_file: [texts-train.jsonl, more.jsonl]}\n"
        "arms:\n  a: {set: {method.name: lora, method.r: 2}}\n"
        "  b: {set: {method.name: lora, method.r: 4, data.test_file: more.jsonl}}\n"
    )
    monkeypatch.chdir(tmp_path)
    study = load_study(project / "study.yaml")
    assert study.base["model"]["name"] == str(project / "bert")
    trials = make_plan(study).trials
    files = {(trial.recipe.data.train_file, trial.recipe.data.test_file) for trial in trials}
    names = ("texts-train.jsonl", "more.jsonl")
    expected = {(str(project / a), str(project / b)) for a in names for b in ("texts-test.jsonl", "more.jsonl")}
    assert files == expected


def test_a_new_recipe_in_another_folder_leads_to_its_file(project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    write_rows(tmp_path / "rows.jsonl", texts(60, 0))
    made = new_recipe("rows.jsonl", model=str(project / "bert"), method="lora", folder="recipes")
    (tmp_path / "recipes" / "rows.yaml").write_text(made.text)
    assert "task: ../rows.jsonl" in made.text
    assert load_recipe("recipes/rows.yaml").data.task == "rows.jsonl"
