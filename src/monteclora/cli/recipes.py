"""``monteclora recipes``: what comes with the package."""

from __future__ import annotations

from pathlib import Path

from cyclopts import App

from monteclora.cli.output import Json, print_json, print_line, print_table
from monteclora.errors import ConfigError
from monteclora.runs.bundled import bundled_recipes, bundled_studies, summary
from monteclora.system.atomic import write_file

__all__ = ["app", "key_lines"]

app = App(name="recipes", help="List, show or copy the bundled recipes.")


@app.default
@app.command(name="list")
def list_recipes(*, as_json: Json = False) -> None:
    """List the bundled recipes."""
    found = {name: summary(path) for name, path in {**bundled_recipes(), **bundled_studies()}.items()}
    if as_json:
        print_json([{"name": name, "summary": text} for name, text in found.items()])
        return
    print_table(["recipe", "what it does"], found.items(), left=2)
    print_line(
        "monteclora train NAME trains one, monteclora study NAME runs a study; "
        "monteclora recipes copy NAME gives you one to change."
    )


@app.command
def show(name: str, /, *, as_json: Json = False) -> None:
    """Print a recipe.

    Args:
        name: of a bundled recipe.
    """
    path = _find(name)
    if as_json:
        from monteclora.config import load_yaml
        from monteclora.config.document import to_python

        print_json(to_python(load_yaml(path).root))
        return
    print_line(path.read_text(encoding="utf-8").rstrip())


@app.command
def copy(name: str, to: Path | None = None, /, *, as_json: Json = False) -> None:
    """Copy a recipe, to change it.

    Args:
        name: of a bundled recipe.
        to: a file or folder; by default NAME.yaml in this folder.
    """
    source = _find(name)
    target = to or Path(source.name)
    if target.is_dir():
        target = target / source.name
    if target.exists():
        raise ConfigError(f"{target} exists", "Give another name, or remove it.")
    write_file(target, source.read_bytes())
    if as_json:
        print_json({"recipe": target})
        return
    print_line(str(target))


@app.command
def keys(*, markdown: bool = False, as_json: Json = False) -> None:
    """List every key of a recipe with its type, range, default and meaning.

    Args:
        markdown: as the page of the documentation.
    """
    from monteclora.runs.recipe_reference import default_text, recipe_keys, type_text
    from monteclora.runs.recipe_reference import markdown as page

    found = recipe_keys()
    if markdown:
        print_line(page(found).rstrip())
    elif as_json:
        print_json(
            [
                {**vars(key), "type": type_text(key), "default": default_text(key), "required": key.required}
                for key in found
            ]
        )
    else:
        rows = [[key.name, type_text(key), default_text(key), key.description] for key in found]
        print_table(["key", "type", "default", "meaning"], rows, left=4)


def key_lines() -> list[str]:
    """A line for each key of a recipe: its name, type and default."""
    from monteclora.runs.recipe_reference import default_text, recipe_keys, type_text

    found = recipe_keys()
    width = max(len(key.name) for key in found)
    return [f"  --{key.name:<{width}}  {type_text(key)}; {default_text(key)}" for key in found]


@app.command
def schema(*, as_json: Json = True) -> None:
    """Print a JSON schema of recipes, for editors; it is JSON with --json and without."""
    from monteclora.runs.recipe_reference import json_schema, recipe_keys

    print_json(json_schema(recipe_keys()))


def _find(name: str) -> Path:
    bundled = {**bundled_recipes(), **bundled_studies()}
    if name not in bundled:
        from monteclora.config import nearest

        near = nearest(name, bundled)
        raise ConfigError(
            f"there is no bundled recipe '{name}'", f"Did you mean {near}?" if near else "See `monteclora recipes`."
        )
    return bundled[name]
