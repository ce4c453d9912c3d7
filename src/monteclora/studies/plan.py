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
from functools import cached_property
from typing import Any

from monteclora.errors import ConfigError
from monteclora.methods import get_method
from monteclora.prediction.registry import NO_CALIBRATOR, get_sampler
from monteclora.runs.determining import recipe_sha256
from monteclora.runs.recipe import EvaluationSpec, Recipe, load_recipe
from monteclora.studies.content import Contents
from monteclora.studies.recipe import StudyRecipe
from monteclora.studies.wording import values_in_words
from monteclora.training.range_test import VERSION as RANGE_TEST_VERSION

__all__ = ["Plan", "Trial", "make_plan"]

_METHOD = "method.name"
_WAYS = ("sampler", "calibrator")  # keys of a study beside those of a recipe
_SECTION = "evaluation."


@dataclass(frozen=True)
class Trial:
    """A cell of the grid.

    Attributes:
        id: the checksum of what determines its result: recipe, content of the data and of local models and chat
            templates, and how it is evaluated.
        arm: what of the compared things it is.
        conditions, settings: its values of the grid's keys, see :class:`~monteclora.studies.recipe.StudyRecipe`.
        seed: of the run.
        recipe: of the run, with the trial's own evaluation section; its name is the run's id.
        sampler, calibrator: the trial's, see :class:`~monteclora.studies.recipe.StudyRecipe`.
        split: that is evaluated.
    """

    id: str
    arm: str
    conditions: Mapping[str, Any]
    settings: Mapping[str, Any]
    seed: int
    recipe: Recipe
    sampler: str | None = None
    calibrator: str = NO_CALIBRATOR
    split: str = "test"

    @property
    def run(self) -> str:
        """The id of the run: the trial's own, unless the grid or arms say that runs are evaluated in several ways.

        Trials that differ in sampler, calibrator or the evaluation section alone share a run, whose id is that of the
        trial evaluated as the study says without grid and arms, whether it has that trial or not.
        """
        return self.recipe.name

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.arm}, {values_in_words({**self.conditions, **self.settings, 'seed': self.seed})}"


@dataclass(frozen=True)
class Plan:
    """All trials in the order in which they are started, and what there is to say of them."""

    study: StudyRecipe
    trials: tuple[Trial, ...]
    notes: tuple[str, ...] = ()

    @cached_property
    def runs(self) -> tuple[tuple[Trial, ...], ...]:
        """The trials of each run, in the order in which runs are started."""
        found: dict[str, list[Trial]] = {}
        for trial in self.trials:
            found.setdefault(trial.run, []).append(trial)
        return tuple(map(tuple, found.values()))


def make_plan(study: StudyRecipe) -> Plan:
    """The trials of a study; reads the data, whose content is part of a trial's identity.

    A trial's comparison partners (the same values in every other arm) are started together, one seed after the other,
    and settings in an order that does not follow the grid: a study that is cut short is a fair sample of the whole.

    Raises:
        ConfigError: a key or value of the grid is wrong, with the trial that it makes; two arms have the same trial; or
            the task does not have the study's metric.
        DataError: the data are wrong, or do not have the split that the study evaluates.
    """
    base = study.base
    if isinstance(base, dict):
        base = {"name": study.name, **base}
    contents = Contents(study)
    trials: dict[str, Trial] = {}
    notes: dict[str, None] = {}
    arms = _arms(study)
    for arm, (fixed, grid) in arms.items():
        for values in _product(grid):
            with _collected(notes):
                trial = _trial(base, study, arm, fixed, values, arms, contents)
            if trial is None:
                notes[f"the arm {arm} has no posterior, and so no trials with the sampler {values['sampler']}"] = None
                continue
            if (other := trials.setdefault(trial.id, trial).arm) != arm:
                raise ConfigError(
                    f"the arms {other} and {arm} have the same trial: {trial.label}",
                    "Give them different values, or remove it from one of them.",
                )
        if not any(trial.arm == arm for trial in trials.values()):
            raise ConfigError(f"the arm {arm} has no trial: no sampler of the grid is one for it", "Add null or mean.")
    order = _order(list(trials.values()), list(arms))
    ordered = sorted(trials.values(), key=lambda trial: order[trial.id])
    kept = _cut(ordered, study.max_trials, order, len(arms))
    if len(kept) < len(ordered):
        notes[f"{len(ordered) - len(kept)} of {len(ordered)} trials are left out (max_trials {study.max_trials})"] = (
            None
        )
    return Plan(study, tuple(kept), tuple(notes))


