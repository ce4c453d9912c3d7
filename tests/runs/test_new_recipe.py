"""Recipes for one's own files: what they say is what is in the file, and they load."""

from __future__ import annotations

import csv
import dataclasses
import json
import random
from pathlib import Path

import pytest

from monteclora.cli import main
from monteclora.errors import ConfigError, DataError
from monteclora.methods import list_methods
from monteclora.runs.new_recipe import new_recipe
from monteclora.runs.recipe import Recipe, load_recipe
from monteclora.tasks import DataSpec, TaskData, load

TEAMS = ("billing", "login", "shipping")


def teams(path: Path, rows: int, columns: tuple[str, ...] = ("message", "team")) -> Path:
    chosen = random.Random(0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for number in range(rows):
            team = TEAMS[number % 3]
            message = f"please help me with the {team} of order {number} {' '.join(chosen.choices('abcdef', k=4))}"
            writer.writerow([message, team, chosen.randrange(10**6)][: len(columns)])
    return path


def loaded(text: str, tmp_path: Path) -> Recipe:
    file = tmp_path / "made.yaml"
    file.write_text(text)
    return load_recipe(file)


def test_columns_that_their_names_do_not_tell_are_guessed_and_said(tmp_path: Path) -> None:
    file = teams(tmp_path / "teams.csv", 300, ("message", "team", "customer"))
    made = new_recipe(file)
    recipe = loaded(made.text, tmp_path)
    assert recipe.data.text_columns == ["message"]
    assert recipe.data.label_column == "team"
    assert "guessed from what they hold: message is the text, team the label" in made.notes
    assert "# labels: billing, login, shipping" in made.text
    assert recipe.model.name == "minilm"
    assert recipe.method.modules_to_save == ["pooler"]  # type: ignore[attr-defined]
    assert (recipe.training.best_metric, recipe.training.temperature) == ("tempered_nll", True)
    assert (recipe.training.learning_rate, recipe.training.back_off) == ("auto", 2)
    assert recipe.data.max_length == 32  # 20-odd tokens a row
    assert recipe.evaluation.layers == 1


def test_settings_follow_the_number_of_rows(tmp_path: Path) -> None:
    few = loaded(new_recipe(teams(tmp_path / "few.csv", 60)).text, tmp_path)
    many = loaded(new_recipe(teams(tmp_path / "many.csv", 3000)).text, tmp_path)
    assert (few.training.epochs, many.training.epochs) == (30, 3)
    assert few.training.batch_size == many.training.batch_size == 8
    assert (few.training.eval_every, many.training.eval_every) == (None, 43)  # of 1,013 steps
    assert (few.data.validation_fraction, many.data.validation_fraction) == (0.2, 0.1)


def test_named_columns_and_another_model_and_method(tmp_path: Path) -> None:
    file = teams(tmp_path / "two.csv", 60, ("team", "message"))  # contents the other way round
    recipe = loaded(new_recipe(file, text=["team"], label="message", method="lora").text, tmp_path)
    assert (recipe.data.text_columns, recipe.data.label_column, recipe.method.name) == (["team"], "message", "lora")
    assert recipe.evaluation.layers is None


@pytest.mark.parametrize("method", [method.name for method in list_methods()])
def test_every_method_has_what_it_can_take(method: str, tmp_path: Path) -> None:
    made = loaded(new_recipe(teams(tmp_path / "teams.csv", 60), method=method).text, tmp_path)
    options = dataclasses.asdict(made.method)
    assert (options["name"], made.training.learning_rate) == (method, "auto")
    assert options.get("modules_to_save", ["pooler"]) == ["pooler"]
    assert (options.get("target_modules") == "all-linear") == ("lora_alpha" in options)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        "".join(json.dumps({"prompt": f"Name {n}?", "completion": f"It is {n}."}) + "\n" for n in range(40))
    )
    made = loaded(new_recipe(pairs, method=method).text, tmp_path)
    # the rates that are known are those of low-rank updates
    assert made.training.learning_rate == (0.001 if "lora_alpha" in options else "auto")


