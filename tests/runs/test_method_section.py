"""Old names of a method's fields."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from monteclora.errors import ConfigError
from monteclora.methods.monteclora import MonteCLoRAOptions
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
