"""The recipes that come with the package."""

from __future__ import annotations

from pathlib import Path

__all__ = ["bundled_recipes", "summary"]

_FOLDER = Path(__file__).parents[1] / "recipes"


def bundled_recipes() -> dict[str, Path]:
    """The YAML file of every bundled recipe, by its name."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.yaml"))}


def summary(path: Path) -> str:
    """What a recipe does, in one line: the comment it starts with."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip()
