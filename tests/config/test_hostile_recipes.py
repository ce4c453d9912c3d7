"""Whatever a recipe file holds, it becomes a recipe or one line that says what is wrong."""

from __future__ import annotations

import copy
import dataclasses
import random
import string
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from monteclora.config import build, dump, parse_yaml
from monteclora.errors import ConfigError, MonteCLoRAError
from monteclora.methods import get_method
from monteclora.runs.recipe import Recipe, load_recipe

VALID: dict[str, Any] = {
    "name": "trial",
    "model": {"name": "minilm", "dtype": "bfloat16"},
    "data": {"task": "helpdesk", "max_length": 64, "label_names": ["a", "b"]},
    "method": {"name": "monteclora", "r": 4, "sample_scale": "relative:0.3", "rank_pattern": {"query": 2}},
    "training": {"epochs": 2.0, "learning_rate": 1e-3, "best_metric": "nll", "post_hoc": {"epochs": 0.5}},
    "evaluation": {"num_samples": 4},
    "seed": 3,
}
METHODS = ("monteclora", "lora")
ODDITIES = (
    "\t",
    "\0",
    "\x1b[31m",
    "\r",
    "\u2028",
    "\ufeff",
    "&a ",
    "*a",
    "<<: *a\n",
    "--- \n",
    "...\n",
    "? ",
    "- ",
    "!!python/object/apply:os.system [true]",
    "!!int ",
    "!!binary ",
    "!<tag:%ff> ",
    "%YAML 1.1\n",
    "seed: 1\n",
    "seed: 1\nseed: 2\n",
    '"\\U00110000"',
    '"\\UFFFFFFFF"',
    '"\\ud800"',
    '"\\0"',
    ".nan",
    "-.inf",
    "1e999",
    "9" * 400,
    "9" * 5000,
    "0x" + "f" * 5000,
    "[" * 60,
    "{a: " * 60,
    "[" * 1000,
    "'",
    '"',
    ": ",
    "# ",
    "| \n",
    "training: {training: {training: 1}}\n",
    "name: ../../x\n",
)


def schema_paths(schema: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every key, of sections too."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        kind = get_method(prefix[0]).options if field.name == "method" and prefix else hints[field.name]
        yield (*prefix, field.name)
        if dataclasses.is_dataclass(kind):
            yield from schema_paths(kind, (*prefix, field.name))


KEYS = sorted(
    {*schema_paths(Recipe), *(("method", f.name) for f in dataclasses.fields(get_method("monteclora").options))}
)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 2**32, 10**299, 10**400]),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["lora", "../../x", "..", "1e-4", "relative:-1", "relative:nan", "(", "null", "\ud800", "a\0b"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def mappings(draw: st.DrawFn) -> dict[str, Any]:
    """The valid recipe with some keys set to anything, dropped or invented."""
    recipe = copy.deepcopy(VALID)
    recipe["method"] = {"name": draw(st.sampled_from(METHODS))} if draw(st.booleans()) else recipe["method"]
    for path in draw(st.lists(st.sampled_from(KEYS), max_size=3)):
        section: Any = recipe
        for name in path[:-1]:
            section = section.setdefault(name, {}) if isinstance(section, dict) else {}
        if isinstance(section, dict):
            section[path[-1]] = draw(values)
    for key in draw(st.lists(st.sampled_from(sorted(VALID)), max_size=1)):
        recipe.pop(key)
    recipe.update(draw(st.dictionaries(st.text(max_size=6), values, max_size=1)))
    return recipe


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A recipe as YAML, perhaps with something odd put in the middle, or anything at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=60))
    text = yaml.safe_dump(draw(mappings()), default_flow_style=draw(st.sampled_from([True, False, None])))
    for oddity in draw(st.lists(st.sampled_from(ODDITIES), max_size=2)):
        lines = text.splitlines(keepends=True)
        place = draw(st.integers(0, len(lines)))
        before = "".join(lines[:place])
        text = (before[:-1] if draw(st.booleans()) else before) + oddity + "".join(lines[place:])
    return text.encode("utf-8", errors="surrogatepass")


