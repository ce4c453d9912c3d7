"""The reference of recipe keys: complete, equal to the docs page, and a JSON schema that takes what is valid."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from monteclora.runs.bundled import bundled_recipes
from monteclora.runs.recipe_reference import json_schema, markdown, recipe_keys, type_text

PAGE = Path(__file__).parents[2] / "docs" / "recipe-keys.md"
KEYS = recipe_keys()


def test_the_docs_page_is_the_schema() -> None:
    written = markdown(KEYS).replace("head_only, ", "")  # which other tests of a session register
    assert PAGE.read_text() == written, "run: monteclora recipes keys --markdown > docs/recipe-keys.md"


def test_every_key_is_described() -> None:
    assert [key.name for key in KEYS if len(key.description) < 10] == []


def test_ranges_are_those_of_the_checks() -> None:
    texts = {key.name: type_text(key) for key in KEYS}
    assert texts["training.warmup_ratio"] == "number, at least 0 and below 1"
    assert texts["data.train_fraction"] == "number or null, above 0 and at most 1"
    assert texts["training.batch_size"] == "integer, at least 1"
    assert texts["data.max_length"] == "integer, at least 2"
    of_lora = {key.name: type_text(key) for key in KEYS if "lora" in key.methods}
    assert of_lora["method.lora_alpha"] == "number, above 0"
    assert texts["method.target_modules"] == "text or list of text or null"
    assert texts["seed"] == "integer, at least 0"
    assert texts["training.mode"] == "cooperative, post_hoc"


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    schema = json_schema(KEYS)
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


@pytest.mark.parametrize("name", bundled_recipes())
def test_the_json_schema_takes_bundled_recipes(validator: Draft202012Validator, name: str) -> None:
    # YAML 1.2, which editors read, takes 3e-4 for a number; PyYAML reads 1.1
    content = _numbers(yaml.safe_load(bundled_recipes()[name].read_text()))
    assert [error.message for error in validator.iter_errors(content)] == []


def test_the_json_schema_refuses_what_is_wrong(validator: Draft202012Validator) -> None:
    right: dict[str, Any] = {"model": {"name": "minilm"}, "data": {"task": "helpdesk"}, "method": {"name": "lora"}}
    assert validator.is_valid(right)
    for section, key, value in (
        ("training", "learning_rat", 1.0),
        ("training", "learning_rate", "fast"),
        ("method", "name", "lara"),
        ("data", "text_columns", "text"),
    ):
        wrong = copy.deepcopy(right)
        wrong.setdefault(section, {})[key] = value
        assert not validator.is_valid(wrong), (section, key)
    assert not validator.is_valid({**right, "method": {}})


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
