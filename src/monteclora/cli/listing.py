"""``monteclora list``: the tasks, methods and models that recipes can name."""

from __future__ import annotations

from typing import Any

from cyclopts import App

from monteclora.cli.output import Json, print_json, print_table

__all__ = ["app", "models_at_hand", "tasks_at_hand"]

app = App(name="list", help="List the tasks, methods or starter models that a recipe can name.")


@app.command
def tasks(*, as_json: Json = False) -> None:
    """List the tasks, and where their data are."""
    found = tasks_at_hand()
    if as_json:
        print_json(found)
        return
    rows = [
        (task["name"], task["kind"], task["where"], ", ".join(task["splits"]), task["description"]) for task in found
    ]
    print_table(["task", "kind", "data", "labelled splits", "what it is"], rows, left=5)


@app.command
def methods(*, as_json: Json = False) -> None:
    """List the fine-tuning methods."""
    from monteclora.methods import list_methods

    found = list_methods()
    if as_json:
        print_json([{"name": m.name, "posterior": m.has_posterior, "description": m.description} for m in found])
        return
    rows = [(method.name, "yes" if method.has_posterior else "no", method.description) for method in found]
    print_table(["method", "posterior", "what it is"], rows, left=3)


@app.command
def models(*, as_json: Json = False) -> None:
    """List the starter models; any folder or name on the hub works as well."""
    found = models_at_hand()
    if as_json:
        print_json(found)
        return
    rows = [(model["name"], model["kind"], model["where"], model["description"]) for model in found]
    print_table(["model", "kind", "where", "what it is"], rows, left=4)


def tasks_at_hand() -> list[dict[str, Any]]:
    """Every task with its labelled splits and where they come from."""
    from monteclora.data.sources import DATA_FOLDER_VARIABLE, local_splits
    from monteclora.tasks import list_tasks

    found = []
    for task in list_tasks():
        local = local_splits(task.name, None)
        bundled = task.description.startswith("bundled")
        where = DATA_FOLDER_VARIABLE if local else "bundled" if bundled else "the hub"
        found.append(
            {
                "name": task.name,
                "kind": task.kind,
                "where": where,
                "splits": list(local or task.splits),
                "labels": list(task.label_names or ()),
                "description": task.description,
            }
        )
    return found


def models_at_hand() -> list[dict[str, Any]]:
    """Every starter model with its path, or the command that gets it."""
    from monteclora.data.models import STARTERS, resolve_model

    found = []
    for starter in STARTERS.values():
        path = starter.path()
        found.append(
            {
                "name": starter.name,
                "kind": starter.kind,
                "where": f"the package {starter.package}" if path else f"the hub: {starter.hub_name}",
                "path": path,
                "remedy": "" if path else resolve_model(starter.name).remedy,
                "description": starter.description,
            }
        )
    return found
