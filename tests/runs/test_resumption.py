"""Going on with a changed recipe or changed data: refused by name, or accepted on purpose and written down."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from monteclora.errors import CheckpointError
from monteclora.runs.determining import recipe_sha256
from monteclora.runs.recipe import load_recipe
from monteclora.runs.result import RunResult
from monteclora.runs.resumption import overrides_of
from monteclora.runs.run_folder import RunFolder
from monteclora.system.tree import load_tree
from monteclora.training.run import train
from tests.training.conftest import Recipe, StopAfter, adapter_content, quietly, train_until

MakeRecipe = Callable[..., Recipe]
FASTER = [("training.learning_rate", "0.02"), ("training.weight_decay", "0.5"), ("method.coop_weight", "0.25")]


def override(recipe: Recipe, changes: list[tuple[str, str]] | None = None) -> RunResult:
    return train(recipe, changes or (), override=True, progress=False)


def resumed(run: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = RunFolder(run).environment["resumed"]
    return found


def rates(run: Path) -> dict[int, float]:
    return {e["step"]: e["learning_rate"] for e in RunFolder(run).metrics.read() if e["event"] == "train"}


def test_accepted_on_purpose_takes_effect_and_is_written_down(
    recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = recipe(logging_every=1, schedule="constant", warmup_ratio=0.0)
    train_until(monkeypatch, StopAfter(4), made)
    with pytest.raises(CheckpointError, match=r"learning_rate, training\.weight_decay changed.* give --override"):
        train(made, FASTER, progress=False)
    result = override(made, FASTER)
    assert result.steps == 10
    assert rates(tmp_path / "run") == {step: 0.01 if step <= 4 else 0.02 for step in range(1, 11)}
    last = load_tree(tmp_path / "run/checkpoints/checkpoint-10/training_state")
    assert {group["weight_decay"] for group in last["optimizer"]["param_groups"]} == {0.5, 0.0}
    (entry,) = resumed(tmp_path / "run")
    assert entry["step"] == 4
    assert entry["override"] == {
        "recipe_sha256": recipe_sha256(load_recipe(made)),
        "recipe": {
            "method.coop_weight": [1.0, 0.25],
            "training.learning_rate": [0.01, 0.02],
            "training.weight_decay": [0.01, 0.5],
        },
        "data": [],
    }
    run = RunFolder(tmp_path / "run")
    assert run.recipe == load_recipe(made, FASTER)
    assert run.environment["recipe_sha256"] == recipe_sha256(run.recipe)
    (note,) = overrides_of(run.environment)
    assert "from step 4 with method.coop_weight 1.0 -> 0.25, training.learning_rate 0.01 -> 0.02" in note
    # the adapter is neither that of the one recipe nor that of the other
    for name, changes in (("before", []), ("after", FASTER)):
        train({**made, "name": name, "output": str(tmp_path / name)}, changes, progress=False)
        assert adapter_content(tmp_path / name) != adapter_content(tmp_path / "run")


def test_interrupted_again_it_needs_no_second_word(
    recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also from a checkpoint that the former recipe left: that is told with what was changed since."""
    made, faster = recipe(), recipe(learning_rate=0.02)
    fastest = recipe(learning_rate=0.04, weight_decay=0.5)
    train_until(monkeypatch, StopAfter(2), made)
    for changed in (faster, fastest):
        with monkeypatch.context() as patch:
            patch.setattr("tests.training.conftest.train", partial(train, override=True))
            train_until(patch, StopAfter(2), changed)
    for step in (4, 5, 6):  # 5 is the end of the first epoch
        shutil.rmtree(tmp_path / f"run/checkpoints/checkpoint-{step}")
    quietly(fastest)
    entries = resumed(tmp_path / "run")
    assert [entry["step"] for entry in entries] == [2, 4, 2]
    assert [entry["override"]["recipe"] for entry in entries] == [
        {"training.learning_rate": [0.01, 0.02]},
        {"training.learning_rate": [0.02, 0.04], "training.weight_decay": [0.01, 0.5]},
        {"training.learning_rate": [0.01, 0.04], "training.weight_decay": [0.01, 0.5]},
    ]


