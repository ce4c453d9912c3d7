import json
import shutil
from contextlib import contextmanager

import pytest

from monteclora import evaluate
from monteclora.cli import main
from monteclora.data.corruption import CORRUPTIONS, STRENGTHS, corrupt
from monteclora.errors import ConfigError
from monteclora.evaluation import run as module
from monteclora.runs.loading import load_run
from monteclora.tasks import load
from tests.finished_runs import write_rows


def test_metrics_of_corrupted_rows_are_those_of_a_file_of_them(trained, tmp_path):
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


def test_the_page_keeps_what_was_found_of_the_same_predictions_and_measures_it_when_asked(
    trained, tmp_path, capsys, monkeypatch
):
    run = shutil.copytree(trained["texts"], tmp_path / "run")

    def stored():
        return json.loads((run / "evaluation.json").read_text())["splits"]["test"]["adapter"].get("corrupted")

    assert main(["evaluate", str(run), "--shift"]) == 0
    said = capsys.readouterr().out
    assert all(said.count(title) >= 3 for title in ("typos", "words dropped", "texts cut", "upper case"))
    before = stored()
    with monkeypatch.context() as patched:
        patched.setattr(module, "under_corruption", lambda *_: pytest.fail("it was measured again"))
        assert main(["report", str(run)]) == 0
    assert stored() == before
    page = (run / "report.html").read_text()
    assert "--shift" in page
    assert "as people write in a hurry" in page
    assert "Which answers to trust" in page
    assert "of 100 answers are right" in page
    evaluate(run, shift=True, rows=9, progress=False)
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "corrupted rows are left out: they were measured of other rows, weights or draws" in page
    assert "as people write in a hurry" not in page
    assert stored() is None
    assert main(["report", str(run), "--shift"]) == 0
    assert stored() == before


def test_what_takes_long_comes_after_the_result_is_on_disk_and_is_watched(trained, tmp_path, monkeypatch):
    run, shown = shutil.copytree(trained["texts"], tmp_path / "run"), dict[str, list[int]]()

    @contextmanager
    def bar(title, total, show):
        shown[title] = [total, 0]
        yield lambda rows: shown[title].__setitem__(1, shown[title][1] + rows)

    monkeypatch.setattr(module, "progress_bar", bar)
    result = evaluate(run, shift=True, num_samples=2)
    (corrupted,) = (title for title in shown if "corrupted" in title)
    assert shown[corrupted] == [2 * 12 * len(result.rows)] * 2  # at the mean and under draws
    (run / "evaluation.json").unlink()

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "under_corruption", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluate(run, shift=True, num_samples=2)
    kept = json.loads((run / "evaluation.json").read_text())["splits"]["test"]["adapter"]
    assert kept["point"] == dict(result.point)
    assert "corrupted" not in kept


def test_a_language_models_rows_are_not_corrupted(trained):
    with pytest.raises(ConfigError, match="shift corrupts the texts of rows with labels or scores"):
        evaluate(trained["pairs"], shift=True, progress=False)
