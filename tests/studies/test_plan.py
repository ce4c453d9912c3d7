from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from monteclora.errors import ConfigError, DataError
from monteclora.studies.folder import StudyFolder
from monteclora.studies.plan import Plan, Trial, make_plan
from monteclora.studies.recipe import load_study
from monteclora.studies.study import study
from tests.tasks.rows import ARC, write_split

Make = Callable[..., dict[str, Any]]

RATES = {"training.learning_rate": [1e-3, 1e-2], "seed": [0]}


def plan(recipe: dict[str, Any]) -> Plan:
    return make_plan(load_study(recipe))


def rates(found: Plan, arm: str) -> list[float]:
    return sorted(trial.settings["training.learning_rate"] for trial in found.trials if trial.arm == arm)


@pytest.mark.parametrize("metric", ["perplexity", "token_accuracy", "accuracy_per_byte"])
def test_a_metric_that_the_task_does_not_have_is_refused(make_study: Make, metric: str) -> None:
    with pytest.raises(ConfigError, match=rf"metric is {metric}, and .* has accuracy, f1, mcc, nll, brier, ece"):
        study(make_study(metric=metric), workers=0, progress=False)


@pytest.mark.parametrize(("metric", "applies"), [("mcc", False), ("perplexity", False), ("accuracy_per_byte", True)])
def test_the_metrics_of_a_task_are_those_of_its_rows(
    make_study: Make, tmp_path: Path, metric: str, applies: bool
) -> None:
    for split in ("train", "test"):
        write_split(tmp_path, "arc_easy", split, [{**ARC, "question": f"Which of {i}?"} for i in range(20)])
    recipe = make_study(metric=metric)
    recipe["base"]["data"] = {"task": "arc_easy", "folder": str(tmp_path)}
    if applies:
        assert len(plan(recipe).trials) == 8
    else:
        with pytest.raises(ConfigError, match=f"metric is {metric}, and arc_easy has accuracy, nll, brier, ece, acc"):
            plan(recipe)


