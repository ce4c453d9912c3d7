import json

import pytest

from monteclora.cli import demo as demo_module
from monteclora.cli import main
from monteclora.cli.demo_report import contend
from monteclora.config import dump
from monteclora.data.models import STARTERS
from monteclora.runs.recipe import load_recipe
from monteclora.tasks.helpdesk import ambiguous, out_of_scope
from monteclora.training.run import train

METRICS = ("accuracy", "nll", "ece", "auroc_out_of_scope", "seconds", "peak_memory_bytes")


@pytest.fixture
def shortened(monkeypatch, tmp_path):
    """Gives the demo its own recipes for a few steps on few rows, in an empty folder."""

    def shorten(*changes):
        short = [
            ("training.max_steps", "4"),
            ("training.batch_size", "4"),
            ("data.train_rows", "40"),
            ("data.validation_rows", "24"),
            ("evaluation.num_samples", "2"),
        ]
        for name, recipe in demo_module.RECIPES.items():
            path = tmp_path / f"{recipe}.yaml"
            path.write_text(dump(load_recipe(recipe, [*short, *changes])))
            monkeypatch.setitem(demo_module.RECIPES, name, str(path))
        monkeypatch.chdir(tmp_path)
        return tmp_path

    return shorten


def test_both_recipes_differ_in_the_method_alone():
    """Same budget, seed, learning rate, data and adapted layers: else the comparison says nothing."""
    lora, bayesian = (load_recipe(recipe) for recipe in demo_module.RECIPES.values())
    assert (lora.method.name, bayesian.method.name) == ("lora", "monteclora")
    for part in ("model", "data", "training", "evaluation", "seed"):
        assert getattr(lora, part) == getattr(bayesian, part)
    shared = [name for name in vars(lora.method) if name != "name"]
    assert {name: getattr(lora.method, name) for name in shared} == {
        name: getattr(bayesian.method, name) for name in shared
    }


def test_the_demo_compares_writes_a_page_and_keeps_what_is_finished(shortened, assets, capfd):
    folder = shortened(("model.name", str(assets / "bert")), ("data.max_length", "24"))
    assert main(["demo", "--json", "--seed", "5"]) == 0
    first = json.loads(capfd.readouterr().out)
    assert [run["method"] for run in first["runs"]] == ["LoRA", "MonteCLoRA"]
    for run in first["runs"]:
        assert all(run[metric] >= 0 for metric in METRICS)
        assert (folder / run["folder"] / "evaluation.json").is_file()
    page = (folder / "demo" / "report.html").read_text()
    assert first["report"] == "demo/report.html"
    for part in ("Calibration", "Uncertainty", "out of scope", "ambiguous", "monteclora demo --out demo --seed 5"):
        assert part in page

    assert main(["demo", "--seed", "5"]) == 0
    out, err = capfd.readouterr()
    assert "report: demo/report.html" in out
    assert " ".join(err.split()).count("is finished: nothing to train") == 2
    for run in first["runs"]:
        assert f"{run['accuracy']:.3f}" in out

    assert main(["demo", "--seed", "6"]) == 2
    assert "seed changed" in capfd.readouterr().err


def test_the_page_counts_what_no_intent_fits_and_what_two_do(shortened, assets):
    shortened(("model.name", str(assets / "bert")), ("data.max_length", "24"))
    found = contend("MonteCLoRA", train(demo_module.RECIPES["MonteCLoRA"], progress=False))
    assert {group: len(texts) for group, texts in found.texts.items()} == {
        "in scope": 300,
        "ambiguous": len(ambiguous()),
        "out of scope": len(out_of_scope()),
    }
    assert all(len(found.groups[group].total) == len(texts) for group, texts in found.texts.items())
    inside, outside = found.groups["in scope"].total, found.groups["out of scope"].total
    wins = (outside[:, None] > inside).mean() + 0.5 * (outside[:, None] == inside).mean()
    assert found.detection == pytest.approx(wins)


@pytest.mark.slow
@pytest.mark.skipif(STARTERS["minilm"].path() is None, reason="minilm is not installed")
def test_the_demo_runs_the_real_model(shortened, capfd):
    folder = shortened()
    assert main(["demo"]) == 0
    out, err = capfd.readouterr()
    assert "MonteCLoRA" in out
    assert "Traceback" not in err
    assert (folder / "demo" / "report.html").stat().st_size > 10_000
