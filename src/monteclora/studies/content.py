"""What of a trial's recipe stands in files, and so can change while the recipe does not: data, model, chat template."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from monteclora.data.chat import CHATML
from monteclora.data.models import resolve_model
from monteclora.errors import ConfigError
from monteclora.metrics.registry import metrics_for
from monteclora.runs.recipe import Recipe
from monteclora.studies.recipe import StudyRecipe
from monteclora.system.quiet import quiet_libraries
from monteclora.tasks import DataSpec, load
from monteclora.tasks.kinds import KINDS

__all__ = ["Contents"]

_OF_A_MODEL = frozenset((".bin", ".gguf", ".jinja", ".json", ".model", ".py", ".safetensors", ".txt"))


@dataclass(frozen=True)
class _Data:
    """The checksum of each split's content, the split that is evaluated, and the metrics that it has."""

    checksums: str
    split: str
    metrics: tuple[str, ...]


class Contents:
    """Checksums of the files that the recipes of a study name; each is read once.

    Args:
        study: says what is evaluated.
    """

    def __init__(self, study: StudyRecipe) -> None:
        self._study = study
        self._data: dict[str, _Data] = {}
        self._models: dict[str, str | None] = {}

    def of(self, recipe: Recipe) -> dict[str, str]:
        """What identifies the content of a recipe's files, by what it is of.

        The data always; a model where it is a folder or file of its own, by all that it is loaded from; a chat template
        where it is a file.

        Raises:
            ConfigError: the study's metric is not one of the task, or a file cannot be read.
            DataError: the data are wrong, or do not have the split that the study evaluates.
        """
        found = {"data": self._checked_data(recipe.data).checksums}
        name = recipe.model.name
        if name not in self._models:
            self._models[name] = _model_sha256(name)
        if (model := self._models[name]) is not None:
            found["model"] = model
        template = recipe.data.chat_template
        if template is not None and template != CHATML:
            found["chat_template"] = _sha256(Path(template))
        return found

    def split(self, recipe: Recipe) -> str:
        """The split that a recipe is evaluated on. Raises as :meth:`of`."""
        return self._checked_data(recipe.data).split

    def _checked_data(self, spec: DataSpec) -> _Data:
        key = json.dumps(dataclasses.asdict(spec), sort_keys=True)
        if key not in self._data:
            self._data[key] = self._read(spec)
        metric, known = self._study.metric, self._data[key].metrics
        if metric is not None and metric not in known:
            raise ConfigError(
                f"metric is {metric}, and {spec.task or 'the task'} has {', '.join(known)}", "Choose one."
            )
        return self._data[key]

    def _read(self, spec: DataSpec) -> _Data:
        with quiet_libraries():
            data = load(spec)
        split = self._study.split or ("test" if "test" in data.splits else "validation")
        rows = data.split(split)
        metrics = [metric.name for of in KINDS[data.kind].scorings(rows) for metric in metrics_for(of)]
        checksums = {split: source.sha256 for split, source in data.sources.items()}
        return _Data(json.dumps(checksums, sort_keys=True), split, tuple(metrics))


def _model_sha256(name: str) -> str | None:
    """Of a model folder or GGUF file; None for a model that its name identifies."""
    source = resolve_model(name)
    if source.where != "folder":
        return None
    folder = Path(source.path)
    paths = sorted(folder.iterdir()) if source.gguf_file is None else [folder / source.gguf_file]
    files = {path.name: _sha256(path) for path in paths if path.suffix in _OF_A_MODEL and path.is_file()}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}",
            "Check the path; it leads from the recipe's folder, or from here.",
        ) from None