def recipe_or_one_line(source: Any) -> Recipe | str:
    """Anything else fails the test."""
    try:
        return load_recipe(source)
    except MonteCLoRAError as error:
        text = str(error)
        assert text.splitlines() == [text]
        assert text.isprintable() or not any(ord(c) < 32 or 0x7F <= ord(c) < 0xA0 for c in text)
        text.encode()  # no halves of characters
        assert len(text) < 20_000
        return text


def check_files(path: Path, examples: int) -> None:
    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(content=files())
    def check(content: bytes) -> None:
        path.write_bytes(content)
        found = recipe_or_one_line(path)
        if isinstance(found, Recipe):
            schema = dataclasses.make_dataclass("R", [("method", type(found.method))], bases=(Recipe,), frozen=True)
            again = build(schema, parse_yaml(dump(found)))
            assert dataclasses.asdict(again) == dataclasses.asdict(found), "what is read can be written and read again"
        else:
            assert str(path) in found, "the file is named"

    check()


def check_mappings(examples: int) -> None:
    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(mapping=mappings())
    def check(mapping: dict[str, Any]) -> None:
        recipe_or_one_line(mapping)

    check()


def test_any_recipe_is_a_recipe_or_one_line(tmp_path: Path) -> None:
    check_files(tmp_path / "recipe.yaml", 100)
    check_mappings(40)


@pytest.mark.slow
def test_any_of_2000_recipes_is_a_recipe_or_one_line(tmp_path: Path) -> None:
    check_files(tmp_path / "recipe.yaml", 1500)
    check_mappings(500)


def test_the_valid_recipe_is_valid() -> None:
    assert isinstance(recipe_or_one_line(VALID), Recipe)


def test_numbers_that_python_refuses_to_print_and_mappings_that_hold_themselves() -> None:
    assert "seed: expected an integer, found a number of 16,610 bits" in recipe_or_one_line({**VALID, "seed": 10**5000})
    endless: dict[str, Any] = {}
    endless["model"] = endless
    assert "nested too deeply" in recipe_or_one_line(endless)


def typo(key: str, generator: random.Random) -> str:
    place = generator.randrange(len(key))
    letter = generator.choice(string.ascii_lowercase + "_")
    return generator.choice(
        [
            key[:place] + letter + key[place:],
            key[:place] + key[place + 1 :],
            key[:place] + key[place : place + 2][::-1] + key[place + 2 :],
            key[:place] + letter + key[place + 1 :],
        ]
    )


def test_a_typo_of_a_key_has_the_right_key_suggested() -> None:
    generator = random.Random(0)
    typos: list[tuple[tuple[str, ...], str]] = []
    while len(typos) < 200:
        path = generator.choice(KEYS)
        wrong = typo(path[-1], generator)
        if wrong and (*path[:-1], wrong) not in KEYS:
            typos.append((path, wrong))
    missed = []
    for path, wrong in typos:
        mapping: Any = {wrong: 1}
        for name in reversed(path[:-1]):
            mapping = {name: mapping}
        with pytest.raises(ConfigError) as caught:
            load_recipe(mapping)
        if f"unknown key {'.'.join((*path[:-1], wrong))}, did you mean {'.'.join(path)}?" not in caught.value.message:
            missed.append(f"{'.'.join(path)}: {wrong}")
    print(f"{200 - len(missed)} of 200 typos: the right key is suggested; missed: {missed}")
    assert len(missed) <= 10


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('name: "\\U00110000"\n', "r.yaml, line 1: chr() arg not in range"),
        ("a: 1\nseed: !!int foo\n", "r.yaml, line 2: 'foo' is no int"),
        ("a: &x [1]\nb: [*x, *x]\n", "line 1: anchors and aliases are not allowed"),
        ('report_to: ["\\ud800"]\n', "line 1: report_to[0]: expected text without halves of characters"),
        (
            "training: {learning_rate: 1" + "0" * 400 + "}\n",
            "training.learning_rate: expected a finite number or auto, found inf",
        ),
        (
            "method: {name: lora, rank_pattern: {'(': 3}}\n",
            "line 1: method.rank_pattern has '(', which is neither a name",
        ),
        ("seed: 0x" + "f" * 9000 + "\n", "found the text '0xfff"),
    ],
)
def test_what_the_yaml_reader_would_stumble_over(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    found = recipe_or_one_line(path)
    assert isinstance(found, str)
    assert part in found
    assert len(found) < 1000
