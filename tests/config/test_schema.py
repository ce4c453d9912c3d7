from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from monteclora.config import build, dump, parse_yaml
from monteclora.errors import ConfigError


@dataclass(frozen=True)
class Training:
    learning_rate: float = 1e-3
    batch_size: int = 8
    schedule: Literal["linear", "cosine"] = "linear"
    early_stopping: int | None = None
    freeze: bool = False

    def problems(self) -> list[tuple[str, str]]:
        return [("learning_rate", "must be positive")] if self.learning_rate <= 0 else []


@dataclass
class Adapter:
    r: int = 8
    sample_scale: float | str = 0.1
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    rank_pattern: dict[str, int] = field(default_factory=dict)
    betas: tuple[float, ...] = (0.9, 0.999)


@dataclass(frozen=True)
class Recipe:
    name: str
    training: Training = field(default_factory=Training)
    adapter: Adapter | None = None
    stages: list[Training] = field(default_factory=list)
    extra: Any = None


FULL = """\
name: trial
training:
  learning_rate: 1e-4
  schedule: cosine
adapter:
  sample_scale: relative:0.3
  target_modules: [query, value]
  rank_pattern: {layer.0: 4}
stages:
  - batch_size: 2
"""


def refusal(text: str, *overrides: tuple[str, str]) -> str:
    with pytest.raises(ConfigError) as caught:
        build(Recipe, parse_yaml(text, "r.yaml"), overrides)
    assert "\n" not in str(caught.value)
    return caught.value.message


def test_every_kind_of_field_is_read():
    recipe = build(Recipe, parse_yaml(FULL))
    assert recipe == Recipe(
        name="trial",
        training=Training(learning_rate=1e-4, schedule="cosine"),
        adapter=Adapter(sample_scale="relative:0.3", target_modules=["query", "value"], rank_pattern={"layer.0": 4}),
        stages=[Training(batch_size=2)],
    )


def test_all_problems_of_a_file_are_told_together_with_their_lines():
    message = refusal("training:\n  lerning_rate: 1\n  batch_size: true\n  schedule: exponential\nfoo: 1\n")
    assert message.split("; ") == [
        "r.yaml, line 2: unknown key training.lerning_rate, did you mean training.learning_rate?",
        "r.yaml, line 3: training.batch_size: expected an integer, found true",
        "r.yaml, line 4: training.schedule: expected one of linear, cosine, found the text 'exponential'",
        "r.yaml, line 5: unknown key foo, expected one of name, training, adapter, stages, extra",
        "r.yaml, line 1: name is missing",
    ]


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("nme", "did you mean name?"),
        ("learning_rte", "did you mean training.learning_rate?"),
        ("training.learning_rate", "did you mean training.learning_rate?"),
        ("target_module", "did you mean adapter.target_modules?"),
    ],
)
def test_the_nearest_key_is_named_own_level_first(key, suggestion):
    assert suggestion in refusal(f"name: x\n{key}: 1\n")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("learning_rate: fast", "a finite number, found the text 'fast'"),
        ("learning_rate: '1e-4'", "a finite number, found the text '1e-4'"),
        ("learning_rate: .nan", "a finite number, found nan"),
        ("learning_rate: -.inf", "a finite number, found -inf"),
        ("learning_rate: true", "a finite number, found true"),
        ("learning_rate: null", "a finite number, found null"),
        ("batch_size: 8.0", "an integer, found 8.0"),
        ("batch_size: [8]", "an integer, found a list"),
        ("freeze: yes", "true or false, found the text 'yes'"),
        ("freeze: 1", "true or false, found 1"),
        ("early_stopping: soon", "an integer or null, found the text 'soon'"),
    ],
)
def test_a_wrong_type_names_the_expected_one(line, expected):
    message = refusal(f"name: x\ntraining:\n  {line}\n")
    assert message == f"r.yaml, line 3: training.{line.split(':')[0]}: expected {expected}"


def test_list_items_and_mapping_values_are_checked_where_they_stand():
    message = refusal("name: x\nadapter:\n  target_modules:\n    - query\n    - 3\n  rank_pattern: {a: x}\n")
    assert "r.yaml, line 5: adapter.target_modules[1]: expected text, found 3" in message
    assert "r.yaml, line 6: adapter.rank_pattern.a: expected an integer" in message
    assert refusal("name: [x]\nstages: {}\n").count(";") == 1
    assert "stages[0].batch_size" in refusal("name: x\nstages: [{batch_size: q}]\n")


