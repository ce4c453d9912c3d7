"""``monteclora train`` on a run that was started with another recipe."""

import json
import shutil

import pytest
import yaml

from monteclora.cli import main
from monteclora.config import dump
from monteclora.evaluation.verdict import Verdict
from monteclora.runs.recipe import load_recipe
from monteclora.runs.run_folder import RunFolder
from tests.finished_runs import tiny_recipe

FASTER = ("--training.learning_rate", "0.5")


@pytest.fixture
def begun(assets, trained, tmp_path):
    """A recipe, and its run with the last checkpoint and without the last line."""
    run = shutil.copytree(trained["texts"], tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump(load_recipe(tiny_recipe(assets, run))))
    return str(recipe), RunFolder(run)


@pytest.mark.parametrize(
    "words", [("--override", *FASTER), (*FASTER, "--override"), ("--override", FASTER[0] + "=0.5")]
)
def test_override_stands_anywhere(words, begun, capfd):
    recipe, run = begun
    assert main(["train", recipe, *FASTER]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "started with another recipe: training.learning_rate changed" in line
    assert "--override" in line
    assert main(["train", recipe, *words]) == 0
    out, err = capfd.readouterr()
    assert "trained" in out
    assert "note: went on from step 6 with training.learning_rate 0.02 -> 0.5" in err
    assert run.recipe.training.learning_rate == 0.5
    assert run.finished is not None


def test_the_verdict_of_an_ensemble_is_said_to_be_a_member_s(assets, tmp_path, capsys):
    recipe = {**tiny_recipe(assets, tmp_path / "run", method="lora"), "ensemble": 2}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    assert main(["train", str(file)]) == 0
    assert "verdict on seed-0" in capsys.readouterr().out
    assert main(["train", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["adapter"] is None
    assert len(found["members"]) == 2


def test_where_the_model_was_sharded_it_is_not_loaded_whole(begun, monkeypatch, capsys):
    recipe, run = begun
    asked = []

    def noted(folder, *, baseline):
        asked.append(baseline)
        return Verdict((), ())

    monkeypatch.setattr("monteclora.evaluation.verdict.verdict", noted)
    assert main(["train", recipe]) == 0
    monkeypatch.setattr("monteclora.training.sharding.is_requested", lambda: True)
    monkeypatch.setattr("monteclora.training.sharding.check_launch", lambda *_: None)
    assert main(["train", recipe]) == 0  # finished: nothing to train
    assert asked == [True, False]
    assert run.finished is not None
