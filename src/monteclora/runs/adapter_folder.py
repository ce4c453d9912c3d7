"""An adapter folder, without the run that trained it, to a model that predicts."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors

from monteclora.adapters.checks import check_adapter
from monteclora.adapters.storage import CONFIG_FILE, POSTERIOR_FILE, WEIGHTS_FILE, load_posterior
from monteclora.config.checks import check_at_least_one
from monteclora.data.kinds import Kind
from monteclora.data.models import STARTERS, ModelSource, load_config, load_model, load_tokenizer, resolve_model
from monteclora.data.scores import ScoreScale
from monteclora.errors import CheckpointError, ConfigError, UnsafeCodeError
from monteclora.methods import get_method
from monteclora.runs.documents import read_document, write_document
from monteclora.runs.foreign_adapter import lora_options
from monteclora.runs.loading import LoadedRun, with_adapter
from monteclora.runs.recipe import EvaluationSpec, ModelSpec, Recipe
from monteclora.runs.run_folder import RunFolder
from monteclora.system.devices import training_device
from monteclora.system.quiet import quiet_libraries
from monteclora.tasks import DataSpec
from monteclora.tasks.kinds import KINDS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "ADAPTER_FILES",
    "FACTS_FILE",
    "AdapterFacts",
    "fetched",
    "load_adapter_folder",
    "run_of_adapter",
    "write_facts",
]

FACTS_FILE = "monteclora.json"
"""Beside a published adapter: what its files do not say."""

_OF_TOKENIZER = (
    *("tokenizer*", "*vocab*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json"),
    *("*.jinja", "additional_chat_templates/*"),
)
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, POSTERIOR_FILE, FACTS_FILE, "README.md", *_OF_TOKENIZER)
"""What belongs to an adapter, as patterns: what is fetched of one on the hub, and published of one from elsewhere."""

_FORMAT = 1
_AGAIN = "Remove it, or take the folder from a backup."
_SCALE = ("centre", "spread")
_NAME_IT = 'Name it: monteclora.load(folder, base="MODEL").'
_LONGEST = 512  # tokens of a text, where nothing says what the adapter was trained with


@dataclass(frozen=True)
class AdapterFacts:
    """What a run knows of its adapter and the adapter's files do not say.

    Attributes:
        base: the model as the recipe named it; None for one that only the training machine had.
        kind: of the task.
        label_names: in the order of the classes; None where there are none.
        max_length: most tokens of a text.
        text_columns: what the texts were called, one or two.
        scale: on which scores were learned; None for other kinds.
        num_samples: posterior draws per prediction.
    """

    base: str | None
    kind: Kind
    label_names: tuple[str, ...] | None
    max_length: int
    text_columns: tuple[str, ...] = ()
    scale: ScoreScale | None = None
    num_samples: int = 16


def write_facts(folder: Path, facts: AdapterFacts) -> None:
    """Put them into the folder of the adapter."""
    scale = None if facts.scale is None else {"centre": facts.scale.centre, "spread": facts.scale.spread}
    write_document(folder / FACTS_FILE, _FORMAT, {**vars(facts), "scale": scale})


def run_of_adapter(folder: Path) -> Path | None:
    """The run whose ``adapter`` folder this is; None for an adapter that is elsewhere."""
    parent = folder.resolve().parent
    return parent if (parent / "recipe.yaml").is_file() and RunFolder(parent).adapter == folder.resolve() else None


def fetched(name: str) -> Path:
    """The files of an adapter on the hub, in the hub's cache; of weights those in safetensors alone.

    Raises:
        CheckpointError: there is none of this name, or the hub is out of reach and the cache does not have it.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(ADAPTER_FILES)))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{name} is neither a folder nor an adapter within reach on the hub: {reason}", "Check the name."
        ) from None


