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


def test_a_run_without_a_posterior_ends_in_one_line(trained, capsys):
    assert main(["calibrate", str(trained["lora"])]) == 2
    assert "has no posterior to scale" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["0", "-1"])
def test_a_batch_of_no_rows_is_refused_before_anything_is_stored(run, capsys, size):
    before = (run / "adapter" / "posterior.safetensors").read_bytes()
    assert main(["calibrate", str(run), "--batch-size", size]) == 2
    assert f"batch_size is {size}, expected at least 1" in capsys.readouterr().err
    assert (run / "adapter" / "posterior.safetensors").read_bytes() == before
