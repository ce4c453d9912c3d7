"""Outcomes go through ``results.parquet`` without loss, and studies take from it what they know already."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from monteclora.errors import CheckpointError
from monteclora.studies import execution
from monteclora.studies.folder import Outcome, StudyFolder
from monteclora.studies.plan import Plan, Trial
from monteclora.studies.recipe import load_study
from monteclora.studies.results import read_results, write_results
from monteclora.studies.study import study

OUTCOMES = [
    Outcome(
        "a", "finished", "",
        {"accuracy": 0.1 + 0.2, "nll": math.nan, "trial": 5e-324},  # a metric may have the name of a column
        {"accuracy": -0.0, "nll": math.inf, "validation_nll": 3.0},  # or of another field's entry
        {"nll": 1 / 3},
        {"accuracy": 0.5},
        rows=7, seconds=1e-300, tokens=2**62, peak_memory_bytes=3, trained_parameters=4,
        notes=["one, two", "drei: \u00fc"],
    ),
    Outcome("b", "diverged", "not finite\nat step 3", no_skill={"nll": 0.7}),
    Outcome("c", "failed", "OSError"),
]  # fmt: skip


def plan_of(*trials: str) -> Plan:
    settings = {"training.learning_rate": 1e-3}
    found = (Trial(t, f"arm {t}", {}, settings if t == "a" else {}, 2, cast(Any, None)) for t in trials)
    return Plan(cast(Any, SimpleNamespace(metric=None)), tuple(found))


def bits(value: Any) -> Any:
    if isinstance(value, float):
        return struct.pack("d", value)
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    return list(map(bits, value)) if isinstance(value, list | tuple) else value


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "results.parquet"
    write_results(path, plan_of("c", "a", "b", "not done"), {o.trial: o for o in OUTCOMES})
    return path


def test_outcomes_come_back_bitwise(file: Path) -> None:
    found = read_results(file)
    assert list(found) == ["c", "a", "b"]
    for outcome in OUTCOMES:
        assert bits(asdict(found[outcome.trial])) == bits(asdict(outcome))
    (row,) = [row for row in pq.read_table(file).to_pylist() if row["arm"] == "arm a"]
    assert (row["seed"], json.loads(row["training.learning_rate"]), row["no_skill_accuracy"]) == (2, 1e-3, 0.5)


def test_fields_that_an_earlier_version_did_not_have_are_at_their_defaults(file: Path) -> None:
    table = pq.read_table(file)
    pq.write_table(table.drop_columns(["notes", "tokens", "no_skill_accuracy"]), file)
    found = read_results(file)
    assert (found["a"].notes, found["a"].tokens, found["a"].no_skill) == ((), 0, {})
    assert found["a"].rows == 7
    assert found["b"].no_skill == {"nll": 0.7}


def test_an_empty_study_has_an_empty_file(tmp_path: Path) -> None:
    write_results(tmp_path / "r", plan_of("a"), {})
    assert read_results(tmp_path / "r") == {}


def spoiled(file: Path, how: str) -> None:
    table = pq.read_table(file)
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-20])
    elif how == "flipped":
        content = bytearray(file.read_bytes())
        content[10:60] = bytes(50)
        file.write_bytes(content)
    elif how == "folder":
        file.unlink()
        file.mkdir()
    elif how == "missing":
        file.unlink()
    elif how == "another table":
        pq.write_table(pa.table({"trial": ["a"], "status": ["finished"]}), file)
    elif how == "later":
        pq.write_table(table.replace_schema_metadata({"monteclora_results_format": "2"}), file)
    elif how == "status":
        index = table.schema.get_field_index("status")
        column = pa.array(["finished", "perhaps", "failed"])
        pq.write_table(table.set_column(index, table.schema.field(index), column), file)
    elif how == "type":
        index = table.schema.get_field_index("tokens")
        column = pa.array(["one", "two", "three"])
        pq.write_table(table.set_column(index, table.schema.field(index).with_type(pa.string()), column), file)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("cut", "is damaged"),
        ("flipped", "is damaged"),
        ("folder", "is damaged"),
        ("status", r"is damaged \(ValueError\)"),
        ("type", r"is damaged \(ArrowInvalid\)"),
        ("missing", "does not exist"),
        ("another table", "is not the results.parquet of a study"),
        ("later", "has format 2, and this version reads up to 1"),
    ],
)
def test_a_file_that_cannot_be_read_is_told_in_one_line_and_nothing_is_written(
    file: Path, how: str, said: str, make_study: Callable[..., dict[str, Any]]
) -> None:
    spoiled(file, how)
    recipe = make_study(known=[str(file)])
    with pytest.raises(CheckpointError, match=f"results.parquet {said}") as caught:
        study(recipe, workers=0, progress=False)
    assert "\n" not in str(caught.value)
    assert not Path(recipe["output"]).exists()


def test_a_study_goes_on_from_another_ones_file(
    make_study: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another machine, where nothing but the file is: only what is new is run, the rest is as it was."""
    grid = {"method.name": ["lora"], "training.learning_rate": [1e-3, 1e-2], "seed": [0]}
    first = study(make_study("first", grid), workers=0, progress=False)
    beside = tmp_path / "beside"
    beside.mkdir()
    (first.folder / "results.parquet").rename(beside / "first.parquet")
    wider = make_study("second", {**grid, "training.learning_rate": [1e-2, 1e-1]}, known=["first.parquet"])
    (beside / "study.yaml").write_text(yaml.safe_dump(wider))
    trained: list[str] = []
    original = execution.train
    monkeypatch.setattr(execution, "train", lambda r, **options: trained.append(r.name) or original(r, **options))
    found = study(beside / "study.yaml", workers=0, progress=False)
    (both,) = first.outcomes.keys() & found.outcomes.keys()
    assert trained == [trial.id for trial in found.plan.trials if trial.id != both]
    assert found.outcomes[both] == first.outcomes[both]
    assert f"1 of the 2 outcomes in {beside / 'first.parquet'} taken" in found.plan.notes
    (beside / "first.parquet").unlink()
    assert load_study(found.folder / "study.yaml").known == []
    again = read_results(found.folder / "results.parquet")
    assert again == dict(found.outcomes)


def test_failed_outcomes_are_not_taken_and_own_ones_stay(
    make_study: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_study(grid={"method.name": ["lora"], "seed": [0, 1]}, retries=0)
    with monkeypatch.context() as patch:
        patch.setattr(execution, "train", lambda *_, **__: (_ for _ in ()).throw(OSError("no such disk")))
        failed = study(recipe, workers=0, progress=False)
    file = tmp_path / "failed.parquet"
    (failed.folder / "results.parquet").rename(file)
    found = study(recipe, known=[file], workers=0, progress=False)
    assert {outcome.status for outcome in found.outcomes.values()} == {"finished"}
    first, second = found.outcomes.values()
    folder = StudyFolder(found.folder)
    folder.outcome_file(second.trial).unlink()
    trials = found.plan.trials
    assert [folder.adopt(t, Outcome(t.id, "diverged", "elsewhere")) for t in trials] == [False, True]
    assert (folder.outcome(first.trial), folder.outcome(second.trial).reason) == (first, "elsewhere")  # type: ignore[union-attr]
    (folder.path / "results" / f"{second.trial}.json").unlink()
    taken = folder.claims.take(second.trial, lambda: False, lambda: 0)
    assert taken is not None
    assert not folder.adopt(trials[1], Outcome(second.trial, "diverged", "elsewhere"))
