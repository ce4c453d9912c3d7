"""The benchmark of uncertainty on a study of tiny runs: what it takes, measures, keeps, and goes on from."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
import uncertainty

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
    monkeypatch.setattr(uncertainty, "DRAWS", 2)
    monkeypatch.setattr(uncertainty, "STRENGTHS", (3,))
    monkeypatch.setattr(uncertainty, "CORRUPTIONS", {"cut": None})
    names = ("LoRA + temperature", "LoRA, MC dropout", "LoRA + calibrate", "MonteCLoRA, posterior")
    monkeypatch.setattr(uncertainty, "WAYS", {name: uncertainty.WAYS[name] for name in names})
    before = sorted(path.relative_to(study) for path in study.rglob("*"))
    monkeypatch.setattr("sys.argv", ["", "--study", str(study), "--out", str(tmp_path), "--batch-size", "8"])
    uncertainty.main()
    assert sorted(path.relative_to(study) for path in study.rglob("*")) == before
    nll = {name: validation_nll(study / "trials" / name) for name in ("slow", "fast")}
    better = min(nll, key=nll.get)
    cases = {r["way"]: r for r in uncertainty.records_of(tmp_path)}
    assert {name: r["runs"] for name, r in cases.items()} == {
        "LoRA + temperature": [better],
        "LoRA, MC dropout": [better],
        "LoRA + calibrate": [better],
        "MonteCLoRA, posterior": ["bayes"],
    }
    assert "dropout rate above 0" in cases["LoRA, MC dropout"]["left_out"]
    table = pq.read_table(tmp_path / "uncertainty.parquet").to_pylist()
    assert {(row["way"], row["corruption"]) for row in table} == {
        (name, corruption) for name in names if name != "LoRA, MC dropout" for corruption in ("none", "cut")
    }
    assert all(0 <= row["accuracy"] <= 1 < row["nll"] for row in table)
    assert "| LoRA + calibrate |" in capsys.readouterr().out
    monkeypatch.setattr(uncertainty, "measured", lambda *_: pytest.fail("measured again"))
    uncertainty.main()
    place = tmp_path / "cases" / "MonteCLoRA-posterior-0.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "runs": ["another"]}))
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        uncertainty.main()