def load_adapter_folder(folder: Path, base: str | None = None) -> tuple[LoadedRun, tuple[str, ...]]:
    """Load an adapter that peft, monteclora or ``monteclora push`` wrote, and the model it belongs on.

    The base model is the one that ``monteclora.json``, the adapter's configuration or its card names, in this order.
    The names of labels are those of ``monteclora.json``, of the posterior's file, or of the base model.

    Args:
        folder: the adapter's.
        base: the model to put it on, as a recipe names it.

    Returns:
        What predicts as a run does, but for what needs the training rows, and what was taken for granted, in words.

    Raises:
        CheckpointError: a file is missing or damaged, does not fit the model, or says of no task what it is.
        ConfigError: no base model is named, or it cannot be loaded.
        UnsafeCodeError: the weights are a pickle, or the model needs code that comes with it.
    """
    check_adapter(folder)
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    facts = read_document(folder / FACTS_FILE, _FORMAT, _read_facts, _AGAIN)
    kind = facts.kind if facts else _kind_of(folder, config)
    name, notes = _base_name(folder, config, facts, base)
    labels, about_labels = _labels_of(folder, kind, facts, name)
    source = resolve_model(name)
    with quiet_libraries(), _asking_for_a_base(base):
        tokenizer = _tokenizer_of(folder, source)
        recipe = _recipe_of(folder, config, facts, name, tokenizer.model_max_length)
        outputs = KINDS[kind].outputs(labels)
        model = load_model(
            source,
            kind,
            id2label=dict(enumerate(outputs)) if outputs else None,
            pad_token_id=tokenizer.pad_token_id,
        )
    with quiet_libraries(), warnings.catch_warnings():
        # peft asks the hub whether the vocabulary has changed, which does not concern an adapter without embeddings
        warnings.filterwarnings("ignore", message="Could not find a config file")
        adapted = with_adapter(model, folder)
        adapted.to(training_device())
        adapted.requires_grad_(False).eval()
    loaded = LoadedRun(folder, recipe, kind, labels, adapted, tokenizer, scale=facts.scale if facts else None)
    return loaded, (*notes, *about_labels)


def _read_facts(document: dict[str, Any]) -> AdapterFacts:
    kind, labels = document["kind"], document["label_names"]
    if kind not in KINDS or not KINDS[kind].accepts(labels):
        raise ValueError("it names no kind of task with its labels")
    length, samples = int(document["max_length"]), int(document["num_samples"])
    check_at_least_one(max_length=length, num_samples=samples)
    scale = None if document["scale"] is None else ScoreScale(*(float(document["scale"][n]) for n in _SCALE))
    if (scale is None) == (kind == "regression"):
        raise ValueError("scores have a scale, and nothing else has one")
    base = None if document["base"] is None else str(document["base"])
    return AdapterFacts(
        base, kind, tuple(labels) if labels else None, length, tuple(document["text_columns"]), scale, samples
    )


def _kind_of(folder: Path, config: Mapping[str, Any]) -> Kind:
    """What peft says of the task; scores and several labels need more than it says."""
    kinds: dict[str, Kind] = {"SEQ_CLS": "classification", "CAUSAL_LM": "causal_lm"}
    found = config.get("task_type")
    if found not in kinds:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} has the task_type {found}, expected one of {', '.join(kinds)}",
            "Write it there, or load the model with monteclora.from_pretrained.",
        )
    return kinds[found]


def _base_name(
    folder: Path, config: Mapping[str, Any], facts: AdapterFacts | None, base: str | None
) -> tuple[str, tuple[str, ...]]:
    """The model that an adapter belongs on, and what to say of it."""
    if base is not None:
        return base, ()
    named = {
        FACTS_FILE: facts.base if facts else None,
        CONFIG_FILE: config.get("base_model_name_or_path"),
        "README.md": _base_of_card(folder / "README.md"),
    }
    for file, name in named.items():
        # a word alone is what is left of the path of another machine
        if name and (name in STARTERS or "/" in name or Path(name).is_dir()):
            starter = next((s for s in STARTERS.values() if s.hub_name == name and s.path()), None)
            if starter is not None:
                return starter.name, (
                    f"the base model {name}, which {file} names, is the starter model {starter.name}",
                )
            return str(name), (f"the base model is {name}, as {file} says",)
    raise ConfigError(f"nothing in {folder} names a base model that can be found from here", _NAME_IT)


