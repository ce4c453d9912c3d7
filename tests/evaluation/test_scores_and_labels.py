"""Runs that learn scores and several labels, from the recipe to the report."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import monteclora
from monteclora.cli import main
from monteclora.data.models import STARTERS
from monteclora.errors import ConfigError, DataError
from monteclora.evaluation.calibrate import calibrate
from monteclora.evaluation.prediction import OUTPUT_COLUMNS, predict_file
from monteclora.evaluation.run import evaluate
from monteclora.evaluation.text import load
from monteclora.metrics.registry import measure
from monteclora.reports.run_report import write_run_report
from monteclora.runs.loading import load_run
from monteclora.training.check import check
from monteclora.training.run import train
from tests.finished_runs import tiny_recipe, write_rows
from tests.training.conftest import WORDS, StopAfter, adapter_content, train_until

KINDS = ("regression", "multi_label")
NAMES = ("low", "middle", "high")


def made_up(kind: str, count: int, seed: int, words: list[str]) -> Iterator[dict[str, Any]]:
    """Texts whose words tell a score from 10 to 20, or which of three labels they have."""
    generator = random.Random(seed)
    for _ in range(count):
        chosen = [generator.choice(words[: len(words) // 2] if generator.random() < 0.5 else words) for _ in range(8)]
        places = [words.index(word) / len(words) for word in chosen]
        row = {"text": " ".join(chosen)}
        if kind == "regression":
            yield {**row, "score": round(10 + 10 * sum(places) / 8 + generator.gauss(0, 0.3), 3)}
        else:
            yield {**row, "labels": [name for i, name in enumerate(NAMES) if any(i <= 3 * p < i + 0.5 for p in places)]}


def recipe(assets: Path, output: Path, kind: str, method: str) -> dict[str, Any]:
    found = tiny_recipe(assets, output, "texts", method)
    data = {"train_file": str(assets / f"{kind}.jsonl"), "test_file": str(assets / f"{kind}-test.jsonl")}
    return {**found, "data": {**data, "kind": kind, "max_length": 16, "validation_fraction": 0.3}}


@pytest.fixture(scope="module")
def runs(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    folder = tmp_path_factory.mktemp("scored")
    found = {}
    for kind in KINDS:
        write_rows(assets / f"{kind}.jsonl", made_up(kind, 40, 0, WORDS))
        write_rows(assets / f"{kind}-test.jsonl", made_up(kind, 12, 1, WORDS))
        for method in ("lora", "monteclora"):
            output = folder / f"{kind}-{method}"
            train(recipe(assets, output, kind, method), progress=False)
            found[kind, method] = output
    return found


def test_scores_are_evaluated_as_the_table_has_them(runs: dict[tuple[str, str], Path]) -> None:
    result = evaluate(runs["regression", "monteclora"], progress=False)
    table = {name: np.array(result.scored.table[name].to_pylist()) for name in ("prediction", "total", "label", "nll")}
    expected = measure("scores", table["prediction"], table["total"], table["label"])
    assert result.posterior == pytest.approx(expected)
    assert table["nll"].mean() == pytest.approx(expected["nll"])
    found = result.scored.predictions
    assert (found.epistemic > 0).all()
    assert found.total == pytest.approx(found.aleatoric + found.epistemic)
    assert evaluate(runs["regression", "lora"], progress=False).posterior is None


def test_labels_are_evaluated_as_the_table_has_them(runs: dict[tuple[str, str], Path]) -> None:
    result = evaluate(runs["multi_label", "monteclora"], progress=False)
    rows = result.scored.table.to_pylist()
    probs = np.array([[row["probabilities"][name] for name in sorted(NAMES)] for row in rows])
    labels = np.array([[int(name in row["label"]) for name in sorted(NAMES)] for row in rows])
    assert result.posterior == pytest.approx(measure("labels", probs, labels))
    assert all(row["prediction"] == [n for n in sorted(NAMES) if row["probabilities"][n] > 0.5] for row in rows)
    assert all(row["epistemic"] == pytest.approx(sum(row["label_epistemic"].values())) for row in rows)


def test_the_last_validation_is_what_evaluate_says(runs: dict[tuple[str, str], Path]) -> None:
    for folder in runs.values():
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        metrics = lines[-1]["metrics"]
        assert metrics == pytest.approx(dict(evaluate(folder, "validation", progress=False).point), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_and_texts_have_the_predictions_of_the_evaluation(
    runs: dict[tuple[str, str], Path], assets: Path, tmp_path: Path, kind: str
) -> None:
    folder = runs[kind, "monteclora"]
    table = evaluate(folder, progress=False).scored.table
    predict_file(folder, assets / f"{kind}-test.jsonl", tmp_path / "p.parquet", progress=False)
    found = pq.read_table(tmp_path / "p.parquet")
    assert set(found.column_names) <= OUTPUT_COLUMNS
    texts = load(folder).predict(table["text"].to_pylist()[:3])
    assert texts.confidence is None
    assert (
        texts.labels == pytest.approx(found["prediction"].to_pylist()[:3])
        if kind == "regression"
        else (texts.labels == found["prediction"].to_pylist()[:3])
    )
    for name in ("total", "epistemic", *(("prediction", "low", "std") if kind == "regression" else ())):
        assert found[name].to_pylist() == pytest.approx(table[name].to_pylist(), rel=1e-5)
    if kind == "multi_label":
        assert texts.probabilities is not None
        assert texts.probabilities[0] == pytest.approx(found["probabilities"].to_pylist()[0], rel=1e-5)


def test_another_file_is_read_as_the_training_data_were(
    runs: dict[tuple[str, str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = runs["multi_label", "lora"]  # trained on lists
    (tmp_path / "lists.csv").write_text("text;labels\nw1 w2;low\nw3 w4;\n")
    found = evaluate(folder, task=str(tmp_path / "lists.csv"), progress=False)
    assert found.scored.table["label"].to_pylist() == [["low"], []]
    assert f"{tmp_path / 'lists.csv'}: fields are separated by semicolons" in found.notes
    (tmp_path / "texts.csv").write_text("text;labels\nw1 w2;low|middle\n")
    found = evaluate(folder, task=str(tmp_path / "texts.csv"), progress=False)
    assert found.scored.table["label"].to_pylist() == [["low", "middle"]]  # lists do not say what parts a text
    (tmp_path / "texts.csv").write_text("text;labels\nw1 w2;low|other\n")
    with pytest.raises(DataError, match=r"texts\.csv, line 2: the label 'other' is not among"):
        evaluate(folder, task=str(tmp_path / "texts.csv"), progress=False)
    predicted = predict_file(folder, tmp_path / "texts.csv", tmp_path / "p.parquet", progress=False)
    assert predicted.notes[0] == f"{tmp_path / 'texts.csv'}: fields are separated by semicolons"
    assert main(["evaluate", str(folder), str(tmp_path / "nowhere.csv")]) == 2
    assert f"there is no file {tmp_path / 'nowhere.csv'}" in capsys.readouterr().err, "no run is meant"


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_to_the_bit(
    assets: Path, runs: dict[tuple[str, str], Path], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = recipe(assets, tmp_path / "again", kind, "monteclora")
    train_until(monkeypatch, StopAfter(3), again)
    resumed = train(again, progress=False)
    assert adapter_content(resumed.folder) == adapter_content(runs[kind, "monteclora"])


def test_the_page_has_the_metrics_and_the_unit(runs: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    for kind, words in (
        ("regression", ("RMSE", "coverage of the 90 % interval", "score²")),
        ("multi_label", ("micro F1",)),
    ):
        shutil.copytree(runs[kind, "monteclora"], tmp_path / kind)
        page = write_run_report(tmp_path / kind, progress=False).read_text()
        assert all(word.lower() in page.lower() for word in words)
        assert "Uncertainty" in page


def test_check_shows_what_is_learned(assets: Path, runs: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    for kind in KINDS:
        expected = {}
        for line in (assets / f"{kind}.jsonl").read_text().splitlines():
            row = json.loads(line)
            labels = ", ".join(sorted(row.get("labels", []))) or "no label"
            expected[row["text"]] = f"{row['score']:.6g}" if kind == "regression" else labels
        for view in check(recipe(assets, tmp_path / "x", kind, "lora")).views:
            text, _, learned = str(view).removeprefix("[CLS] ").partition(" -> ")
            assert learned == expected[text]


def test_ensembles_and_calibrators_where_they_apply(runs: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    for kind in KINDS:
        pair = [tmp_path / f"{kind}-{method}" for method in ("lora", "monteclora")]
        for folder in pair:
            shutil.copytree(runs[kind, folder.name.partition("-")[2]], folder)
        found = evaluate(pair, sampler="ensemble", progress=False)
        assert found.num_samples == 2
        assert (found.scored.predictions.epistemic > 0).all()
        assert "nll" in calibrate(pair[1], progress=False).report["calibrated"]
    corrected = evaluate(tmp_path / "multi_label-lora", "validation", calibrator="temperature", progress=False)
    plain = evaluate(tmp_path / "multi_label-lora", "validation", progress=False)
    assert corrected.point["nll"] < plain.point["nll"]
    assert corrected.point["subset_accuracy"] == plain.point["subset_accuracy"]
    for attempt in (
        lambda: evaluate(tmp_path / "regression-lora", calibrator="temperature", progress=False),
        lambda: calibrate(tmp_path / "regression-monteclora", tolerance=0.1, progress=False),
        lambda: calibrate(tmp_path / "regression-monteclora", temperature=True, progress=False),
    ):
        with pytest.raises(ConfigError, match="has scores"):
            attempt()


def test_what_is_for_classifiers_is_refused_by_name(
    runs: dict[tuple[str, str], Path], assets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in KINDS:
        folder = runs[kind, "monteclora"]
        with pytest.raises(ConfigError, match=f"is a run of {kind}, and ood is for classifiers"):
            evaluate(folder, ood=assets / f"{kind}-test.jsonl", progress=False)
        with pytest.raises(ConfigError, match=f"is a run of {kind}, which never abstains"):
            load(folder, risk=0.2)
        loaded = load_run(folder)
        with pytest.raises(ConfigError, match="no probabilities of classes"):
            monteclora.predict(loaded.model, {"input_ids": torch.ones(1, 3, dtype=torch.long)})
        assert main(["predict", str(folder), "--text", "w1 w2"]) == 0
        line = capsys.readouterr().out
        assert ("90 % within" in line) == (kind == "regression")


@pytest.mark.slow
@pytest.mark.skipif(STARTERS["minilm"].path() is None, reason="the starter model is not installed")
@pytest.mark.parametrize("method", ["lora", "monteclora"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_starter_model_learns(tmp_path: Path, kind: str, method: str) -> None:
    words = ["dreadful", "awful", "bad", "poor", "weak", "fair", "decent", "good", "great", "superb"]
    write_rows(tmp_path / "train.jsonl", made_up(kind, 600, 0, words))
    write_rows(tmp_path / "test.jsonl", made_up(kind, 200, 1, words))
    result = train(
        {
            "name": "real",
            "output": str(tmp_path / "run"),
            "model": {"name": "minilm"},
            "data": {
                "train_file": str(tmp_path / "train.jsonl"),
                "test_file": str(tmp_path / "test.jsonl"),
                "kind": kind,
                "max_length": 32,
            },
            "method": {"name": method, "r": 8},
            "training": {"max_steps": 80, "batch_size": 16, "learning_rate": 3e-3},
            "evaluation": {"num_samples": 8},
        },
        progress=False,
    )
    found = evaluate(result, progress=False)
    metrics = found.posterior or found.point
    if kind == "regression":
        assert metrics["r2"] > 0.5
        assert 0.75 < metrics["coverage_90"] <= 1.0
    else:
        assert metrics["f1_micro"] > 0.7
        assert metrics["ece"] < 0.15
    assert bool((found.scored.predictions.epistemic > 0).all()) == (method == "monteclora")
