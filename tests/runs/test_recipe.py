from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from monteclora.config import dump
from monteclora.errors import ConfigError
from monteclora.methods import list_methods
from monteclora.methods.lora import LoRAOptions
from monteclora.methods.monteclora import MonteCLoRAOptions
from monteclora.runs.bundled import bundled_recipes, former_names, summary
from monteclora.runs.determining import all_values, differences, recipe_sha256
from monteclora.runs.recipe import Recipe, load_recipe
from monteclora.tasks import list_tasks

SMALL = {"name": "small", "model": {"name": "minilm"}, "data": {"task": "helpdesk"}, "method": {"name": "lora"}}


def small(**sections: Any) -> dict[str, Any]:
    return {**SMALL, **sections}


# -- reading ---------------------------------------------------------------------------------------------------------


def test_the_method_decides_its_fields() -> None:
    assert isinstance(load_recipe(SMALL).method, LoRAOptions)
    found = load_recipe(small(method={"name": "monteclora", "num_components": 2})).method
    assert isinstance(found, MonteCLoRAOptions)
    assert found.num_components == 2
    assert isinstance(load_recipe(SMALL, [("method.name", "monteclora")]).method, MonteCLoRAOptions)


def test_every_problem_of_a_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(
        "model: {name: minilm, dtyp: float32}\n"
        "data: {task: mrpc, max_length: 1}\n"
        "method:\n  name: monteclora\n  kl_weigth: 1\n"
        "training: {batch_size: 8, micro_batch_size: 3, early_stopping_patience: 2, learning_rate: 0}\n"
        "evaluation: {bins: 0}\n"
    )
    with pytest.raises(ConfigError) as error:
        load_recipe(path)
    for part in (
        "line 1: unknown key model.dtyp, did you mean model.dtype?",
        "line 2: data.max_length must be at least 2",
        "line 5: unknown key method.kl_weigth, did you mean method.kl_weight?",
        "line 6: training.micro_batch_size is 3, expected a divisor of batch_size 8",
        "line 6: training.early_stopping_patience needs training.best_metric",
        "line 6: training.learning_rate is 0.0, expected above 0",
        "line 7: evaluation.bins is 0, expected at least 1",
        "Correct these 7 entries",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"name": "a/b"}, "name is 'a/b', expected a plain file name"),
        ({"seed": -1}, "seed is -1"),
        ({"training": {"mode": "post_hoc"}}, "the method lora has no posterior"),
        ({"training": {"warmup_ratio": 1}}, "warmup_ratio is 1.0"),
        ({"training": {"post_hoc": {"epochs": 0}}}, "training.post_hoc.epochs is 0.0, expected above 0"),
        ({"training": {"weight_decay": -0.1}}, "weight_decay is -0.1"),
        ({"method": {"name": "lara"}}, "recipe: there is no method 'lara'. Did you mean lora?"),
        ({"method": {"name": "lora", "kl_weight": 1}}, "unknown key method.kl_weight"),
        ({"method": {"r": 8, "name": ["lora"]}}, "there is no method like a list"),
        ({"method": "lora"}, "method: expected a mapping, found the text 'lora'"),
    ],
)
def test_what_is_wrong(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_recipe(small(**sections))
    assert message in str(error.value)


def test_the_name_is_that_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "cats.yaml"
    path.write_text("model: {name: minilm}\ndata: {task: helpdesk}\nmethod: {name: lora}\n")
    found = load_recipe(path)
    assert found.name == "cats"
    assert found.folder == Path("runs/cats")
    assert load_recipe(path, [("name", "dogs"), ("output", "elsewhere")]).folder == Path("elsewhere")


def test_names_of_bundled_recipes_and_files() -> None:
    assert load_recipe("helpdesk-minilm-lora").data.task == "helpdesk"
    with pytest.raises(ConfigError, match=r"Did you mean helpdesk-minilm-lora\?"):
        load_recipe("helpdesk-minilm-lorra")
    with pytest.raises(ConfigError, match=r"cannot read nowhere\.yaml"):
        load_recipe("nowhere.yaml")


@pytest.mark.parametrize("method", ["lora", "monteclora"])
def test_a_recipe_written_out_reads_back_equal(method: str, tmp_path: Path) -> None:
    found = load_recipe(small(method={"name": method, "rank_pattern": {"q.*": 2}, "target_modules": "all-linear"}))
    path = tmp_path / "again.yaml"
    path.write_text(dump(found))
    assert load_recipe(path) == found
    assert load_recipe(found) is found
    assert load_recipe(found, [("seed", "3")]).seed == 3
    if method == "monteclora":
        assert "sample_scale: null" in path.read_text()  # fidelity decides it, whatever fidelity becomes


# -- what determines the result --------------------------------------------------------------------------------------

FREE = [
    ("name", "b"),
    ("output", "elsewhere"),
    ("report_to", "[tensorboard]"),
    ("training.save_every", "7"),
    ("training.logging_every", "7"),
    ("training.keep_checkpoints", "7"),
    ("training.num_workers", "7"),
    ("evaluation.num_samples", "7"),
    ("evaluation.bins", "7"),
]
DECISIVE = [
    ("seed", "1"),
    ("model.dtype", "bfloat16"),
    ("data.max_length", "64"),
    ("method.r", "4"),
    ("training.eval_every", "7"),
    ("training.post_hoc.epochs", "2"),
    ("training.max_grad_norm", "null"),
    ("training.group_by_length", "true"),
]


@pytest.mark.parametrize("override", FREE, ids=lambda o: o[0])
def test_what_does_not_determine_the_result(override: tuple[str, str]) -> None:
    one, other = load_recipe(SMALL), load_recipe(SMALL, [override])
    assert one != other
    assert recipe_sha256(one) == recipe_sha256(other)
    assert differences(one, other) == []


def test_fields_at_their_defaults_do_not_count() -> None:
    written = load_recipe(SMALL, [("training.group_by_length", "false"), ("training.post_hoc.epochs", "1.0")])
    assert recipe_sha256(load_recipe(SMALL)) == recipe_sha256(written)


@pytest.mark.parametrize("override", DECISIVE, ids=lambda o: o[0])
def test_what_determines_the_result(override: tuple[str, str]) -> None:
    one, other = load_recipe(SMALL), load_recipe(SMALL, [override])
    assert recipe_sha256(one) != recipe_sha256(other)
    assert differences(one, other) == [override[0]]


def test_defaults_are_those_of_the_results_that_are_there() -> None:
    """A checksum leaves defaults out: with another default, outcomes of the former one would be taken for its own.

    A new field is added to the file, with the default that does what was done before. To change one, make its former
    value part of what ``recipe_sha256`` takes down.
    """
    found: dict[str, dict[str, Any]] = {}
    own = [method.name for method in list_methods() if type(method).__module__.startswith("monteclora.")]
    for method in own:  # tests register others
        defaults = all_values(load_recipe(small(method={"name": method})))
        found["every method"] = {key: value for key, value in defaults.items() if not key.startswith("method.")}
        found[method] = {key: value for key, value in defaults.items() if key.startswith("method.")}
    assert found == json.loads((Path(__file__).parent / "defaults.json").read_text())


def test_differences_between_methods_name_their_fields() -> None:
    one, other = load_recipe(SMALL), load_recipe(small(method={"name": "monteclora"}))
    found = differences(one, other)
    assert {"method.name", "method.kl_weight", "method.num_components"} <= set(found)


# -- the bundled ones ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", bundled_recipes())
def test_bundled_recipes(name: str) -> None:
    path = bundled_recipes()[name]
    found = load_recipe(name)
    assert found.name == name
    assert len(summary(path)) > 30
    assert "Limits" in path.read_text() or "As published" in path.read_text()
    assert found.data.task in {task.name for task in list_tasks()}


@pytest.mark.parametrize("name", bundled_recipes())
def test_bundled_recipes_take_every_method(name: str) -> None:
    """Nothing but the method's own section differs, so that results can be compared."""
    default = load_recipe(name)
    for method in list_methods():
        found = load_recipe(name, [("method.name", method.name)])
        assert found.method.name == method.name
        assert all(key.startswith("method.") for key in differences(default, found))


@pytest.mark.parametrize("name", [name for name in bundled_recipes() if name.startswith("paper-")])
def test_every_row_of_the_paper_has_a_twin_for_a_laptop(name: str) -> None:
    row = name.removesuffix("-starter")
    assert {row, f"{row}-starter"} <= set(bundled_recipes())
    assert (load_recipe(name).model.name in ("minilm", "smollm2")) == name.endswith("-starter")


@pytest.mark.parametrize("name", former_names())
def test_earlier_names_still_work(name: str, caplog: pytest.LogCaptureFixture) -> None:
    current, method = former_names()[name]
    found = load_recipe(name)
    assert (found.name, found.method.name) == (name, method)  # the run folder keeps its name
    assert not differences(found, load_recipe(current, [("method.name", method)]))
    assert f"{name} is read as {current} --method.name {method}" in caplog.text
    assert load_recipe(name, [("method.name", "full")]).method.name == "full"


def test_earlier_names_have_their_settings() -> None:
    """What a run of an earlier version was made with, so that its folder is recognised."""
    found = load_recipe("paper-cola-roberta-monteclora")
    assert (found.data.task, found.method.r, found.method.sample_scale) == ("cola", 8, 5e-3)
    assert (found.training.epochs, found.training.batch_size, found.training.learning_rate) == (10, 32, 5e-4)
    found = load_recipe("mrpc-minilm-lora")
    assert (found.training.epochs, found.training.batch_size, found.training.group_by_length) == (5, 16, True)
    found = load_recipe("arc-easy-smollm2-lora")
    assert (found.data.task, found.data.train_rows, found.training.learning_rate) == ("arc_easy_instruct", 1000, 2e-4)


@pytest.mark.parametrize("name", [name for name in bundled_recipes() if name.endswith("-minilm-lora")])
def test_bundled_pairs_differ_in_the_method_alone(name: str) -> None:
    pair = load_recipe(name), load_recipe(f"{name.removesuffix('lora')}monteclora")
    assert all(key.startswith("method.") for key in differences(*pair))
    shared = {field: getattr(pair[0].method, field) for field in vars(pair[0].method) if field != "name"}
    assert shared == {field: getattr(pair[1].method, field) for field in shared}
    assert isinstance(pair[0], Recipe)


def test_no_two_methods_make_the_same_recipe() -> None:
    names = [method.name for method in list_methods()]
    checksums = {recipe_sha256(load_recipe(small(method={"name": name}))) for name in names}
    assert len(checksums) == len(names)
