"""A run's adapter for others: a folder that says what it is, and the same folder on the Hugging Face hub."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from monteclora.adapters.card import portable_name
from monteclora.adapters.storage import CONFIG_FILE, POSTERIOR_FILE
from monteclora.data.models import STARTERS, resolve_model
from monteclora.errors import ConfigError, ServerError
from monteclora.runs.adapter_folder import ADAPTER_FILES, FACTS_FILE, AdapterFacts, write_facts
from monteclora.runs.data_facts import DataFacts, data_facts
from monteclora.runs.loading import check_finished
from monteclora.runs.prepare import tokenizer_of
from monteclora.runs.recipe import Recipe
from monteclora.runs.result import RunResult
from monteclora.runs.run_card import run_card
from monteclora.runs.run_folder import RunFolder
from monteclora.system.atomic import staged
from monteclora.system.quiet import quiet_libraries
from monteclora.tasks.local import is_hub_name

__all__ = ["export_adapter", "push_to_hub"]

_WRITTEN_ANEW = frozenset(("README.md", CONFIG_FILE, FACTS_FILE))
_MODEL_FILES = (".safetensors", ".json", ".txt", ".model", ".jinja")


def export_adapter(run: str | Path | RunResult, directory: str | Path, name: str | None = None) -> Path:
    """Write what a run trained as a folder for others: weights, posterior, tokenizer, and a filled model card.

    The base model is named as others find it, label names are kept in ``monteclora.json``, and no path of this machine
    is written. peft loads the folder as any adapter, :func:`monteclora.load` with its labels.

    Args:
        run: finished; a run folder, or what ``train`` gave.
        directory: the folder to write.
        name: what the card calls the model; by default the folder's name.

    Returns:
        The folder.

    Raises:
        CheckpointError: not a run, an unfinished one, or its files are damaged.
        ConfigError: an ensemble.
    """
    folder = RunFolder.existing(run.folder if isinstance(run, RunResult) else run)
    recipe = folder.recipe
    if recipe.ensemble > 1:
        raise ConfigError(
            f"{folder.path} is an ensemble of {recipe.ensemble} runs, and an adapter is of one",
            f"Give one of its members, such as {folder.members[0].path if folder.members else folder.path}.",
        )
    check_finished(folder)
    data, target = data_facts(folder), Path(directory)
    facts = _facts(recipe, data)
    base = _base(recipe)
    with quiet_libraries(), staged(target) as stage:
        for file in _model_files(folder):
            copied = stage / file.relative_to(folder.adapter)
            copied.parent.mkdir(exist_ok=True)
            shutil.copy2(file, copied)
        if (folder.adapter / CONFIG_FILE).is_file():
            config = json.loads((folder.adapter / CONFIG_FILE).read_text(encoding="utf-8"))
            config["base_model_name_or_path"] = base
            (stage / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
            write_facts(stage, facts)
        if not (stage / "tokenizer_config.json").is_file():
            tokenizer_of(recipe).save_pretrained(str(stage))
        run_card(folder, recipe, data, facts, name or target.name, base).save(stage / "README.md")
    if not (folder.adapter / POSTERIOR_FILE).is_file():
        (target / POSTERIOR_FILE).unlink(missing_ok=True)  # that an adapter of this name left
    return target


def _model_files(run: RunFolder) -> Iterator[Path]:
    """What is published as it is: all that a method saved, and beside an adapter from elsewhere what belongs to it."""
    patterns = ADAPTER_FILES if run.is_adapter else [f"*{ending}" for ending in _MODEL_FILES]
    found = {file for pattern in patterns for file in run.adapter.glob(pattern)}
    return (file for file in sorted(found) if file.is_file() and file.name not in _WRITTEN_ANEW)


def push_to_hub(run: str | Path | RunResult, name: str, *, private: bool = False, token: str | None = None) -> str:
    """Put what a run trained on the Hugging Face hub, as :func:`export_adapter` writes it.

    The repository is made where there is none. Nothing is sent before the whole folder is written.

    Args:
        run: finished; a run folder, or what ``train`` gave.
        name: of the repository, ``owner/name``.
        private: whether a repository that is made is private; one that is there stays as it is.
        token: of the hub; by default that of ``hf auth login``.

    Returns:
        The address of what was written.

    Raises:
        CheckpointError: not a run, an unfinished one, or its files are damaged.
        ConfigError: ``name`` is no such name, or an ensemble.
        ServerError: the hub is out of reach, or refuses.
    """
    import huggingface_hub

    if not is_hub_name(name) or ":" in name:
        raise ConfigError(f"the repository {name!r} is no owner/name", "Write it as in me/tickets.")
    with tempfile.TemporaryDirectory(prefix="monteclora-") as temporary:
        folder = export_adapter(run, Path(temporary) / name.rpartition("/")[2], name)
        with _hub_errors(name):
            api = huggingface_hub.HfApi(token=token, library_name="monteclora")
            repository = api.create_repo(name, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repository.repo_id, folder_path=str(folder), commit_message="Upload from monteclora"
            )
    return str(repository)


def _base(recipe: Recipe) -> str:
    """The base model, as others find it."""
    source = resolve_model(recipe.model.name)
    starter = STARTERS.get(recipe.model.name)
    return starter.hub_name if starter else portable_name(source.path) or recipe.model.name


def _facts(recipe: Recipe, data: DataFacts) -> AdapterFacts:
    is_here_alone = resolve_model(recipe.model.name).where == "folder"
    return AdapterFacts(
        base=None if is_here_alone else recipe.model.name,
        kind=data.kind,
        label_names=data.label_names,
        max_length=recipe.data.max_length,
        text_columns=data.columns.text if data.columns is not None and data.kind != "causal_lm" else (),
        scale=data.scale,
        num_samples=recipe.evaluation.num_samples,
    )


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """What the hub's library raises where it is out of reach or refuses."""
    try:
        yield
    except Exception as error:  # its errors have no base in common: they are those of whatever it sends requests with
        reason = " ".join(str(error).split())[:200]
        raise ServerError(
            f"{name} cannot be written to the hub ({type(error).__name__}: {reason})",
            "Check the name, the network, and that `hf auth login` was given a token that may write.",
        ) from None
