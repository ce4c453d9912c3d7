"""The recipes that come with the package."""

from __future__ import annotations

from pathlib import Path

__all__ = ["bundled_recipes", "bundled_studies", "former_names", "summary"]

_FOLDER = Path(__file__).parents[1] / "recipes"
_STUDY = "study-"
# stem of earlier names, which had one recipe for each method: the recipe that has all
_FORMER = {
    "mrpc-minilm": "paper-mrpc-starter",
    "arc-easy-smollm2": "paper-commonsense-starter",
    "paper-commonsense-llama": "paper-commonsense",
    **{f"paper-{task}-roberta": f"paper-{task}" for task in ("mrpc", "cola", "rte", "wic", "boolq")},
}


def bundled_recipes() -> dict[str, Path]:
    """The YAML file of every bundled recipe of a run, by its name."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.yaml")) if not path.stem.startswith(_STUDY)}


def bundled_studies() -> dict[str, Path]:
    """The YAML file of every bundled study recipe, by its name."""
    return {path.stem: path for path in sorted(_FOLDER.glob(f"{_STUDY}*.yaml"))}


def former_names() -> dict[str, tuple[str, str]]:
    """The recipe and the method that a name of an earlier version stands for."""
    methods = ("lora", "monteclora")
    return {f"{old}-{method}": (new, method) for old, new in _FORMER.items() for method in methods}


def summary(path: Path) -> str:
    """What a recipe does, in one line: the comment it starts with."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip()
