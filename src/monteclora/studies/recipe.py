"""The study recipe: a base recipe, what is compared, and the grid it is compared over."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from monteclora.config import Document, Node, brief, build, load_yaml
from monteclora.config.document import from_python
from monteclora.errors import ConfigError
from monteclora.metrics.registry import METRICS
from monteclora.prediction.registry import CALIBRATORS, NO_CALIBRATOR, SAMPLERS
from monteclora.runs.bundled import bundled_studies
from monteclora.runs.recipe_paths import beside, with_places

__all__ = ["Arm", "Centre", "StudyRecipe", "load_study"]

_METHOD = "method.name"
_WAYS: Mapping[str, Sequence[str]] = {
    "sampler": [name for name, kind in SAMPLERS.items() if not kind.needs_several_runs],  # a trial is of one run
    "calibrator": (NO_CALIBRATOR, *CALIBRATORS),
}


@dataclass(frozen=True)
class Arm:
    """One of the things that a study compares.

    Args:
        set: dotted recipe keys with their values, as in ``method.name: lora``.
        grid: dotted recipe keys with lists of values; they replace the study's for this arm.
    """

    set: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Centre:
    """How each arm is seen around its own best value of a setting, see :mod:`monteclora.studies.centring`.

    Args:
        key: of the setting, a number above 0.
        values: how many values of it count of each arm, its best one included; fewer where an arm has fewer.
    """

    key: str = "training.learning_rate"
    values: int = 3


@dataclass(frozen=True)
class StudyRecipe:
    """One study.

    Args:
        name: of the study; by default the file's name.
        base: the recipe that every trial starts from: a bundled one's name, a YAML file (by its path from the study
            recipe's folder, or from the working directory), or its content. The study folder keeps the content.
        set: dotted recipe keys that every trial changes. Paths here, in ``grid`` and in arms lead from the study
            recipe's folder, or else from the working directory, as those of a recipe do.
        arms: what is compared, by a name for people; by default the values of ``method.name`` in the grid.
        grid: dotted recipe keys with lists of values, and ``sampler`` and ``calibrator``, which can be in ``set`` too.
            Keys under ``data`` and ``model``, and what says how a run is evaluated (these two, and keys under
            ``evaluation``), are conditions, which are summarised apart; ``seed`` repeats; every other key is a setting,
            over which the spread is measured. A run that is evaluated in several ways is trained once.
        split: what trials are evaluated on; null is test where it has labels, else validation.
        metric: what the summary and the page lead with; null is accuracy, for completions the NLL.
        sampler: of predictions, by name (:mod:`monteclora.prediction.registry`); null is ``posterior`` for methods that
            have one, else ``mean``.
        calibrator: ``temperature``, fitted to the validation rows of each trial, or ``none``.
        centre: the second view of the results, in which every arm has as many values of a setting, around its own best
            one; null for none.
        max_trials: run at most this many, in whole comparisons of all arms; the others are said to be left out.
        max_hours: start no trial after this many hours of one command; the same command continues later.
        known: files ``results.parquet`` of earlier studies, by their path from the study recipe's folder or from the
            working directory: outcomes of the same trials are taken from them.
        retries: how often a failed trial is tried again.
        keep: what of a finished trial stays: its ``adapter``, ``everything`` (checkpoints too), or its ``numbers``.
        output: the study folder; null is ``studies/<name>``.
    """

    name: str
    base: str | dict[str, Any]
    set: dict[str, Any] = field(default_factory=dict)
    arms: dict[str, Arm] = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    split: Literal["train", "validation", "test"] | None = None
    metric: str | None = None
    sampler: str | None = None
    calibrator: str = NO_CALIBRATOR
    centre: Centre | None = field(default_factory=Centre)
    max_trials: int | None = None
    max_hours: float | None = None
    known: list[str] = field(default_factory=list)
    retries: int = 2
    keep: Literal["adapter", "everything", "numbers"] = "adapter"
    output: str | None = None

    @property
    def folder(self) -> Path:
        """The study folder."""
        return Path(self.output or f"studies/{self.name}").expanduser()

    def problems(self) -> list[tuple[str, str]]:
        """What is wrong with the values, see :mod:`monteclora.config`."""
        found = []
        if self.metric is not None and self.metric not in METRICS:
            found.append(("metric", f"is {brief(self.metric)}, expected one of {', '.join(METRICS)}"))
        elif self.metric is not None and METRICS[self.metric].greater_is_better is None:
            found.append(("metric", f"is {self.metric}, of which neither more nor less is better"))
        for place, name, chosen in self._ways_to_evaluate():
            if chosen not in (known := _WAYS[name]) and (name, chosen) != ("sampler", None):
                found.append((place, f"is {brief(chosen)}, expected one of {', '.join(known)}"))
        if self.retries < 0:
            found.append(("retries", f"is {self.retries}, expected at least 0"))
        for name in ("max_trials", "max_hours"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                found.append((name, f"is {value}, expected above 0"))
        grids = {"grid": self.grid, **{f"arms.{name}.grid": arm.grid for name, arm in self.arms.items()}}
        found += [
            (place, f"has no value for {key}") for place, grid in grids.items() for key, v in grid.items() if not v
        ]
        for name, arm in self.arms.items():
            place = f"arms.{name}.grid"
            found += [(place, f"has {key}, which the arm's set has too") for key in arm.grid if key in arm.set]
            if _METHOD in arm.grid and _METHOD not in arm.set:
                found.append((place, f"has {_METHOD}: name the method in set, an arm for each"))
        if self.centre is not None:
            if self.centre.values < 2:
                found.append(("centre.values", f"is {self.centre.values}, expected at least 2"))
            if self.centre.key != Centre.key and not any(self.centre.key in grid for grid in grids.values()):
                found.append(("centre.key", f"is {brief(self.centre.key)}, and no grid has it"))
        if self.arms and _METHOD in self.grid:
            found.append(("grid", "has method.name, and arms are given: name the method in each arm"))
        return found

    def _ways_to_evaluate(self) -> Iterator[tuple[str, str, Any]]:
        """The samplers and calibrators that are named: where, which of both, and the name."""
        sets = {"set": self.set, **{f"arms.{name}.set": arm.set for name, arm in self.arms.items()}}
        grids = {"grid": self.grid, **{f"arms.{name}.grid": arm.grid for name, arm in self.arms.items()}}
        for name in _WAYS:
            yield name, name, getattr(self, name)
            yield from ((f"{place}.{name}", name, of[name]) for place, of in sets.items() if name in of)
            yield from ((f"{place}.{name}", name, chosen) for place, of in grids.items() for chosen in of.get(name, ()))


def load_study(source: str | Path | Mapping[str, Any] | StudyRecipe, output: str | None = None) -> StudyRecipe:
    """Read a study recipe and check it.

    Args:
        source: the path of a YAML file, the name of a bundled study, a mapping with the same content, or a study.
        output: a study folder in place of the recipe's.

    Raises:
        ConfigError: no such file or name, or with every problem of the recipe at once.
    """
    if isinstance(source, StudyRecipe):
        return source if output is None else dataclasses.replace(source, output=output)
    overrides: Iterable[tuple[str, str]] = () if output is None else [("output", output)]
    if isinstance(source, Mapping):
        return build(StudyRecipe, Document(from_python(source, "study"), "study"), overrides)
    path = Path(source).expanduser()
    if not os.path.isfile(path) and str(source) in bundled_studies():
        path = bundled_studies()[str(source)]
    document = load_yaml(path)
    if "name" not in document.root.value:
        root = Node({"name": Node(path.stem, document.source), **document.root.value}, document.root.where)
        document = dataclasses.replace(document, root=root)
    values = _with_places(document.root.value, [path.parent, Path()])
    if (base := values.get("base")) is not None:
        content = isinstance(base.value, dict)
        values["base"] = with_places(base, [path.parent, Path()]) if content else _beside(base, path.parent)
    if (known := values.get("known")) is not None and isinstance(known.value, list):
        values["known"] = Node([_beside(file, path.parent) for file in known.value], known.where)
    document = dataclasses.replace(document, root=Node(values, document.root.where))
    if "base" in document.root.value and "grid" not in document.root.value:
        raise ConfigError(f"{path} has no grid", "Give the recipe keys to try, each with a list of values.")
    return build(StudyRecipe, document, overrides)


def _with_places(values: Mapping[str, Node], places: Sequence[Path]) -> dict[str, Node]:
    """The study with paths among the recipe keys that it sets and varies, and those its arms do, as they lead."""
    found = dict(values)
    for name in ("set", "grid"):
        node = values.get(name)
        if node is not None and isinstance(node.value, dict):
            found[name] = Node({key: _placed(key, each, places) for key, each in node.value.items()}, node.where)
    arms = values.get("arms")
    if arms is not None and isinstance(arms.value, dict):
        of_arms = {
            key: Node(_with_places(arm.value, places), arm.where) if isinstance(arm.value, dict) else arm
            for key, arm in arms.value.items()
        }
        found["arms"] = Node(of_arms, arms.where)
    return found


def _placed(key: str, node: Node, places: Sequence[Path]) -> Node:
    if isinstance(node.value, list):
        return Node([_placed(key, each, places) for each in node.value], node.where)
    return Node(beside(key, node.value, places), node.where, node.raw)


def _beside(node: Node, folder: Path) -> Node:
    """The path of a file in ``folder``, where a node names one; else the node as it is."""
    if isinstance(node.value, str) and os.path.isfile(found := folder / os.path.expanduser(node.value)):
        return Node(str(found), node.where)
    return node