def _order(trials: Sequence[Trial], arms: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """What trials are sorted by, by id; the first three entries say which comparison a trial belongs to.

    Cells that every arm has, in the keys that every arm has, are compared with each other. Of others, as of arms with
    grids of their own, each arm's first ones are started together, then each arm's second ones, and so on. In a
    comparison each arm has a first trial before any has a second one.
    """
    values = {trial.id: {**trial.conditions, **trial.settings} for trial in trials}
    by_arm = {arm: [trial for trial in trials if trial.arm == arm] for arm in arms}
    keys = [{key for trial in found for key in values[trial.id]} for found in by_arm.values()]
    shared = set.intersection(*keys)

    def cell(trial: Trial) -> str:
        return _hash([trial.seed, {key: value for key, value in values[trial.id].items() if key in shared}])

    everywhere = set.intersection(*({cell(trial) for trial in found} for found in by_arm.values()))
    order: dict[str, tuple[Any, ...]] = {}
    for place, found in enumerate(by_arm.values()):
        seeds = sorted({trial.seed for trial in found})
        for number, seed in enumerate(seeds):
            blocks: dict[str, list[Trial]] = {}
            for trial in sorted((t for t in found if t.seed == seed), key=lambda t: _hash(values[t.id])):
                blocks.setdefault(cell(trial), []).append(trial)
            others = sorted(blocks.keys() - everywhere)
            for name, block in blocks.items():
                which = (number, 0, name) if name in everywhere else (number, 1, others.index(name))
                order |= {trial.id: (*which, index, place) for index, trial in enumerate(block)}
    return order


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _cut(trials: list[Trial], most: int | None, order: Mapping[str, tuple[Any, ...]], arms: int) -> list[Trial]:
    """At most this many, without the last comparison if it is not whole; part of the first one where that is not."""
    if most is None or most >= len(trials):
        return trials
    if most < arms:
        raise ConfigError(f"max_trials is {most}, and the study compares {arms} arms", f"Give at least {arms}.")
    last = order[trials[most].id][:3]
    whole = [trial for trial in trials[:most] if order[trial.id][:3] != last]
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


def _recipe(
    base: Any, study: StudyRecipe, values: Mapping[str, Any], arms: Mapping[str, Any]
) -> tuple[Recipe, set[str]]:
    """The recipe of a trial, and the keys left out of it: options of other arms' methods that its own does not have."""
    changes = {key: value for key, value in {**study.set, **values}.items() if key not in _WAYS}
    own = changes.get(_METHOD)
    foreign: set[str] = set()
    if own is not None:
        has = {f.name for f in dataclasses.fields(get_method(str(own)).options)} | {
            *get_method(str(own)).options.renamed
        }
        others = {str(fixed[_METHOD]) for fixed, _ in arms.values() if _METHOD in fixed} - {str(own)}
        had = {f.name for other in others for f in dataclasses.fields(get_method(other).options)}
        foreign = {f"method.{name}" for name in had - has}
        changes = {key: value for key, value in changes.items() if key not in foreign}
    try:
        return load_recipe(base, [(key, _yaml(value)) for key, value in changes.items()]), foreign
    except ConfigError as error:
        shown = ", ".join(f"{key} {value}" for key, value in changes.items())
        raise ConfigError(f"the trial {shown}: {error.message}", error.hint) from None


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _trial(
    base: Any,
    study: StudyRecipe,
    arm: str,
    fixed: Mapping[str, Any],
    values: Mapping[str, Any],
    arms: Mapping[str, Any],
    contents: Contents,
) -> Trial | None:
    """The trial of an arm at some values of its grid; None where its method lacks what a sampler of the grid draws."""
    recipe, foreign = _recipe(base, study, {**fixed, **values}, arms)
    own = {key: value for key, value in values.items() if key not in foreign}
    chosen = {key: value for key, value in {**study.set, **fixed, **values}.items() if key in _WAYS}
    sampler, calibrator = chosen.get("sampler", study.sampler), chosen.get("calibrator", study.calibrator)
    posterior = sampler is not None and get_sampler(sampler).needs_posterior
    if posterior and not get_method(recipe.method.name).has_posterior:
        if "sampler" in values:
            return None
        raise ConfigError(
            f"the arm {arm}: the method {recipe.method.name} has no posterior for the sampler {sampler}",
            "Leave the sampler out: by default it is posterior where there is one.",
        )
    plain = recipe  # evaluated as the study says
    if any(key.startswith(_SECTION) for key in {**fixed, **values}):
        trained = {key: value for key, value in {**fixed, **values}.items() if not key.startswith(_SECTION)}
        plain, _ = _recipe(base, study, trained, arms)
    set_ = {"sampler": study.sampler, "calibrator": study.calibrator, **study.set}
    facts = {"format": 1, "recipe": recipe_sha256(recipe), **contents.of(recipe), "split": study.split}
    if recipe.training.learning_rate == "auto":
        facts["range_test"] = RANGE_TEST_VERSION  # its rule decides the rate, and the recipe does not tell it
    identity = _identity(facts, recipe, sampler, calibrator)
    run = _identity(facts, plain, set_["sampler"], set_["calibrator"])
    conditions = {
        key: value for key, value in own.items() if key.startswith(("data.", "model.")) or _says_how_to_evaluate(key)
    }
    settings = {key: value for key, value in own.items() if key not in conditions and key != "seed"}
    recipe = dataclasses.replace(recipe, name=run, output=str(study.folder / "trials" / run))
    split = contents.split(recipe)
    return Trial(identity, arm, conditions, settings, recipe.seed, recipe, sampler, calibrator, split)


def _says_how_to_evaluate(key: str) -> bool:
    return key in _WAYS or key.startswith(_SECTION)


def _identity(facts: Mapping[str, Any], recipe: Recipe, sampler: str | None, calibrator: str) -> str:
    """Fields younger than the first two are part of it where they are not their default: older ids stay the same."""
    always = ("num_samples", "bins")
    default, own = EvaluationSpec(), dataclasses.asdict(recipe.evaluation)
    evaluation = {name: value for name, value in own.items() if name in always or value != getattr(default, name)}
    evaluated = {"sampler": sampler, "calibrator": calibrator, **evaluation}
    return hashlib.sha256(json.dumps({**facts, **evaluated}, sort_keys=True).encode()).hexdigest()[:16]


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