def test_prompts_with_completions_get_a_language_model(tmp_path: Path) -> None:
    rows = [{"prompt": f"Name {n}?", "completion": f"It is {n}."} for n in range(40)]
    file = tmp_path / "qa.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = loaded(new_recipe(file).text, tmp_path)
    assert recipe.model.name == "smollm2"
    assert (recipe.data.prompt_column, recipe.data.completion_column) == ("prompt", "completion")
    assert recipe.training.learning_rate == 0.001
    assert (recipe.training.best_metric, recipe.training.temperature) == ("nll", False)


def test_what_cannot_be_told_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "two-labels.csv"
    lines = [f"some longer text number {n},{'ab'[n % 2]},{'cd'[n % 2]}" for n in range(30)]
    file.write_text("words,first,second\n" + "\n".join(lines) + "\n")
    with pytest.raises(DataError, match="cannot tell which columns"):
        new_recipe(file)
    with pytest.raises(ConfigError, match="there is no method"):
        new_recipe(teams(tmp_path / "teams.csv", 60), method="magic")


def test_hints_name_options_and_no_keys_of_a_recipe_that_is_not_there_yet(tmp_path: Path) -> None:
    file = tmp_path / "odd.csv"
    file.write_text("one,two\n" + "".join(f"{n},{n + 1}\n" for n in range(30)))
    for named in ({}, {"text": ["words"], "label": "two"}):
        with pytest.raises(DataError) as caught:
            new_recipe(file, **named)
        assert caught.value.hint.startswith("Name the columns of texts and labels with --text and --label; for scores")
        assert "data.text_columns" not in str(caught.value)


def test_scores_and_several_labels_need_a_recipe_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = tmp_path / "scores.csv"
    scores.write_text("text,mark\n" + "".join(f"some longer text {n},{n * 0.37:.2f}\n" for n in range(60)))
    several = tmp_path / "several.jsonl"
    rows = [{"text": f"some longer text {n}", "label": ["a", "bc"[n % 2]]} for n in range(60)]
    several.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for file, label in ((scores, "mark"), (several, "label")):
        with pytest.raises(DataError, match=r"write a recipe by hand, with data\.kind") as caught:
            new_recipe(file, text=["text"], label=label)
        assert "data.label_names" not in caught.value.hint

    def regression(spec: DataSpec) -> TaskData:  # as a task with a name may be
        return load(dataclasses.replace(spec, kind="regression"))

    monkeypatch.setattr("monteclora.runs.new_recipe.load", regression)
    with pytest.raises(ConfigError, match="holds scores, for which no recipe is made"):
        new_recipe(scores, text=["text"], label="mark", model="minilm")


def test_a_pattern_stands_for_several_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = tmp_path / "tickets"
    parts.mkdir()
    head, *lines = teams(tmp_path / "whole.csv", 180, ("message", "team", "customer")).read_text().splitlines()
    for number in range(3):
        (parts / f"part-{number}.csv").write_text("\n".join([head, *lines[60 * number : 60 * (number + 1)]]) + "\n")
    made = new_recipe(parts / "part-*.csv")
    recipe = loaded(made.text, tmp_path)
    assert recipe.data.task == str(parts / "part-*.csv")
    assert "guessed from what they hold: message is the text, team the label" in made.notes
    assert "classification, 144 train, 36 validation rows" in made.text  # 180, of which a fifth are set aside
    monkeypatch.chdir(tmp_path)
    for pattern, name in (("part-*.csv", "part"), ("*.csv", "tickets")):
        assert main(["new", str(parts / pattern)]) == 0
        assert f"recipe: {name}.yaml" in capsys.readouterr().out
        assert load_recipe(tmp_path / f"{name}.yaml").name == name


def test_a_file_of_the_home_is_found_from_any_folder_and_a_missing_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "A"
    for folder in (home, elsewhere):
        folder.mkdir()
    file = teams(home / "teams.csv", 60)
    monkeypatch.setenv("HOME", str(home))
    recipe = loaded(new_recipe("~/teams.csv", folder=elsewhere).text, elsewhere)
    assert recipe.data.task == str(file)
    assert new_recipe("~/teams.csv", folder="~").text == new_recipe(file, folder=home).text
    with pytest.raises(ConfigError, match=r"there is no folder .*nowhere"):
        new_recipe(file, folder=tmp_path / "nowhere")
