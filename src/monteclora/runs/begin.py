"""Starting a run, or resuming it: the one place that decides whether a folder holds the run of a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from monteclora.errors import CheckpointError, MonteCLoRAError
from monteclora.runs.data_facts import data_facts
from monteclora.runs.determining import differences, recipe_sha256
from monteclora.runs.manifest import Checkpoint, newest_complete
from monteclora.runs.recipe import Recipe
from monteclora.runs.resumption import accepted_sha256, check_changes, resumed
from monteclora.runs.run_folder import RunFolder
from monteclora.system.devices import is_main_process
from monteclora.tasks import SplitSource

__all__ = ["Run", "begin", "describe_folder"]


@contextmanager
def begin(recipe: Recipe, *, override: bool = False) -> Iterator[Run]:
    """Make the recipe's folder that of this run, and keep it for this process until the block ends.

    A new folder, one in which the same run was started, or one in which nothing was trained yet. Of several processes
    of one run the first does it for all.

    Args:
        recipe: what is trained.
        override: resume an unfinished run whose recipe or data changed, see :func:`monteclora.train`.

    Raises:
        CheckpointError: the folder holds a run of another recipe (the message names the keys that differ) or other
            files, among them an adapter that was trained elsewhere, another process trains it, or it cannot be made.
    """
    run = Run(RunFolder(recipe.folder), recipe, override)
    if run.folder.is_adapter:
        raise CheckpointError(f"{run.folder.path} is an adapter that was trained elsewhere", "Choose another output.")
    if not is_main_process():
        yield run
        return
    with run.folder.locked():
        run.folder.discard_remains()
        _claim(run)
        yield run


@dataclass(frozen=True)
class Run:
    """A run that this process trains.

    Attributes:
        folder: its files.
        recipe: what is trained.
        override: whether changes of recipe and data since it was started are accepted.
    """

    folder: RunFolder
    recipe: Recipe
    override: bool = False

    @property
    def finished(self) -> dict[str, Any] | None:
        """The last line of the metrics of a finished run, else None."""
        return self.folder.finished

    def check_data(self, sources: Mapping[str, SplitSource]) -> None:
        """Make sure that the run, a finished one, was trained on the rows that its recipe names now.

        Args:
            sources: of the splits as they are loaded now.

        Raises:
            CheckpointError: they are others, or the run's environment is damaged.
        """
        before = data_facts(self.folder).sha256
        for split, source in sources.items():
            if split in before and before[split] != source.sha256:
                raise CheckpointError(
                    f"the {split} rows of {source.origin} changed since {self.folder.path} was trained, "
                    "and it is finished",
                    "Restore them, or choose another name or output to train on these.",
                )

    def checkpoint(self) -> Checkpoint | None:
        """The checkpoint to resume from; None where there is none.

        Raises:
            CheckpointError: it was written for another recipe, and that was never accepted.
        """
        found = newest_complete(self.folder.checkpoints)
        if found is None or self.override or found.recipe_sha256 == recipe_sha256(self.recipe):
            return found
        environment = self.folder.environment
        accepted = accepted_sha256(environment)
        if not differences(self.folder.recipe, self.recipe):
            # of the same recipe: in other words of its paths, or by an earlier version
            accepted += [environment.get("recipe_sha256", ""), recipe_sha256(self.folder.written_recipe)]
        if found.recipe_sha256 not in accepted:
            raise CheckpointError(f"{found.path} was written for another recipe", f"Remove {self.folder.checkpoints}.")
        return found

    def note(self, facts: dict[str, Any], checkpoint: Checkpoint | None) -> None:
        """Write down what is trained on, on resuming also what is not as it was; and a recipe that was accepted.

        Args:
            facts: the content of ``environment.json`` as of now.
            checkpoint: what the run resumes from.

        Raises:
            CheckpointError: the data are others than when the run began, and that was not accepted, or their labels
                are.
        """
        if checkpoint is not None:
            facts = resumed(self.folder, self.recipe, facts, checkpoint, override=self.override)
        elif self.folder.begun and (place := self.folder.started_in) is not None:
            facts = {**facts, "started_in": place}  # the paths of its recipe lead from there
        self.folder.write_environment(facts)
        self.folder.record_recipe(self.recipe)


def describe_folder(recipe: Recipe) -> str:
    """Whether the recipe's folder is there, and whose it is, in words; nothing is changed."""
    run = RunFolder(recipe.folder)
    if run.is_adapter:
        return "an adapter that was trained elsewhere: training refuses it"
    if not run.path.exists():
        return "new"
    if not run.recipe_file.is_file():
        return "holds other files and is no run: training refuses it" if run.holds_other_files else "an empty folder"
    try:
        changed = differences(run.recipe, recipe)
        if changed:
            others = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
            begun = "training refuses it" if run.begun else "nothing was trained yet, and training takes it over"
            return f"a run of another recipe, which differs in {others}: {begun}"
        if run.finished is not None:
            return "a finished run of this recipe: there is nothing left to train"
        checkpoint = newest_complete(run.checkpoints)
    except MonteCLoRAError as error:
        return f"a run that cannot be read: {error}"
    at = "its start" if checkpoint is None else f"step {checkpoint.total_step}"
    return f"an unfinished run of this recipe: training resumes it at {at}"


def _claim(run: Run) -> None:
    """A recipe that is accepted on purpose is not recorded yet: :meth:`Run.note` does it when training resumes.

    A run that has begun keeps the words of its paths, which lead from where it was started; one that has not is started
    here.
    """
    folder = RunFolder(run.folder.path)  # what it reads is not kept: it may be replaced here
    if folder.recipe_file.is_file() and folder.begun:
        changed = differences(folder.recipe, run.recipe)
        if changed:
            check_changes(folder, changed, run.override)
        else:
            folder.record_recipe(run.recipe)
        return
    folder.write_recipe(run.recipe)
