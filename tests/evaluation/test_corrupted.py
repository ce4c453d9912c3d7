import json
import shutil

import pytest

from monteclora import evaluate
from monteclora.cli import main
from monteclora.data.corruption import CORRUPTIONS, STRENGTHS, corrupt
from monteclora.errors import ConfigError
from monteclora.runs.loading import load_run
from monteclora.tasks import load
from tests.finished_runs import write_rows


def test_metrics_of_corrupted_rows_are_those_of_a_file_of_them(trained, tmp_path, capsys):
    run = shutil.copytree(trained["texts"], tmp_path / "run")
    result = evaluate(run, shift=True, progress=False)
    assert [(each["corruption"], each["strength"]) for each in result.corrupted] == [
        (name, strength) for name in CORRUPTIONS for strength in STRENGTHS
    ]
    stored = json.loads((run / "evaluation.json").read_text())["splits"]["test"]["adapter"]
    assert stored["corrupted"] == [dict(each) for each in result.corrupted]
    loaded = load_run(run)
    rows = load(loaded.recipe.data, ("test",)).split("test")
    names = loaded.label_names
    corrupted = [{"text": corrupt(row["text"], "cut", 2), "label": names[row["label"]]} for row in rows]
    by_hand = evaluate(run, task=str(write_rows(tmp_path / "cut.jsonl", corrupted)), progress=False)
    found = next(each for each in result.corrupted if (each["corruption"], each["strength"]) == ("cut", 2))
    assert found["point"] == pytest.approx(dict(by_hand.point), abs=1e-6)
    assert found["posterior"] == pytest.approx(dict(by_hand.posterior), abs=1e-6)
    assert found["point"] != dict(result.point)
    # the table, and the page, which measures again what the evaluation that it replaces had
    assert main(["evaluate", str(run), "--shift", "--rows", "9"]) == 0
    said = capsys.readouterr().out
    assert all(said.count(title) >= 3 for title in ("typos", "words dropped", "texts cut", "upper case"))
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "as people write in a hurry" in page
    assert "Which answers to trust" in page
    assert "of 100 answers are right" in page


def test_a_language_models_rows_are_not_corrupted(trained):
    with pytest.raises(ConfigError, match="shift corrupts the texts of rows with labels or scores"):
        evaluate(trained["pairs"], shift=True, progress=False)
