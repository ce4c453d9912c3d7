"""Centring against tables worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow.parquet as pq
import pytest

from monteclora.errors import ConfigError
from monteclora.studies.centring import Centred, centre
from monteclora.studies.folder import Outcome
from monteclora.studies.plan import Plan, Trial
from monteclora.studies.recipe import Centre, load_study
from monteclora.studies.study import study
from monteclora.studies.summary import compare, summarise
from monteclora.studies.tables import write_tables

KEY = "training.learning_rate"

# (validation, test) accuracy by arm and learning rate, of seeds 0 and 1. Arm b is as robust as a, its rates are lower:
# as given, a has two bad rates and b one. The test accuracy of a is best at 0.1, where its validation is not.
Cells = dict[tuple[str, float], list[tuple[float, float] | None]]
TABLE: Cells = {
    ("a", 0.001): [(0.5, 0.5), (0.5, 0.5)],
    ("a", 0.01): [(0.7, 0.6), (0.7, 0.7)],
    ("a", 0.1): [(0.8, 0.99), (0.6, 0.99)],
    ("a", 1.0): [(0.8, 0.7), (0.9, 0.8)],
    ("a", 10.0): [None, (0.7, 0.6)],
    ("b", 0.001): [(0.7, 0.6), (0.7, 0.7)],
    ("b", 0.01): [(0.9, 0.8), (0.9, 0.8)],
    ("b", 0.1): [(0.7, 0.7), (0.7, 0.6)],
    ("b", 1.0): [(0.5, 0.4), (0.5, 0.4)],
}


def made(table: Cells = TABLE, split: str = "test", values: int = 3) -> tuple[Plan, dict[str, Outcome]]:
    trials, outcomes = [], {}
    for (arm, rate), seeds in table.items():
        for seed, cell in enumerate(seeds):
            name = f"{arm}{rate}{seed}"
            trials.append(Trial(name, arm, {"data.x": 1}, {KEY: rate}, seed, cast(Any, None), split=split))
            skill = {"no_skill": {"accuracy": 0.5}, "rows": 100}
            outcomes[name] = Outcome(name, "diverged", **skill) if cell is None else Outcome(
                name, "finished", metrics={"accuracy": cell[1]}, validation={"accuracy": cell[0]}, **skill
            )  # fmt: skip
    return Plan(cast(Any, SimpleNamespace(metric=None, centre=Centre(values=values))), tuple(trials)), outcomes


def windows(found: Centred) -> dict[str, tuple[float, tuple[float, ...], str]]:
    return {window.arm: (window.best, window.values, window.edge) for window in found.windows}


def test_each_arm_is_seen_around_the_value_that_is_best_on_the_validation_rows() -> None:
    plan, outcomes = made()
    found = centre(plan, outcomes)
    # validation of a: 0.5, 0.7, 0.7, 0.85, (the worst, 0.5, and 0.7); of b: 0.7, 0.9, 0.7, 0.5
    assert windows(found) == {"a": (1.0, (0.1, 1.0, 10.0), ""), "b": (0.01, (0.001, 0.01, 0.1), "")}
    assert {(t.arm, t.settings[KEY]) for t in found.plan.trials} == {(arm, n) for arm in "ab" for n in (-1, 0, 1)}
    a, b = summarise(found.plan, outcomes, plan)
    # a, seed 0: 0.99, 0.7, diverged at no skill's 0.5; seed 1: 0.99, 0.8, 0.6. b: 0.6, 0.8, 0.7; 0.7, 0.8, 0.6
    assert a.statistics["spread"].value == pytest.approx((0.49 + 0.39) / 2)
    assert b.statistics["spread"].value == pytest.approx(0.2)
    assert b.statistics["median"].value == pytest.approx(0.7)
    assert (a.trials, a.diverged, b.trials) == (6, 1, 6)
    # the best of all runs is still 0.99
    assert b.statistics["regret"].value == pytest.approx(0.99 - 0.7)
    (pair,) = compare(found.plan, outcomes, plan)
    # place by place, seed 0: 0.39, -0.1, -0.2; seed 1: 0.29, 0.0, 0.0
    assert (pair.cells, pair.better, pair.worse) == (6, 2, 2)
    assert pair.difference.value == pytest.approx((0.09 / 3 + 0.29 / 3) / 2)


def test_the_evaluated_rows_have_no_part_in_the_choice() -> None:
    plan, outcomes = made()
    before = windows(centre(plan, outcomes))
    other = {
        name: Outcome(name, o.status, "", {"accuracy": 0.123}, validation=o.validation) for name, o in outcomes.items()
    }
    assert windows(centre(plan, other)) == before
    found = centre(*made(split="validation"))
    assert not found.plan.trials
    assert found.notes[0].startswith("not centred (x 1): the validation rows")


def test_a_best_value_at_an_end_is_said_and_has_as_many_values() -> None:
    table = {cell: seeds for cell, seeds in TABLE.items() if cell not in {("a", 10.0), ("b", 0.001)}}
    found = centre(*made(table))
    assert windows(found) == {"a": (1.0, (0.01, 0.1, 1.0), "highest"), "b": (0.01, (0.01, 0.1, 1.0), "lowest")}
    fewer = {cell: seeds for cell, seeds in TABLE.items() if cell not in {("b", 0.1), ("b", 1.0)}}
    found = centre(*made(fewer))  # as many as the arm with the fewest has: of two equally near ones the lower
    assert windows(found) == {"a": (1.0, (0.1, 1.0), ""), "b": (0.01, (0.001, 0.01), "highest")}


def test_the_lowest_of_equally_good_values_is_the_best_one() -> None:
    table: Cells = {("a", rate): [(0.7, 0.7)] for rate in (3.0, 1.0, 2.0, 4.0)}
    assert windows(centre(*made(table)))["a"] == (1.0, (1.0, 2.0, 3.0), "lowest")


@pytest.mark.parametrize(
    ("keep", "values", "said"),
    [
        (("a", 1.0), 3, "an arm has a single learning rate"),
        (("a", 1.0, 10.0), 3, "every arm has just 2 values of learning rate"),
    ],
)
def test_what_cannot_be_centred_is_said(keep: tuple[Any, ...], values: int, said: str) -> None:
    arm, *rates = keep
    found = centre(*made({(arm, rate): TABLE[arm, rate] for rate in rates}, values=values))
    assert (found.windows, found.notes) == ((), (f"not centred (x 1): {said}",))


def test_without_validation_rows_nothing_is_centred() -> None:
    plan, outcomes = made()
    bare = {name: Outcome(name, o.status, metrics=o.metrics) for name, o in outcomes.items()}
    assert "there are no validation rows" in centre(plan, bare).notes[0]
    nan = {name: Outcome(name, o.status, validation={"nll": math.nan}) for name, o in outcomes.items()}
    assert windows(centre(plan, nan))["a"][0] == 0.001


def test_the_tables_have_both_views(tmp_path: Path) -> None:
    plan, outcomes = made()
    write_tables(tmp_path, plan, outcomes, summarise(plan, outcomes), centre(plan, outcomes))
    rows = pq.read_table(tmp_path / "summary.parquet").to_pylist()
    assert {row["view"]: sum(r["view"] == row["view"] for r in rows) for row in rows} == {"as given": 2, "centred": 2}
    assert {row["view"] for row in pq.read_table(tmp_path / "paired.parquet").to_pylist()} == {"as given", "centred"}
    text = (tmp_path / "summary.md").read_text()
    assert "- a (x 1): 3 values of learning rate around 1.0, from 0.1 to 10.0, chosen by validation accuracy\n" in text
    assert (tmp_path / "summary_centred.tex").read_text().count(r"\\") == 3
    plan, outcomes = made(split="validation")
    write_tables(tmp_path, plan, outcomes, summarise(plan, outcomes), centre(plan, outcomes))
    assert not (tmp_path / "summary_centred.tex").exists()
    assert "not centred (x 1): the validation rows" in (tmp_path / "summary.md").read_text()


def test_a_study_gives_both_views(make_study: Callable[..., dict[str, Any]]) -> None:
    grid = {"method.name": ["lora"], KEY: [1e-3, 1e-2, 1e-1], "seed": [0]}
    base = make_study(grid=grid, split="train", centre={"values": 2})
    found = study(base, workers=0, progress=False)
    (window,) = found.centred.windows
    assert len(window.values) == 2
    assert len(found.centred_summaries) == len(found.summaries) > 0
    assert {summary.trials for summary in found.centred_summaries} == {2}


def test_a_key_that_no_grid_has_is_refused(make_study: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match=r"centre\.key is 'method\.r', and no grid has it"):
        load_study(make_study(centre={"key": "method.r"}))
    with pytest.raises(ConfigError, match=r"centre\.values is 1, expected at least 2"):
        load_study(make_study(centre={"values": 1}))
    assert load_study(make_study(centre=None)).centre is None
