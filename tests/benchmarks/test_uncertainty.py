"""The benchmark of uncertainty on a study of tiny runs: what it takes, measures, keeps, and goes on from."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import uncertainty
from datasets import Dataset

from monteclora.training.run import train
from tests.finished_runs import tiny_recipe, write_assets


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Two runs of method lora that differ in their rate, one of monteclora, one with label noise."""
    folder, assets = tmp_path_factory.mktemp("study"), write_assets(tmp_path_factory.mktemp("assets"))
    changes = {
        "slow": ("lora", 1e-6, 0.0),
        "fast": ("lora", 5e-3, 0.0),
        "bayes": ("monteclora", 5e-3, 0.0),
        "noisy": ("lora", 5e-3, 0.5),
    }
    for name, (method, rate, noise) in changes.items():
        recipe = tiny_recipe(assets, folder / "trials" / name, method=method)
        recipe["data"] = {"task": "helpdesk", "max_length": 8, "train_rows": 64, "label_noise": noise}
        recipe["training"] |= {"learning_rate": rate, "eval_batch_size": 256, "max_steps": 4}
        train(recipe, progress=False)
    return folder


def validation_nll(run):
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [event["nll"] for event in events if event["event"] == "eval"][-1]


def test_cases_are_measured_once_and_take_the_best_run(study, tmp_path, monkeypatch, capsys):
    names = (
        *("LoRA", "LoRA, MC dropout", "LoRA, Laplace", "LoRA + calibrate"),
        *("MonteCLoRA, posterior", "MonteCLoRA, calibrated in the last block"),
    )
    before = sorted(path.relative_to(study) for path in study.rglob("*"))
    options = ["--study", str(study), "--out", str(tmp_path), "--batch-size", "8", "--draws", "2"]
    options += ["--test-rows", "200"]
    monkeypatch.setattr("sys.argv", ["", *options, "--corrupted", "cut:3", "--ways", *names])
    uncertainty.main()
    assert sorted(path.relative_to(study) for path in study.rglob("*")) == before
    nll = {name: validation_nll(study / "trials" / name) for name in ("slow", "fast")}
    better = min(nll, key=nll.get)
    cases = {r["way"]: r for r in uncertainty.records_of(tmp_path)}
    assert {name: r["runs"] for name, r in cases.items()} == {
        "LoRA": [better],
        "LoRA, MC dropout": [better],
        "LoRA, Laplace": [better],
        "LoRA + calibrate": [better],
        "MonteCLoRA, posterior": ["bayes"],
        "MonteCLoRA, calibrated in the last block": ["bayes"],
    }
    assert "dropout rate above 0" in cases["LoRA, MC dropout"]["left_out"]
    table = pq.read_table(tmp_path / "uncertainty.parquet").to_pylist()
    assert {(row["way"], row["calibrator"], row["corruption"]) for row in table} == {
        (name, calibrator, corruption)
        for name in names
        if name != "LoRA, MC dropout"
        for calibrator in ("none", "temperature")
        for corruption in ("none", "cut")
    }
    for name in names:
        pair = {r["calibrator"]: r for r in table if r["way"] == name and r["corruption"] == "none"}
        if pair:
            assert name != "LoRA" or pair["temperature"]["accuracy"] == pair["none"]["accuracy"]
            assert pair["temperature"]["nll"] != pair["none"]["nll"]
    assert all(0 <= row["accuracy"] <= 1 < row["nll"] for row in table)
    assert "| LoRA + calibrate + temperature |" in capsys.readouterr().out
    monkeypatch.setattr(uncertainty, "measured", lambda *_: pytest.fail("measured again"))
    uncertainty.main()
    place = tmp_path / "cases" / "MonteCLoRA-posterior-0.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "runs": ["another"]}))
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        uncertainty.main()


def test_a_run_has_the_nll_of_the_weights_it_kept(tmp_path):
    recipe = tiny_recipe(write_assets(tmp_path / "assets"), tmp_path / "trials" / "run", method="lora")
    recipe["data"] = {"task": "helpdesk", "max_length": 8, "train_rows": 64}
    recipe["training"] |= {"max_steps": 8, "eval_every": 1, "learning_rate": 0.3, "best_metric": "nll"}
    train(recipe, progress=False)
    events = [json.loads(line) for line in (tmp_path / "trials" / "run" / "metrics.jsonl").read_text().splitlines()]
    nlls = [event["nll"] for event in events if event["event"] == "eval"]
    (run,) = uncertainty.runs_of(tmp_path, None)
    assert min(nlls) < nlls[-1]
    assert run.nll == pytest.approx(min(nlls))


def test_some_rows_are_the_same_every_time_and_of_the_whole_split():
    rows = Dataset.from_dict({"label": list(range(1000))})
    some = uncertainty.some_rows(rows, 100)
    assert some["label"][:] == sorted(set(some["label"][:])) == uncertainty.some_rows(rows, 100)["label"][:]
    assert len(some) == 100
    assert min(some["label"][:]) < 100
    assert max(some["label"][:]) >= 900
    assert uncertainty.some_rows(rows, None) is uncertainty.some_rows(rows, 1000) is rows


def test_ensembles_share_no_member():
    runs = {seed: uncertainty.Run(Path(str(seed)), "lora", seed, 1e-3, 0.5, 1.0, 1.0) for seed in range(11)}
    single, ensemble = (uncertainty.groups(uncertainty.WAYS[name], runs) for name in ("LoRA", "ensemble of 5 LoRA"))
    assert single == {seed: [run] for seed, run in runs.items()}
    assert {number: [run.seed for run in group] for number, group in ensemble.items()} == {
        0: [0, 1, 2, 3, 4],
        1: [5, 6, 7, 8, 9],
    }
