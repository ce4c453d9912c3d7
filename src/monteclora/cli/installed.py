"""What the package requires, and which versions of it are installed."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

__all__ = ["at_hand", "extras", "required"]

_EXTRAS = ("excel", "gguf", "trl", "quantization", "ivon", "laplace", "tracking", "harness")


def required() -> list[dict[str, Any]]:
    """Each required package with its version, None where it is missing, and whether that is the one asked for."""
    return [_package(requirement) for requirement in _requirements() if not requirement.marker]


def _requirements() -> list[Requirement]:
    """What the installed package asks for, else what the checkout it runs from does."""
    try:
        listed = metadata.requires("monteclora") or []
    except metadata.PackageNotFoundError:
        project = Path(__file__).parents[3] / "pyproject.toml"
        sections = tomllib.loads(project.read_text(encoding="utf-8"))["project"] if project.is_file() else {}
        listed = list(sections.get("dependencies", []))
        for extra, names in sections.get("optional-dependencies", {}).items():
            listed += [f"{name}; extra == '{extra}'" for name in names]
    return [Requirement(line) for line in listed]


def _package(requirement: Requirement) -> dict[str, Any]:
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        version = None
    fits = version is not None and requirement.specifier.contains(version, prereleases=True)
    return {"name": requirement.name, "version": version, "wanted": str(requirement.specifier), "fits": fits}


def at_hand(name: str) -> bool:
    """Whether a package is installed."""
    return _package(Requirement(name))["fits"]


def extras() -> list[dict[str, Any]]:
    """Likewise for what the optional extras ask for, each with the extra's name."""
    found = []
    for extra in _EXTRAS:
        for requirement in _requirements():
            if requirement.marker and requirement.marker.evaluate({"extra": extra}):
                found.append({"extra": extra, **_package(requirement)})
    return found