def test_yaml_scalars_follow_version_1_2():
    recipe = build(Recipe, parse_yaml("name: no\nextra: [1e-4, 0o17, 0x1F, 1_000, 12:30, off, ~, 2024-01-01, .inf]\n"))
    assert recipe.name == "no"
    assert recipe.extra == [1e-4, 15, 31, "1_000", "12:30", "off", None, "2024-01-01", float("inf")]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("name: x\nname: y\n", "line 2: the key name is given twice"),
        (
            "name: x\ntraining:\n  batch_size: 1\n  batch_size: 1\n",
            "line 4: the key batch_size is given twice",
        ),
        ("name: !!python/object/apply:os.system ['true']\n", "line 1: the YAML tag !!python/object/apply"),
        ("name: !!binary aGVsbG8=\n", "line 1: the YAML tag !!binary is not allowed"),
        ("name: x\n1: y\n", "line 2: the key '1' is not text"),
    ],
)
def test_what_yaml_lets_pass_and_a_recipe_does_not(text, part):
    assert part in refusal(text)


def test_validation_hooks_are_collected_with_the_line_of_their_field():
    text = "name: x\ntraining:\n  batch_size: 2\n  learning_rate: -1\nstages:\n  - learning_rate: 0\n"
    assert refusal(text) == (
        "r.yaml, line 4: training.learning_rate must be positive; "
        "r.yaml, line 6: stages[0].learning_rate must be positive"
    )


def test_an_empty_section_means_its_defaults_and_an_empty_file_its_missing_keys():
    assert build(Recipe, parse_yaml("name: x\ntraining:\n  # nothing set\nadapter:\n")) == Recipe("x")
    assert refusal("") == "r.yaml: name is missing"


def test_overrides_replace_add_and_are_typed_by_the_field():
    recipe = build(
        Recipe,
        parse_yaml(FULL),
        [
            ("training.learning-rate", "1"),
            ("training.learning_rate", "5e-5"),
            ("training.early_stopping", "null"),
            ("adapter.target_modules", "[key]"),
            ("adapter.sample_scale", "relative:1"),
            ("name", "2024"),
        ],
    )
    assert recipe.training.learning_rate == 5e-5
    assert recipe.adapter is not None
    assert (recipe.adapter.target_modules, recipe.adapter.sample_scale) == (["key"], "relative:1")
    assert recipe.name == "2024"
    assert recipe.training.schedule == "cosine"
    assert build(Recipe, {"name": "x"}, [("adapter.r", "4"), ("name", "a: b: c")]).name == "a: b: c"


def test_a_wrong_override_is_named_as_it_was_typed():
    message = refusal("name: x\n", ("training.lr", "1"), ("training.batch_size", "many"), ("adapterr.r", "3"))
    assert "--training.lr: unknown key training.lr" in message
    assert "--training.batch_size: training.batch_size: expected an integer, found the text 'many'" in message
    assert "unknown key adapterr, did you mean adapter?" in message


def test_a_mapping_is_as_good_as_a_file_and_as_strict():
    assert build(Recipe, {"name": "x", "adapter": {"betas": (0.5, 1)}}).adapter == Adapter(betas=(0.5, 1.0))
    with pytest.raises(ConfigError, match=r"recipe: training\.batch_size: expected an integer, found <object"):
        build(Recipe, {"name": "x", "training": {"batch_size": object()}})


def test_dump_reads_back_equal():
    recipe = build(Recipe, parse_yaml(FULL))
    assert build(Recipe, parse_yaml(dump(recipe))) == recipe


@given(
    text=st.text(st.characters(exclude_categories=["Cs"]))
    | st.sampled_from(["1e-4", "no", "0o7", "~", "1_0", "2024-01-01"]),
    rate=st.floats(min_value=1e-300, max_value=1e300),
    mapping=st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.integers()),
)
def test_dump_round_trips_any_text_and_number(text, rate, mapping):
    recipe = Recipe(name=text, training=Training(learning_rate=rate), adapter=Adapter(rank_pattern=mapping))
    written = dump(recipe)
    assert build(Recipe, parse_yaml(written)) == recipe
    assert yaml.safe_load(written)["name"] == text, "other YAML readers must see the same text"
