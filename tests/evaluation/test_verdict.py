"""What is said of a run, from logs that are written here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from monteclora.errors import CheckpointError
from monteclora.evaluation import verdict as room
from monteclora.evaluation.baseline import frozen_baseline
from monteclora.evaluation.verdict import verdict
from monteclora.runs.loading import load_run


@pytest.fixture
def logged(trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes a run of three classes whose log has these validation NLLs."""
    monkeypatch.setattr(room, "frozen_baseline", lambda loaded: None)

    def make(values: list[float], kept: int, ece: float = 0.05, name: str = "texts") -> Path:
        folder = tmp_path / f"run {len(list(tmp_path.iterdir()))}"
        shutil.copytree(trained[name], folder)
        steps = range(10, 10 * len(values) + 1, 10)
        evaluations = [
            {"event": "eval", "phase": "cooperative", "step": s, "nll": v} for s, v in zip(steps, values, strict=True)
        ]
        metrics = {"accuracy": 0.5, "nll": values[kept // 10 - 1], "ece": ece}
        end = {"event": "finished", "phase": "cooperative", "step": steps[-1], "kept_step": kept, "metrics": metrics}
        (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in [*evaluations, end]))
        return folder

    return make


def test_a_run_that_learned(logged: Callable[..., Path]) -> None:
    found = verdict(logged([0.9, 0.6, 0.5], kept=30))
    # 36 rows, three classes alike: the validation rows' frequencies alone have an NLL of ln 3
    assert "validation NLL 0.500, class frequencies alone 1.099" in found.findings[0]
    assert found.findings[1] == "validation NLL was still falling at the end: more epochs may help"
    assert found.findings[2] == "its confidences are wrong by 0.05 on average (ECE)"
    assert found.warnings == ()


def test_a_run_that_hardly_learned(logged: Callable[..., Path]) -> None:
    found = verdict(logged([1.10, 1.08, 1.07], kept=30))
    assert any("hardly learned: raise training.learning_rate (now 0.02)" in text for text in found.warnings)


def test_overfitting_with_the_best_or_the_last_weights_kept(logged: Callable[..., Path]) -> None:
    found = verdict(logged([0.9, 0.5, 0.8], kept=20))
    assert "it overfits after step 20: validation NLL rises from 0.500 to 0.800; the weights of step 20 are kept" in (
        found.findings
    )
    found = verdict(logged([0.9, 0.5, 0.8], kept=30))
    assert any("the weights of step 30 are kept: set training.best_metric to nll" in text for text in found.warnings)
    found = verdict(logged([0.5, 0.9, float("nan")], kept=10))
    assert any("the first evaluation was the best: lower training.learning_rate" in text for text in found.warnings)


def test_wrong_confidences_come_with_the_command_that_mends_them(logged: Callable[..., Path]) -> None:
    folder = logged([0.9, 0.5], kept=20, ece=0.3)
    assert verdict(folder).warnings == (
        f"its confidences are wrong by 0.30 on average (ECE): monteclora calibrate '{folder}' --temperature",
    )


def test_a_language_model_is_judged_by_its_curve_alone(logged: Callable[..., Path]) -> None:
    found = verdict(logged([2.0, 1.5], kept=20, name="pairs"))
    assert found.findings[0].startswith("validation NLL was still falling")


def test_the_baseline_is_a_logistic_regression_on_the_pretrained_features(trained: dict[str, Path]) -> None:
    found = frozen_baseline(load_run(trained["texts"]))
    assert found is not None
    # words tell the label, and means of random states of words tell the words
    assert found["accuracy"] == 1.0
    assert found["nll"] < 0.9


def test_a_run_without_an_end_is_refused(logged: Callable[..., Path]) -> None:
    folder = logged([0.9, 0.5], kept=20)
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(CheckpointError):
        verdict(folder)
