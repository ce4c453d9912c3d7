"""The recipes that come with the package."""

from __future__ import annotations

from pathlib import Path

__all__ = ["bundled_recipes", "bundled_studies", "summary"]

_FOLDER = Path(__file__).parents[1] / "recipes"
_STUDY = "study-"


def bundled_recipes() -> dict[str, Path]:
    """The YAML file of every bundled recipe of a run, by its name."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.yaml")) if not path.stem.startswith(_STUDY)}


def bundled_studies() -> dict[str, Path]:
    """The YAML file of every bundled study recipe, by its name."""
    return {path.stem: path for path in sorted(_FOLDER.glob(f"{_STUDY}*.yaml"))}


def summary(path: Path) -> str:
    """What a recipe does, in one line: the comment it starts with."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip()
