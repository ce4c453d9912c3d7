from __future__ import annotations

import json
from pathlib import Path

import pytest

from monteclora.cli import main


@pytest.mark.parametrize("run", ["texts", "lora", "questions", "pairs"])
def test_the_page_of_a_run(run: str, trained: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained[run]
    assert main(["report", str(folder)]) == 0
    assert f"report: {folder / 'report.html'}" in capsys.readouterr().out
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "What was trained" in page
    assert "15 rows of the test split" in page
    steps = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])["step"]
    assert f", {steps} steps at batch size" in page
    assert ("Accuracy" in page) is (run != "pairs")
    assert ("perplexity" in page) is (run == "pairs")
    assert ("posterior draws" in page) is (run != "lora")
    assert "<svg" in page
    assert ("An answer, token by token (1)" in page) is (run in ("questions", "pairs"))
    assert "://" not in page.replace("http://www.w3.org", "")  # nothing is fetched
    assert ("Label by label" in page) is (run in ("texts", "lora"))
    assert ("Sure and wrong" in page) is (run != "pairs")
    assert "Validation NLL" in page
    assert "alidation NLL was" in page
    assert "training.max_steps" in page  # a setting that is not at its default
    assert "training.adam_epsilon" not in page


def test_what_is_no_run_ends_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "it is not a run" in capsys.readouterr().err


def test_a_run_is_not_watched(trained: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(trained["lora"]), "--watch"]) == 2
    assert "--watch is of a study" in capsys.readouterr().err
