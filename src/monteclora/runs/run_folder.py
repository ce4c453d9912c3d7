"""A run on disk: ``recipe.yaml``, ``environment.json``, ``metrics.jsonl``, ``adapter/`` and ``checkpoints/``.

An ensemble has ``members/seed-SEED/`` in the place of the last two, a run each.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import Any

from filelock import FileLock, Timeout

from monteclora.config import dump
from monteclora.errors import CheckpointError
from monteclora.runs.metrics_log import MetricsLog
from monteclora.runs.recipe import Recipe, load_recipe
from monteclora.runs.recipe_paths import kept_words, places_of
from monteclora.system.atomic import discard_remains, is_remains, write_file

__all__ = ["RunFolder", "RunInUseError"]

_MEMBERS, _MEMBER = "members", "seed-"
_MARKS = frozenset((".lock", "environment.json", "metrics.jsonl", "checkpoints", "adapter", _MEMBERS))
"""What training puts beside a recipe: a recipe alone in a folder may be somebody's only copy."""


class RunInUseError(CheckpointError):
    """Another process is training the run."""


@dataclass(frozen=True)
class RunFolder:
    """The files of a run.

    Args:
        path: its folder.
    """

    path: Path

    @classmethod
    def existing(cls, path: str | Path) -> RunFolder:
        """A folder that holds a run.

        Raises:
            CheckpointError: it does not.
        """
        run = cls(Path(path).expanduser())
        if not run.recipe_file.is_file():
            what = "has no recipe.yaml: it is not a run" if run.path.is_dir() else "does not exist"
            hint = "Give a folder that `monteclora train` made."
            if run.is_adapter:
                command = f"monteclora calibrate {quote(str(run.path))} --base MODEL --data FILE"
                hint = f"It is an adapter: run `{command}` on it first, or load it with monteclora.load."
            raise CheckpointError(f"the folder {run.path} {what}", hint)
        return run

    @property
    def recipe_file(self) -> Path:
        """The recipe with every default written out."""
        return self.path / "recipe.yaml"

    @property
    def is_adapter(self) -> bool:
        """Whether the folder is itself an adapter, trained elsewhere; see :mod:`monteclora.runs.adoption`."""
        return (self.path / "adapter_config.json").is_file()

    @property
    def adapter(self) -> Path:
        """The trained adapter, as ``save_pretrained`` writes it."""
        return self.path if self.is_adapter else self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def members(self) -> tuple[RunFolder, ...]:
        """The runs of an ensemble (recipe field ``ensemble``), in the order of their seeds; none of an ordinary run."""
        found = {path: path.name.removeprefix(_MEMBER) for path in (self.path / _MEMBERS).glob(f"{_MEMBER}*")}
        seeds = {path: int(seed) for path, seed in found.items() if seed.isdecimal()}
        return tuple(RunFolder(path) for path in sorted(seeds, key=seeds.__getitem__))

    def member(self, seed: int) -> RunFolder:
        """The member of an ensemble that has this seed, whether it is there or not."""
        return RunFolder(self.path / _MEMBERS / f"{_MEMBER}{seed}")

    @property
    def divergence_file(self) -> Path:
        """The rows of the batch that ended the run with a number that is not finite; absent where none did."""
        return self.path / "diverged.json"

    @cached_property
    def metrics(self) -> MetricsLog:
        """What was measured."""
        return MetricsLog(self.path / "metrics.jsonl")

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe as it was trained, with paths that lead to its files from here.

        Raises ConfigError where the file was changed into something else.
        """
        return load_recipe(self.recipe_file, places=places_of(self.path, self.started_in))

    @property
    def written_recipe(self) -> Recipe:
        """The same with its paths as they are written: they lead from where the run was started."""
        return load_recipe(self.recipe_file, places=())

    @property
    def started_in(self) -> dict[str, Any] | None:
        """Where the run was started, see :mod:`monteclora.runs.recipe_paths`; None where that is not written down.

        Earlier versions did not do it; damage of the file is told where it is needed.
        """
        try:
            environment: Any = self.environment
        except CheckpointError:
            return None
        found = environment.get("started_in") if isinstance(environment, dict) else None
        return found if isinstance(found, dict) else None

    @property
    def environment(self) -> dict[str, Any]:
        """What was trained on: versions, devices, data, labels.

        Raises:
            CheckpointError: the run has not come that far, or the file is damaged.
        """
        path = self.path / "environment.json"
        try:
            if path.exists() and not path.is_file():
                raise OSError("it is not a file")  # a pipe would never end
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"cannot read {path} ({error})", "Run `monteclora train` on its recipe again."
            ) from None
        return found

    def write_environment(self, facts: Mapping[str, Any]) -> None:
        """Put down what is trained on."""
        text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
        write_file(self.path / "environment.json", text.encode())

    @property
    def finished(self) -> dict[str, Any] | None:
        """The last line of the metrics of a finished run, else None; an adapter from elsewhere did."""
        if self.is_adapter:
            return {"event": "finished"}
        events = self.metrics.read()
        trained = all(part.adapter.is_dir() for part in self.members or (self,))
        return events[-1] if events and events[-1]["event"] == "finished" and trained else None

    @property
    def begun(self) -> bool:
        """Whether anything was measured or saved: else a recipe that could not be trained may be corrected."""
        return bool(self.metrics.read()) or any(self.checkpoints.glob("*"))

    @property
    def holds_other_files(self) -> bool:
        """Whether there is anything in the folder, and no run: no recipe, or one that training did not put there."""
        # killed while it wrote the recipe, a run leaves nothing but remains
        entries = {entry.name for entry in self.path.glob("*") if not is_remains(entry.name)}
        is_run = self.recipe_file.name in entries and bool(entries & _MARKS)
        return bool(entries - {".lock"}) and not is_run

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training this run at the same time.

        Raises:
            RunInUseError: another one does.
            CheckpointError: the folder holds other files and is no run, or it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if self.holds_other_files:
                raise CheckpointError(
                    f"the folder {self.path} holds files and is no run",
                    "Choose another name or output, or an empty folder.",
                )
            with FileLock(self.path / ".lock", timeout=0):
                yield
        except Timeout:
            raise RunInUseError(
                f"another process is training {self.path}", "Wait for it, or choose another name or output."
            ) from None
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise CheckpointError(
                f"cannot make the folder {self.path}: {error.strerror}", "Choose another output."
            ) from None

    def discard_remains(self) -> None:
        """Remove what a killed process left half-written; for the one that has the run :meth:`locked`."""
        files = (self.recipe_file, self.path / "environment.json", self.metrics.path, self.divergence_file)
        discard_remains(self.path, {file.name for file in files})  # evaluations may be being written
        discard_remains(self.checkpoints)

    def write_recipe(self, recipe: Recipe) -> None:
        """Put down what is trained."""
        write_file(self.recipe_file, dump(recipe).encode())

    def record_recipe(self, recipe: Recipe) -> None:
        """Put down what a run that began goes on with, or was given; from whichever directory that was said.

        Its paths lead from where the run was started, which stays what it is: one file is written, or none.
        """
        written = self.written_recipe
        kept = kept_words(recipe, self.recipe, written, places_of(self.path, self.started_in))
        if kept != written:
            self.write_recipe(kept)
