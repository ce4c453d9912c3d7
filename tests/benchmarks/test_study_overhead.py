from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import study_overhead


@pytest.mark.parametrize("last", ["finished", "failed", "diverged", None])
def test_a_study_whose_trials_did_not_all_finish_is_no_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str | None
) -> None:
    def run(command: Any, **_: Any) -> None:
        results = tmp_path / "study" / "results"
        results.mkdir(parents=True)
        for number, status in enumerate(["finished", "finished", last]):
            if status is not None:
                (results / f"{number}.json").write_text(json.dumps({"trial": str(number), "status": status}))

    monkeypatch.setattr(study_overhead, "subprocess", SimpleNamespace(run=run, DEVNULL=None))
    if last == "finished":
        study_overhead.run_study(tmp_path, 3, 20, 1)
        return
    with pytest.raises(AssertionError, match="2 of 3 trials finished"):
        study_overhead.run_study(tmp_path, 3, 20, 1)