def _base_of_card(path: Path) -> str | None:
    """The base model in the metadata of a card; of several the first."""
    from huggingface_hub import ModelCard

    if not path.is_file():
        return None
    try:
        found: Any = ModelCard.load(path).data.to_dict().get("base_model")
    except (ValueError, OSError, LookupError):
        return None  # a card is prose: one that says nothing is no error
    return found[0] if isinstance(found, list) and found else found if isinstance(found, str) else None


def _labels_of(
    folder: Path, kind: Kind, facts: AdapterFacts | None, base: str
) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """The names of the labels in the order of the classes, and what to say of them."""
    if facts is not None or kind == "causal_lm":
        return facts.label_names if facts else None, ()
    stored = load_posterior(folder / POSTERIOR_FILE).labels if (folder / POSTERIOR_FILE).is_file() else {}
    if stored:
        return tuple(stored[index] for index in sorted(stored)), ()
    count = _outputs_saved(folder / WEIGHTS_FILE)
    own = load_config(resolve_model(base)).id2label or {}
    if count in (None, len(own)) and not all(str(name) == f"LABEL_{index}" for index, name in own.items()):
        return tuple(str(own[index]) for index in sorted(own)), (f"the labels are those of {base}",)
    names = tuple(f"LABEL_{index}" for index in range(count or len(own)))
    return names, (f"nothing in {folder} names the labels: they are called {names[0]} to {names[-1]}",)


def _outputs_saved(weights: Path) -> int | None:
    """How many outputs the head has that an adapter saved whole; None where it saved none."""
    with safetensors.safe_open(weights, framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not a mapping
    # of a head of two layers the last one is the narrower
    found = [
        shape[0]
        for name, shape in shapes.items()
        if len(shape) == 2 and ".lora_" not in name and {"classifier", "score"} & {*name.split(".")}
    ]
    return min(found, default=None)


def _recipe_of(
    folder: Path, config: Mapping[str, Any], facts: AdapterFacts | None, base: str, positions: int
) -> Recipe:
    """A recipe that says of the adapter what predicting reads; of its data nothing is known but lengths."""
    options_of: Any = get_method("monteclora" if (folder / POSTERIOR_FILE).is_file() else "lora").options
    return Recipe(
        name=folder.resolve().name,
        model=ModelSpec(base),
        data=DataSpec(
            max_length=facts.max_length if facts else min(_LONGEST, positions),
            text_columns=list(facts.text_columns) if facts else [],
        ),
        method=options_of(**lora_options(folder, config)),
        evaluation=EvaluationSpec(num_samples=facts.num_samples) if facts else EvaluationSpec(),
        output=str(folder),
    )


def _tokenizer_of(folder: Path, source: ModelSource) -> PreTrainedTokenizerBase:
    """The adapter's own, which can have another chat template or more words, else the base model's."""
    from transformers import AutoTokenizer

    of_base = load_tokenizer(source)
    if not (folder / "tokenizer_config.json").is_file():
        return of_base
    try:
        own: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"the tokenizer in {folder} cannot be loaded ({type(error).__name__})", _AGAIN) from None
    own.pad_token = own.pad_token or own.eos_token or of_base.pad_token
    own.model_max_length = min(own.model_max_length, of_base.model_max_length)
    return own


@contextmanager
def _asking_for_a_base(base: str | None) -> Iterator[None]:
    """Say where a base model that was found, and cannot be loaded, could have been named."""
    try:
        yield
    except UnsafeCodeError:
        raise
    except ConfigError as error:
        if base is not None:
            raise
        raise type(error)(error.message, f"{error.hint} {_NAME_IT}".strip()) from None
