"""What of a recipe's data and model is on this machine, for a dry run; the rest is known, estimated or left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from monteclora.data.encoding import Encoded
from monteclora.data.kinds import Kind
from monteclora.data.models import load_config, positions_of, resolve_model
from monteclora.data.published import CHAT_MODELS, published_config
from monteclora.data.stand_in import stand_in_tokenizer
from monteclora.errors import NotAtHandError
from monteclora.runs.prepare import PreparedData, prepare_data, tokenizer_of
from monteclora.runs.recipe import Recipe
from monteclora.tasks import TaskData, get_task, is_task

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

__all__ = ["AtHand", "config_of", "look"]


@dataclass(frozen=True)
class AtHand:
    """A recipe's data as far as they can be had.

    Attributes:
        kind: of the task.
        label_names: in the order of the classes; None for a causal LM.
        data: tokenised rows; None where they are not on this machine.
        estimated: whether a stand-in tokenised them: their lengths are estimates, and no model can read them.
        notes: what was set aside, truncated or left out, and what is not available, in words.
    """

    kind: Kind
    label_names: tuple[str, ...] | None
    data: PreparedData | None
    estimated: bool
    notes: tuple[str, ...]

    @property
    def encoded(self) -> Mapping[str, Encoded]:
        """Token ids of each split; none of rows that are not there."""
        return {} if self.data is None else self.data.encoded

    @property
    def lengths(self) -> list[int]:
        """Tokens of each training row."""
        return [] if self.data is None else [len(ids) for ids in self.data.train["input_ids"]]


def look(recipe: Recipe) -> AtHand:
    """Load and tokenise the rows of a recipe, as far as that goes without what is not on this machine.

    A stand-in replaces the tokenizer of a model of :mod:`monteclora.data.published`, and rows of a task with a name are
    left out.

    Raises:
        DataError: the data are wrong, or not at hand and of no task that is known.
        ConfigError: the recipe is wrong, or its model is not available and of no published shape.
    """
    config = config_of(recipe)  # an unknown model is told before rows are read
    stand_in, notes = None, tuple[str, ...]()
    try:
        tokenizer_of(recipe)
    except NotAtHandError:

        def stand_in(task: TaskData) -> PreTrainedTokenizerBase:
            chats = recipe.model.name in CHAT_MODELS
            return stand_in_tokenizer(task.splits.values(), config, positions=positions_of(config), chats=chats)

        notes = (
            f"the tokenizer of {recipe.model.name} is not available: lengths are estimated with one that cuts words "
            "into pieces of at most six letters, and rows are shown as it has them",
        )
    try:
        data = prepare_data(recipe, stand_in)
    except NotAtHandError as error:
        if not is_task(recipe.data.task or ""):
            raise
        task = get_task(recipe.data.task or "")
        unknown = f"{error} Until then the number of rows, their lengths and what depends on them are not known"
        return AtHand(task.kind, task.label_names, None, stand_in is not None, (unknown,))
    return AtHand(data.task.kind, data.task.label_names, data, stand_in is not None, (*notes, *data.notes))


def config_of(recipe: Recipe) -> PretrainedConfig:
    """The configuration of a recipe's model, of a published one also without its files.

    Raises:
        ConfigError: there is none.
        UnsafeCodeError: it needs code that comes with it.
    """
    try:
        return load_config(resolve_model(recipe.model.name), recipe.model.trust_remote_code)
    except NotAtHandError:
        found = published_config(recipe.model.name)
        if found is None:
            raise
        return found
