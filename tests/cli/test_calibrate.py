import json
import shutil

import pytest

from monteclora.cli import main
from monteclora.training.run import train
from tests.finished_runs import tiny_recipe


@pytest.fixture(scope="module")
def validated(assets, tmp_path_factory):
    """A run with a dozen validation rows."""
    recipe = tiny_recipe(assets, tmp_path_factory.mktemp("validated") / "run")
    recipe["data"]["validation_fraction"] = 0.34
    return train(recipe, progress=False).folder


@pytest.fixture
def run(validated, tmp_path):
    return shutil.copytree(validated, tmp_path / "run")


def test_the_scale_and_the_temperature_are_shown_stored_and_used(run, capsys):
    assert main(["calibrate", str(run), "--temperature", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    stored = json.loads((run / "calibration.json").read_text())
    assert facts["factor"] == stored["posterior_scale"]["factor"]
    fit = stored["calibrators"]["temperature/posterior/3 draws/seed 0"]
    assert fit["state"]["temperature"] == facts["temperature"]
    assert fit["rows"] == facts["fit_rows"]
    assert main(["evaluate", str(run), "--calibrator", "temperature"]) == 0
    said = capsys.readouterr()
    assert f"temperature {facts['temperature']:.3f}, fitted to {fit['rows']} validation rows" in said.out + said.err


def test_the_table_has_a_line_for_each_scale_and_stage(run, capsys):
    assert main(["calibrate", str(run), "--temperature"]) == 0
    said = capsys.readouterr()
    for stage in ("mean", "trained", "calibrated", "calibrated + temperature"):
        assert any(line.strip().startswith(stage) for line in said.out.splitlines())
    assert "rows that the fit did not use" in said.out
    assert "--calibrator temperature" in said.out + said.err


def test_undo_is_said_once_and_goes_with_nothing_else(run, capsys):
    before = (run / "adapter" / "posterior.safetensors").read_bytes()
    assert main(["calibrate", str(run)]) == 0
    assert main(["calibrate", str(run), "--undo"]) == 0
    assert "the scale of training is back" in capsys.readouterr().out
    assert (run / "adapter" / "posterior.safetensors").read_bytes() == before
    assert main(["calibrate", str(run), "--undo"]) == 0
    assert "there was nothing to undo" in capsys.readouterr().out
    options = (
        ["--temperature"],
        ["--tolerance", "0.1"],
        ["--num-samples", "2"],
        ["--batch-size", "2"],
        ["--seed", "1"],
    )
    for option in options:
        assert main(["calibrate", str(run), "--undo", *option]) == 2
        assert f"--undo and {option[0]} are both given" in capsys.readouterr().err


def test_a_plain_adapter_is_calibrated_used_and_left_as_it_was(trained, assets, capsys, tmp_path):
    adapter = shutil.copytree(trained["lora"] / "adapter", tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    base, file = str(assets / "bert"), str(assets / "texts-test.jsonl")
    assert main(["evaluate", str(adapter)]) == 2
    assert "monteclora calibrate" in capsys.readouterr().err
    given = ["--base", base, "--data", file, "--max-length", "16", "--num-samples", "3", "--rows", "isotropic"]
    assert main(["calibrate", str(adapter), *given]) == 0
    said = capsys.readouterr()
    assert "trained" not in said.out
    assert "order apple, berry, cherry" in said.err
    assert main(["evaluate", str(adapter), "--num-samples", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["posterior"]
    assert main(["predict", str(adapter), file, "--out", str(tmp_path / "found.jsonl")]) == 0
    assert main(["export", str(adapter), "--format", "samples", "--num-samples", "2"]) == 0
    assert main(["calibrate", str(adapter), "--undo"]) == 0
    after = {path.name: path.read_bytes() for path in adapter.iterdir() if path.name in before}
    assert after == before
    assert not {"posterior.safetensors", "recipe.yaml", "environment.json"} & {p.name for p in adapter.iterdir()}


def test_what_an_adapter_needs_is_said_and_nothing_is_left(trained, assets, capsys, tmp_path):
    adapter = shutil.copytree(trained["lora"] / "adapter", tmp_path / "adapter")
    before = sorted(path.name for path in adapter.iterdir())
    base, file = str(assets / "bert"), str(assets / "texts-test.jsonl")
    wrong = {
        "no labelled rows are given": [],
        "are for CAUSAL_LM, and the adapter": ["--data", str(assets / "pairs-test.jsonl"), "--base", base],
        "has a head of 3 labels": ["--data", file, "--base", base, "--label-names", "apple,berry,cherry,damson"],
        "there is no model at": ["--data", file, "--base", str(tmp_path / "none")],
        "--max-length is given without --data": ["--max-length", "5"],
    }
    for message, arguments in wrong.items():
        assert main(["calibrate", str(adapter), *arguments]) == 2
        assert message in capsys.readouterr().err
        assert sorted(path.name for path in adapter.iterdir()) == before


@pytest.mark.parametrize("size", ["0", "-1"])
def test_a_batch_of_no_rows_is_refused_before_anything_is_stored(run, capsys, size):
    before = (run / "adapter" / "posterior.safetensors").read_bytes()
    assert main(["calibrate", str(run), "--batch-size", size]) == 2
    assert f"batch_size is {size}, expected at least 1" in capsys.readouterr().err
    assert (run / "adapter" / "posterior.safetensors").read_bytes() == before
