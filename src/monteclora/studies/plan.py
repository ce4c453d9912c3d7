"""The trials of a study, and what identifies each."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from monteclora.errors import ConfigError
from monteclora.methods import get_method
from monteclora.runs.recipe import Recipe, load_recipe, recipe_sha256
from monteclora.studies.recipe import StudyRecipe
from monteclora.system.quiet import quiet_libraries
from monteclora.tasks import DataSpec, load

__all__ = ["Plan", "Trial", "make_plan"]

_METHOD = "method.name"


@dataclass(frozen=True)
class Trial:
    """A cell of the grid.

    Attributes:
        id: the checksum of what determines its result: recipe, content of the data, and how it is evaluated.
        arm: what of the compared things it is.
        conditions, settings: its values of the grid's keys, see :class:`~monteclora.studies.recipe.StudyRecipe`.
        seed: of the run.
        recipe: of the run.
    """

    id: str
    arm: str
    conditions: Mapping[str, Any]
    settings: Mapping[str, Any]
    seed: int
    recipe: Recipe

    @property
    def label(self) -> str:
        """For people."""
        values = {**self.conditions, **self.settings, "seed": self.seed}
        return ", ".join([self.arm, *(f"{key.rpartition('.')[2]} {value}" for key, value in values.items())])


@dataclass(frozen=True)
class Plan:
    """All trials in the order in which they are started, and what there is to say of them."""

    study: StudyRecipe
    trials: tuple[Trial, ...]
    notes: tuple[str, ...] = ()


def make_plan(study: StudyRecipe) -> Plan:
    """The trials of a study; reads the data, whose content is part of a trial's identity.

    A trial's comparison partners (the same values in every other arm) are started together, one seed after the other,
    and settings in an order that does not follow the grid: a study that is cut short is a fair sample of the whole.

    Raises:
        ConfigError: a key or value of the grid is wrong, with the trial that it makes.
        DataError: the data are wrong.
    """
    base = study.base
    if isinstance(base, dict):
        base = {"name": study.name, **base}
    data: dict[str, str] = {}
    trials: dict[str, Trial] = {}
    order: dict[str, tuple[Any, ...]] = {}
    notes: dict[str, None] = {}
    arms = _arms(study)
    for place, (arm, (fixed, grid)) in enumerate(arms.items()):
        for values in _product(grid):
            with _collected(notes):
                recipe = _recipe(base, study, {**fixed, **values}, arms)
            content = json.dumps(dataclasses.asdict(recipe.data), sort_keys=True)
            if content not in data:
                data[content] = _checksum(recipe.data)
            trial = _trial(study, arm, values, recipe, data[content])
            trials.setdefault(trial.id, trial)
            partners = {key: value for key, value in values.items() if key not in (*fixed, _METHOD)}
            block = hashlib.sha256(json.dumps(partners, sort_keys=True).encode()).hexdigest()
            order.setdefault(trial.id, (trial.seed, block, place))
    ordered = sorted(trials.values(), key=lambda trial: order[trial.id])
    kept = _cut(ordered, study.max_trials, order)
    if len(kept) < len(ordered):
        notes[f"{len(ordered) - len(kept)} of {len(ordered)} trials are left out (max_trials {study.max_trials})"] = (
            None
        )
    return Plan(study, tuple(kept), tuple(notes))


def _cut(trials: list[Trial], most: int | None, order: Mapping[str, tuple[Any, ...]]) -> list[Trial]:
    """At most so many, without the last comparison if it is not whole; one arm's trials where none is whole."""
    if most is None or most >= len(trials):
        return trials
    last = order[trials[most].id][:2]
    whole = [trial for trial in trials[:most] if order[trial.id][:2] != last]
    return whole or trials[:most]


def _arms(study: StudyRecipe) -> dict[str, tuple[dict[str, Any], dict[str, list[Any]]]]:
    """What each arm sets, and its grid."""
    grid = {key: values for key, values in study.grid.items() if key != _METHOD}
    if study.arms:
        found = {}
        for name, arm in study.arms.items():
            named = arm.set if _METHOD in arm.set else {_METHOD: name, **arm.set}
            found[name] = (named, {key: v for key, v in {**grid, **arm.grid}.items() if key not in named})
        return found
    methods = study.grid.get(_METHOD)
    if methods is None:
        return {study.name: ({}, grid)}
    return {str(method): ({_METHOD: method}, grid) for method in methods}


def _product(grid: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def _recipe(base: Any, study: StudyRecipe, values: Mapping[str, Any], arms: Mapping[str, Any]) -> Recipe:
    """The recipe of a trial; options of other arms' methods that its own does not have are left out."""
    changes = {**study.set, **values}
    own = changes.get(_METHOD)
    if own is not None:
        has = {f.name for f in dataclasses.fields(get_method(str(own)).options)} | {
            *get_method(str(own)).options.renamed
        }
        others = {str(fixed[_METHOD]) for fixed, _ in arms.values() if _METHOD in fixed} - {str(own)}
        had = {f.name for other in others for f in dataclasses.fields(get_method(other).options)}
        foreign = {f"method.{name}" for name in had - has}
        changes = {key: value for key, value in changes.items() if key not in foreign}
    try:
        return load_recipe(base, [(key, _yaml(value)) for key, value in changes.items()])
    except ConfigError as error:
        shown = ", ".join(f"{key} {value}" for key, value in changes.items())
        raise ConfigError(f"the trial {shown}: {error.message}", error.hint) from None


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _checksum(spec: DataSpec) -> str:
    """Of the content of every split."""
    with quiet_libraries():
        sources = load(spec).sources
    return json.dumps({split: source.sha256 for split, source in sources.items()}, sort_keys=True)


def _trial(study: StudyRecipe, arm: str, values: Mapping[str, Any], recipe: Recipe, data: str) -> Trial:
    facts = {
        "format": 1,
        "recipe": recipe_sha256(recipe),
        "data": data,
        "split": study.split,
        "sampler": study.sampler,
        "calibrator": study.calibrator,
        "num_samples": recipe.evaluation.num_samples,
        "bins": recipe.evaluation.bins,
    }
    identity = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    conditions = {key: value for key, value in values.items() if key.startswith(("data.", "model."))}
    settings = {key: value for key, value in values.items() if key not in conditions and key != "seed"}
    output = str(study.folder / "trials" / identity)
    recipe = dataclasses.replace(recipe, name=identity, output=output)
    return Trial(identity, arm, conditions, settings, recipe.seed, recipe)


@contextmanager
def _collected(notes: dict[str, None]) -> Iterator[None]:
    """What is logged of method sections is said once, not for every trial."""
    logger = logging.getLogger("monteclora.runs.method_section")

    def collect(record: logging.LogRecord) -> bool:
        notes[record.getMessage()] = None
        return False

    logger.addFilter(collect)
    try:
        yield
    finally:
        logger.removeFilter(collect)
