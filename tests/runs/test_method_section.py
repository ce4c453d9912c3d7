"""Old names of a method's fields, fields of another method, and what is given beside what it stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from monteclora.config import dump
from monteclora.errors import ConfigError
from monteclora.methods.monteclora import MonteCLoRAOptions
from monteclora.runs.determining import differences, recipe_sha256
from monteclora.runs.recipe import load_recipe


def recipe(**method: Any) -> dict[str, Any]:
    return {"name": "small", "model": {"name": "minilm"}, "data": {"task": "helpdesk"}, "method": method}


def components(found: Any) -> int:
    assert isinstance(found.method, MonteCLoRAOptions)
    return found.method.num_components


def test_an_old_name_is_read_as_the_present_one_with_a_note(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "old.yaml"
    path.write_text("model: {name: minilm}\ndata: {task: helpdesk}\nmethod:\n  num_samples: 7\n")
    assert components(load_recipe(path)) == 7
    assert caplog.messages == [f"{path}, line 4: method.num_samples is read as method.num_components, its present name"]
    assert components(load_recipe(path, [("method.num-components", "9")])) == 9


def test_an_old_name_on_the_command_line(caplog: pytest.LogCaptureFixture) -> None:
    found = load_recipe(recipe(name="monteclora", num_components=3), [("method.num-samples", "5")])
    assert components(found) == 5
    assert caplog.messages == ["--method.num_samples is read as --method.num_components, its present name"]


def test_the_present_name_and_draws_of_a_prediction_are_not_remarked_on(caplog: pytest.LogCaptureFixture) -> None:
    found = load_recipe(recipe(num_components=3), [("evaluation.num_samples", "5")])
    assert (components(found), found.evaluation.num_samples) == (3, 5)
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        ({"num_samples": 2, "num_components": 2}, []),
        ({}, [("method.num_samples", "2"), ("method.num_components", "2")]),
    ],
)
def test_both_names_are_an_error(method: dict[str, Any], overrides: list[tuple[str, str]]) -> None:
    with pytest.raises(ConfigError, match=r"method\.num_samples and method\.num_components are two names") as error:
        load_recipe(recipe(**method), overrides)
    assert error.value.hint == "Keep method.num_components."


def test_methods_that_never_had_the_field_do_not_know_it() -> None:
    with pytest.raises(ConfigError, match=r"unknown key method\.num_samples"):
        load_recipe(recipe(name="lora", num_samples=2))


def test_another_method_leaves_out_the_fields_that_only_the_first_has(caplog: pytest.LogCaptureFixture) -> None:
    given = recipe(name="monteclora", r=4, kl_weight=0.5, noise="per_example")
    assert load_recipe(given, [("method.name", "lora")]).method == load_recipe(recipe(name="lora", r=4)).method
    (message,) = caplog.messages
    assert message == ("recipe: the method is lora, which has no use for method.kl_weight, method.noise: left out")
    caplog.clear()
    assert load_recipe(load_recipe(given), [("method.name", "lora")]).method.r == 4
    assert "method.kl_weight" in caplog.messages[0]


def test_a_field_of_no_method_is_still_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown key method\.kl_weigth"):
        load_recipe(recipe(name="monteclora", kl_weigth=1), [("method.name", "lora")])


def resolved(found: Any) -> tuple[Any, ...]:
    method = found.method.resolved()
    return method.sample_scale, method.regulariser, method.normalised


PAPER = (5e-3, "sampled", False)


def test_fidelity_over_a_recipe_that_was_loaded_or_written_out(tmp_path: Path) -> None:
    loaded = load_recipe(recipe(name="monteclora"))
    assert resolved(loaded) == ("relative:0.3", "expected", True)
    path = tmp_path / "again.yaml"
    path.write_text(dump(loaded))
    for source in (loaded, path):
        assert resolved(load_recipe(source, [("method.fidelity", "paper")])) == PAPER


def test_what_is_written_out_and_what_it_stands_for_are_one_recipe() -> None:
    plain = load_recipe(recipe(name="monteclora"))
    written = load_recipe(recipe(sample_scale="relative:0.3", regulariser="expected", normalised=True))
    assert recipe_sha256(plain) == recipe_sha256(written)
    assert differences(plain, written) == []
    paper = load_recipe(plain, [("method.fidelity", "paper")])
    assert differences(plain, paper) == [
        "method.fidelity",
        "method.normalised",
        "method.regulariser",
        "method.sample_scale",
    ]
