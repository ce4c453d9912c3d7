"""What the package needs is bounded, and written out version by version."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def declared() -> Iterator[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]:
        requirement = Requirement(line)
        if requirement.name != project["name"]:
            yield requirement


def locked(file: str = "requirements.lock") -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
    pinned = [line.partition("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): version for name, _, version in pinned}


@pytest.mark.parametrize("requirement", list(declared()), ids=str)
def test_every_dependency_has_an_upper_bound_and_a_version_in_the_lock_file(requirement: Requirement) -> None:
    assert any(specifier.operator == "<" for specifier in requirement.specifier)
    version = locked()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(version), f"the lock file has {requirement.name} {version}"


@pytest.mark.parametrize("requirement", list(declared()), ids=str)
def test_every_lower_bound_is_a_version_that_the_tests_run_with(requirement: Requirement) -> None:
    (bound,) = [Version(s.version) for s in requirement.specifier if s.operator in (">=", "==")] or [None]
    lowest = Version(locked("requirements.lowest")[canonicalize_name(requirement.name)])
    assert requirement.specifier.contains(lowest)
    assert bound is None or bound == lowest


def installed_needs(requirement: Requirement, seen: set[tuple[str, str]]) -> None:
    """The packages that one asks for here, and those that these ask for, each with its extras."""
    for extra in ("", *requirement.extras):
        place = (canonicalize_name(requirement.name), extra)
        if place in seen:
            continue
        seen.add(place)
        for line in metadata.requires(requirement.name) or ():
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                installed_needs(needed, seen)


@pytest.mark.parametrize("file", ["requirements.lock", "requirements.lowest"])
def test_the_lock_files_have_what_the_tests_of_optuna_need(file: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (development,) = [Requirement(line) for line in project["optional-dependencies"]["dev"] if "monteclora" in line]
    assert "optuna" in development.extras
    pytest.importorskip("optuna")
    needed: set[tuple[str, str]] = set()
    installed_needs(Requirement("optuna"), needed)
    assert {name for name, _ in needed} <= locked(file).keys()


@pytest.mark.parametrize("file", ["requirements.lock", "requirements.lowest"])
def test_the_lock_files_name_versions_and_nothing_else(file: str) -> None:
    for line in (ROOT / file).read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line), line
