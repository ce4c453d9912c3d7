"""What is said of a run, from logs that are written here."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from monteclora.cli import main
from monteclora.errors import CheckpointError
from monteclora.evaluation import baseline as room_of_baseline
from monteclora.evaluation import verdict as room
from monteclora.evaluation.baseline import allow_baseline, frozen_baseline
from monteclora.evaluation.own_rows import own_rows
from monteclora.evaluation.verdict import verdict
from monteclora.runs.calibration import read_calibration
from monteclora.runs.loading import load_run
from monteclora.tasks import TaskData
from monteclora.training.run import train
from tests.finished_runs import tiny_recipe


@pytest.fixture(scope="module")
def full(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trained every weight."""
    folder = tmp_path_factory.mktemp("full") / "full"
    train({**tiny_recipe(assets, folder), "method": {"name": "full"}}, progress=False)
    return folder


def rows_of(folder: Path) -> TaskData:
    return own_rows(folder, load_run(folder).recipe.data, "train", "validation")


@pytest.fixture
def logged(trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes a run of three classes whose log has these validation NLLs."""
    monkeypatch.setattr(room, "frozen_baseline", lambda loaded, data: None)

    def make(
        values: list[float], kept: int, ece: float = 0.05, name: str | Path = "texts", rate: float | None = None
    ) -> Path:
        folder = tmp_path / f"run {len(list(tmp_path.iterdir()))}"
        shutil.copytree(trained[name] if isinstance(name, str) else name, folder)
        steps = range(10, 10 * len(values) + 1, 10)
        evaluations = [
            {"event": "eval", "phase": "cooperative", "step": s, "nll": v} for s, v in zip(steps, values, strict=True)
        ]
        metrics = {"accuracy": 0.5, "nll": values[kept // 10 - 1], "ece": ece}
        end = {"event": "finished", "phase": "cooperative", "step": steps[-1], "kept_step": kept, "metrics": metrics}
        end |= {"learning_rate": rate}  # None as in a run of an earlier version
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


def test_weights_that_the_best_temperature_chose_are_judged_at_it(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "frozen_baseline", lambda loaded, data: None)
    recipe = tiny_recipe(assets, tmp_path / "run")
    recipe["training"] |= {"best_metric": "tempered_nll", "temperature": True}
    result = train(recipe, progress=False)
    log = result.folder / "metrics.jsonl"
    events = [json.loads(line) for line in log.read_text().splitlines()]
    evaluations = [
        {"event": "eval", "phase": "cooperative", "step": step, "nll": nll, "tempered_nll": tempered}
        for step, nll, tempered in ((10, 0.5, 0.48), (20, 0.9, 0.4), (30, 1.5, 0.45))
    ]
    end = {**events[-1], "step": 30, "kept_step": 20, "temperature": 3.21}
    end["metrics"] = {**end["metrics"], "nll": 0.4, "ece": 0.25}
    log.write_text("".join(json.dumps(event) + "\n" for event in [*evaluations, end]))
    found = verdict(result.folder)
    assert (
        "it overfits after step 20: validation NLL at the best temperature rises from 0.400 to 0.450; "
        "the weights of step 20 are kept"
    ) in found.findings
    # a temperature is what it has
    (calibration,) = (text for text in found.warnings if "ECE" in text)
    assert calibration.endswith("on average (ECE), once its head is divided by the best temperature, 3.21")


def test_a_density_may_have_a_negative_nll(logged: Callable[..., Path]) -> None:
    found = verdict(logged([-0.30, -0.40, -0.50], kept=30, name="pairs"))
    assert found.findings == (
        "validation NLL was still falling at the end: more epochs may help",
        "its confidences are wrong by 0.05 on average (ECE)",
    )
    found = verdict(logged([-0.30, -0.50, -0.40], kept=20, name="pairs"))
    assert found.findings[0].startswith("it overfits after step 20: validation NLL rises from -0.500 to -0.400")


def test_the_phase_that_was_validated_says_which_step_is_kept(logged: Callable[..., Path]) -> None:
    def with_phases(folder: Path, kept: int) -> Path:
        """After 30 steps the posterior's own phase keeps its last step, 50."""
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        phases = [
            {"event": "phase", "phase": "adapter", "step": 30, "kept_step": kept},
            {"event": "phase", "phase": "posterior", "step": 50, "kept_step": 50},
        ]
        end = {**json.loads(lines[-1]), "step": 50, "kept_step": 50}
        text = "\n".join([*lines[:-1], *(json.dumps(event) for event in (*phases, end))])
        (folder / "metrics.jsonl").write_text(text + "\n")
        return folder

    found = verdict(with_phases(logged([0.9, 0.5, 0.8], kept=20), 20))
    assert any(text.endswith("the weights of step 20 are kept") for text in found.findings)
    assert found.warnings == ()
    found = verdict(with_phases(logged([0.9, 0.5, 0.8], kept=30), 30))
    assert len(found.warnings) == 1
    assert "and the weights of step 30 are kept: set training.best_metric to nll" in found.warnings[0]


def test_advice_does_not_contradict_itself(logged: Callable[..., Path]) -> None:
    found = verdict(logged([1.08, 1.2, 1.3], kept=10, rate=0.004))
    assert found.warnings == (
        "it has hardly learned",
        "the first evaluation was the best: lower training.learning_rate (now 0.004)",
    )
    found = verdict(logged([0.500, 0.501, 0.501], kept=10))
    assert found.findings[1] == "validation NLL was best at step 10, and levels off"
    assert found.warnings == ()


def test_the_rate_that_was_found_is_named(logged: Callable[..., Path]) -> None:
    folder = logged([1.10, 1.08, 1.07], kept=30, rate=0.0125)
    recipe = folder / "recipe.yaml"
    automatic = recipe.read_text().replace("learning_rate: 0.02\n", "learning_rate: auto\n")
    assert automatic != recipe.read_text()
    recipe.write_text(automatic)
    (text,) = verdict(folder).warnings
    assert text.startswith("it has hardly learned: raise training.learning_rate (now 0.0125) or training.epochs")


@pytest.mark.parametrize("method", ["monteclora", "lora", "full"])
def test_wrong_confidences_come_with_the_command_that_mends_them(
    method: str, logged: Callable[..., Path], full: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = logged([0.9, 0.5], kept=20, ece=0.3, name={"monteclora": "texts", "lora": "lora", "full": full}[method])
    (text,) = verdict(folder).warnings
    what, _, command = text.partition(": ")
    assert what == "its confidences are wrong by 0.30 on average (ECE)"
    program, *words = shlex.split(command)
    assert program == "monteclora"
    assert main(words) == 0
    assert "temperature" in capsys.readouterr().out
    assert any(key.startswith("temperature/mean") for key in read_calibration(folder)["calibrators"])
    assert load_run(folder).has_posterior is (method == "monteclora")  # none is put on an adapter


def test_where_there_are_no_classes_no_command_is_named(logged: Callable[..., Path]) -> None:
    found = verdict(logged([0.9, 0.5], kept=20, ece=0.3, name="pairs"))
    assert found.warnings == ("its confidences are wrong by 0.30 on average (ECE)",)


def test_a_language_model_is_judged_by_its_curve_alone(logged: Callable[..., Path]) -> None:
    found = verdict(logged([2.0, 1.5], kept=20, name="pairs"))
    assert found.findings[0].startswith("validation NLL was still falling")


def test_the_baseline_is_a_logistic_regression_on_the_pretrained_features(trained: dict[str, Path]) -> None:
    found = frozen_baseline(load_run(trained["texts"]), rows_of(trained["texts"]))
    assert found is not None
    # words tell the label, and means of random states of words tell the words
    assert found["accuracy"] == 1.0
    assert found["nll"] < 0.9


def test_a_model_that_was_trained_whole_has_no_pretrained_features(full: Path) -> None:
    assert frozen_baseline(load_run(full), rows_of(full)) is None
    assert not any("logistic regression" in text for text in (*verdict(full).findings, *verdict(full).warnings))


def test_too_many_rows_or_too_few_of_a_class_are_told_without_the_model(
    trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = rows_of(trained["texts"])
    assert allow_baseline(data)
    few = data.split("train").filter(lambda row: row["label"] != 2)
    assert not allow_baseline(replace(data, splits={**data.splits, "train": few}))
    assert not allow_baseline(replace(data, splits={"train": data.split("train")}))
    monkeypatch.setattr(room, "load_run", lambda folder: pytest.fail("the model was loaded"))
    rows = {split: len(data.split(split)) for split in ("train", "validation")}
    assert rows["validation"] < rows["train"]
    monkeypatch.setattr(room_of_baseline, "MOST_ROWS", rows["train"] - 1)
    assert "class frequencies alone" in verdict(trained["texts"]).findings[0]
    many = replace(data, splits={"train": data.split("train"), "validation": data.split("train")})
    monkeypatch.setattr(room_of_baseline, "MOST_ROWS", rows["train"])
    assert allow_baseline(many)
    many = replace(data, splits={"train": data.split("validation"), "validation": data.split("train")})
    monkeypatch.setattr(room_of_baseline, "MOST_ROWS", rows["train"] - 1)
    assert not allow_baseline(many)


def test_without_the_baseline_no_model_is_loaded(trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "load_run", lambda folder: pytest.fail("the model was loaded"))
    found = verdict(trained["texts"], baseline=False)
    assert "class frequencies alone" in found.findings[0]


def test_a_model_for_which_there_is_no_memory(trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def full_device(folder: Path) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(room, "load_run", full_device)
    assert verdict(trained["texts"]).findings[1] == (
        "not compared with a logistic regression on the pretrained model's features: out of memory"
    )


def test_a_run_without_an_end_is_refused(logged: Callable[..., Path]) -> None:
    folder = logged([0.9, 0.5], kept=20)
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(CheckpointError):
        verdict(folder)