def test_what_cannot_change_on_the_way(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    train_until(monkeypatch, StopAfter(2), recipe())
    fixed = [
        ("method.r", "8"),
        ("method.sample_scale", "relative:0.1"),
        ("seed", "1"),
        ("model.dtype", "bfloat16"),
        ("training.mode", "post_hoc"),
    ]
    for key, value in fixed:
        with pytest.raises(CheckpointError, match=rf"changed; {key} cannot change on the way") as refused:
            override(recipe(), [(key, value), ("training.learning_rate", "0.02")])
        assert "--override" not in refused.value.hint
        with pytest.raises(CheckpointError, match=f"{key} changed") as refused:
            train(recipe(), [(key, value)], progress=False)
        assert "--override" not in refused.value.hint
    run = RunFolder(tmp_path / "run")
    assert run.recipe == load_recipe(recipe())
    assert "resumed" not in run.environment


def test_a_finished_run_stays_what_it_is(recipe: MakeRecipe, tmp_path: Path) -> None:
    quietly(recipe(max_steps=2))
    with pytest.raises(CheckpointError, match=r"training\.max_steps changed, and is finished"):
        override(recipe(max_steps=3))
    assert RunFolder(tmp_path / "run").recipe == load_recipe(recipe(max_steps=2))
    assert override(recipe(max_steps=2)).steps == 2


def test_nothing_to_go_on_from_is_a_new_run(
    recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    train_until(monkeypatch, StopAfter(2), recipe(name="new"))
    shutil.rmtree(tmp_path / "new/checkpoints")
    with (tmp_path / "new/metrics.jsonl").open("a") as file:
        file.write(json.dumps({"event": "train", "step": 1}) + "\n")
    override(recipe(name="new", learning_rate=0.02))
    quietly(recipe(name="same", learning_rate=0.02))
    assert adapter_content(tmp_path / "new") == adapter_content(tmp_path / "same")
    assert "resumed" not in RunFolder(tmp_path / "new").environment


def test_changed_data(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = recipe()
    copy = tmp_path / "rows.jsonl"
    copy.write_bytes(Path(made["data"]["task"]).read_bytes())
    made["data"]["task"] = str(copy)
    train_until(monkeypatch, StopAfter(2), made)
    before = copy.read_text()
    copy.write_text(before + '{"text": "w1", "label": 2}\n' * 4)
    with pytest.raises(CheckpointError, match="has other labels than"):
        override(made)
    copy.write_text(before + '{"text": "w1", "label": 0}\n')
    with pytest.raises(CheckpointError, match=r"the train rows of .*rows.jsonl changed .*--override"):
        quietly(made)
    override(made)
    (entry,) = resumed(tmp_path / "run")
    assert entry["override"]["recipe"] == {}
    assert f"the train rows of {copy}" in entry["override"]["data"]
    assert RunFolder(tmp_path / "run").environment["data"]["splits"]["train"]["rows"] == 39
    assert f"other train rows of {copy}" in overrides_of(RunFolder(tmp_path / "run").environment)[0]


def test_an_ordinary_resumption_overrides_nothing(
    recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    train_until(monkeypatch, StopAfter(2), recipe())
    override(recipe())
    assert resumed(tmp_path / "run") == [{"step": 2, "changes": []}]
    assert overrides_of(RunFolder(tmp_path / "run").environment) == []


def test_a_checksum_of_another_version_is_no_other_recipe(
    recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("monteclora.runs.environment.recipe_sha256", lambda recipe: "former")
        train_until(patch, StopAfter(2), recipe())
    train_until(monkeypatch, StopAfter(2), recipe())
    quietly(recipe())
    assert [entry["step"] for entry in resumed(tmp_path / "run")] == [2, 4]
    assert all("override" not in entry for entry in resumed(tmp_path / "run"))


def test_a_folder_of_other_files_is_left_alone(tmp_path: Path) -> None:
    for name in ("notes.txt", "recipe.yaml"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text("mine")
        run = RunFolder(folder)
        with pytest.raises(CheckpointError, match="holds files and is no run"), run.locked():
            pytest.fail("the folder was taken")
        assert [entry.name for entry in folder.iterdir()] == [name]
        assert (folder / name).read_text() == "mine"


def test_a_finished_run_whose_data_changed_since_is_refused(recipe: MakeRecipe, tmp_path: Path) -> None:
    made = recipe(max_steps=1)
    rows = Path(made["data"]["task"]).read_text().splitlines(keepends=True)
    data = tmp_path / "train.jsonl"
    data.write_text("".join(rows[:-1]))
    made["data"]["task"] = str(data)
    assert quietly(made).steps == quietly(made).steps == 1
    data.write_text("".join(rows[1:]))
    with pytest.raises(CheckpointError, match=r"train rows of .*train\.jsonl changed since .* and it is finished"):
        quietly(made)