def test_a_rate_found_by_another_rule_makes_another_trial(make_study: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe says ``auto`` all the same, and the result is another one."""
    grid = {"training.learning_rate": [1e-3, "auto"], "method.name": ["lora"], "seed": [0]}

    def ids() -> dict[Any, str]:
        return {trial.settings["training.learning_rate"]: trial.id for trial in plan(make_study(grid=grid)).trials}

    now = ids()
    monkeypatch.setattr("monteclora.studies.plan.RANGE_TEST_VERSION", 99)
    later = ids()
    assert later["auto"] != now["auto"]
    assert later[1e-3] == now[1e-3]


def test_a_split_that_the_data_do_not_have_is_refused(make_study: Make, tmp_path: Path) -> None:
    recipe = make_study(split="test")
    rows = "".join(json.dumps({"text": f"t{i}", "label": "ab"[i % 2]}) + "\n" for i in range(40))
    (tmp_path / "rows.jsonl").write_text(rows)
    recipe["base"]["data"] = {"train_file": str(tmp_path / "rows.jsonl")}
    with pytest.raises(DataError, match="has no test split"):
        plan(recipe)


def test_two_arms_with_one_trial_are_refused(make_study: Make) -> None:
    arms = {
        "plain": {"set": {"method.name": "lora"}},
        "gentle": {"set": {"method.name": "lora"}, "grid": {"training.learning_rate": [1e-3, 1e-4]}},
    }
    with pytest.raises(ConfigError, match=r"the arms plain and gentle have the same trial: .*0\.001"):
        plan(make_study(grid=RATES, arms=arms))


def test_a_key_that_an_arm_sets_and_varies_is_refused(make_study: Make) -> None:
    arm: dict[str, Any] = {"set": {"method.name": "lora", "method.r": 4}, "grid": {"method.r": [4, 8]}}
    with pytest.raises(ConfigError, match=r"arms\.low\.grid has method\.r, which the arm's set has too"):
        load_study(make_study(grid=RATES, arms={"low": arm}))
    with pytest.raises(ConfigError, match=r"arms\.lora\.grid has method\.name: name the method in set"):
        load_study(make_study(grid=RATES, arms={"lora": {"grid": {"method.name": ["lora", "dora"]}}}))
    arm["grid"] = {"training.batch_size": [8]}
    assert len(plan(make_study(grid=RATES, arms={"low": arm})).trials) == 2


def test_an_option_that_a_method_lacks_is_no_setting_of_its_trials(make_study: Make) -> None:
    found = plan(make_study(grid={**RATES, "method.name": ["lora", "monteclora"], "method.num_components": [2, 4]}))
    keys = {arm: {key for t in found.trials if t.arm == arm for key in t.settings} for arm in ("lora", "monteclora")}
    assert keys["lora"] == {"training.learning_rate"}
    assert keys["monteclora"] == {"training.learning_rate", "method.num_components"}
    assert not any("components" in trial.label for trial in found.trials if trial.arm == "lora")
    # each LoRA is started with what it is compared with
    seen = [(trial.arm, trial.settings["training.learning_rate"]) for trial in found.trials]
    assert {rate for _, rate in seen[:3]} == {seen[0][1]}
    assert sorted(arm for arm, _ in seen[:3]) == ["lora", "monteclora", "monteclora"]


@pytest.mark.parametrize("most", [2, 3, 4, 5])
def test_a_cut_leaves_no_arm_without_trials(make_study: Make, most: int) -> None:
    arms = {
        "a": {"set": {"method.name": "lora"}, "grid": {"training.learning_rate": [1e-3, 2e-3, 3e-3, 4e-3]}},
        "b": {"set": {"method.name": "monteclora"}, "grid": {"training.learning_rate": [1e-5, 2e-5]}},
    }
    found = plan(make_study(grid={"seed": [0, 1]}, arms=arms, max_trials=most))
    first = [sum(t.arm == arm for t in found.trials) for arm in ("a", "b")]
    assert first == {2: [1, 1], 3: [1, 1], 4: [2, 2], 5: [3, 2]}[most]
    assert {trial.seed for trial in found.trials} == {0}


def test_a_cut_within_the_first_comparison_leaves_no_arm_without_trials(make_study: Make) -> None:
    grid = {"method.name": ["lora", "monteclora"], "method.num_components": [2, 4, 8], "seed": [0]}
    found = plan(make_study(grid=grid, max_trials=2))
    assert sorted(trial.arm for trial in found.trials) == ["lora", "monteclora"]
    with pytest.raises(ConfigError, match="max_trials is 1, and the study compares 2 arms"):
        plan(make_study(grid=grid, max_trials=1))


def test_a_cut_keeps_the_cells_that_all_arms_have(make_study: Make) -> None:
    arms = {
        "a": {"set": {"method.name": "lora"}, "grid": {"training.learning_rate": [1e-4, 1e-3, 1e-2]}},
        "b": {"set": {"method.name": "monteclora"}, "grid": {"training.learning_rate": [1e-3, 1e-2, 1e-1]}},
    }
    found = plan(make_study(grid={"seed": [0]}, arms=arms, max_trials=4))
    assert rates(found, "a") == rates(found, "b") == [1e-3, 1e-2]


def test_a_study_folder_does_not_need_the_base_recipes_file(
    make_study: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base recipe stands beside the study recipe, and the study is run from somewhere else."""
    recipe = make_study(grid={"method.name": ["lora"], "seed": [0]})
    beside, elsewhere = tmp_path / "beside", tmp_path / "elsewhere"
    beside.mkdir()
    elsewhere.mkdir()
    (beside / "base.yaml").write_text(yaml.safe_dump(recipe["base"]))
    (beside / "safe.yaml").write_text(yaml.safe_dump({**recipe, "base": "base.yaml"}))
    monkeypatch.chdir(elsewhere)
    wanted = load_study(beside / "safe.yaml")
    folder = StudyFolder(wanted.folder)
    folder.write_recipe(wanted)
    shutil.rmtree(beside)
    assert isinstance(folder.recipe.base, dict)
    kept, inline = make_plan(folder.recipe), plan(recipe)
    assert [t.id for t in kept.trials] == [t.id for t in inline.trials]


def test_a_bundled_base_is_kept_with_its_content(tmp_path: Path) -> None:
    wanted = load_study("study-helpdesk-starter", str(tmp_path / "study"))
    folder = StudyFolder(wanted.folder)
    folder.write_recipe(wanted)
    assert isinstance(folder.recipe.base, dict)
    assert [t.id for t in make_plan(folder.recipe).trials] == [t.id for t in make_plan(wanted).trials]


def test_other_weights_and_another_template_under_the_same_path_make_other_trials(
    make_study: Make, assets: Path, tmp_path: Path
) -> None:
    model, template = tmp_path / "model", tmp_path / "template.jinja"
    shutil.copytree(assets / "bert", model)
    template.write_text("{{ messages }}")
    recipe = make_study(
        grid={"seed": [0]}, set={"model.name": str(model), "data.chat_template": str(template), "method.name": "lora"}
    )

    def trial() -> Trial:
        (found,) = plan(recipe).trials
        return found

    first = trial()
    assert trial().id == first.id
    (model / "README.md").write_text("a model")
    assert trial().id == first.id
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # the header, the size and the shapes stay
    weights.write_bytes(content)
    second = trial()
    assert second.id != first.id
    template.write_text("{{ messages[0] }}")
    assert trial().id not in (first.id, second.id)
    template.unlink()
    with pytest.raises(ConfigError, match=r"cannot read .*template\.jinja"):
        trial()
