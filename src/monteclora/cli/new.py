"""``monteclora new``."""

from __future__ import annotations

import re
from pathlib import Path

from monteclora.cli.output import Json, note, print_json, print_line
from monteclora.errors import ConfigError
from monteclora.system.atomic import write_file

__all__ = ["new"]


def new(
    file: Path,
    /,
    *,
    text: list[str] | None = None,
    label: str | None = None,
    out: Path | None = None,
    model: str | None = None,
    method: str = "monteclora",
    as_json: Json = False,
) -> None:
    """Write a recipe for your own data, with the columns, labels and lengths that were found in it.

    Args:
        file: csv, tsv, jsonl, json, parquet or xlsx, with labelled texts, prompts with completions, or conversations;
            a pattern in quotes for several.
        text: the column of the texts to be classified, or each of two; by default recognised, or guessed.
        label: the column of their labels; likewise.
        out: the recipe; by default NAME.yaml in this folder.
        model: a starter model, a folder, or a model on the hub; by default the starter model for what the file holds.
        method: how it is to be trained (see: monteclora list methods).
    """
    from shlex import quote

    target = out or Path(f"{_name(file)}.yaml")
    if not target.parent.is_dir():
        raise ConfigError(f"there is no folder {target.parent}", "Make it, or give another name with --out.")
    if target.exists():
        raise ConfigError(f"{target} exists", "Give another name with --out, or remove it.")

    from monteclora.runs.new_recipe import new_recipe

    found = new_recipe(file, text=text or (), label=label, model=model, method=method, folder=target.parent)
    write_file(target, found.text.encode())
    if as_json:
        print_json({"recipe": target, "notes": list(found.notes)})
        return
    for line in found.notes:
        note(line)
    print_line(f"recipe: {target}")
    print_line(f"next: monteclora train {quote(str(target))}")


def _name(file: Path) -> str:
    """Of a file without its endings; of a pattern without what stands for other characters, or else its folder's."""
    return re.sub(r"\[.*?\]|[*?]", "", file.name.partition(".")[0]).strip("-_ ") or file.resolve().parent.name
