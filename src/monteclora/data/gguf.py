"""GGUF files as ordinary transformers models.

transformers takes half a minute to dequantise such a file, and the model it gives refuses to be saved. So the
weights are dequantised once, into a folder of safetensors in the user's cache.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monteclora.errors import ConfigError
from monteclora.system.extras import require_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["CACHE_VARIABLE", "cache_folder", "dequantised_folder", "rebuilt"]

CACHE_VARIABLE = "MONTECLORA_CACHE"
_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """``MONTECLORA_CACHE``, else ``~/.cache/monteclora``. It may not exist yet."""
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given).expanduser() if given else Path.home() / ".cache" / "monteclora"


def dequantised_folder(gguf: Path) -> Path:
    """The folder with the model and tokenizer of a GGUF file; made at the first call (about half a minute).

    Its name holds the checksum of the file and the transformers version that read it.

    Raises:
        ConfigError: the cache cannot be written, or the extra ``gguf`` is not installed.
        OSError, ValueError: transformers cannot read the file.
    """
    import transformers

    require_gguf(f"reading {gguf.name}")
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = cache_folder() / "models" / f"{gguf.stem}-{digest[:16]}-transformers-{transformers.__version__}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".unfinished-"))
    except OSError as error:
        raise ConfigError(
            f"cannot write the cache folder {folder.parent}: {error.strerror}",
            f"Set {CACHE_VARIABLE} to a folder that can be written.",
        ) from None
    try:
        _convert(gguf, scratch)
        _publish(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def rebuilt(model: PreTrainedModel) -> PreTrainedModel:
    """A model loaded from GGUF as an ordinary one: same class, weights and ties, no mark of quantisation."""
    config = type(model.config).from_dict(
        {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    )
    config.architectures = [type(model).__name__]
    fresh: Any = type(model)(config)
    fresh.to(model.dtype).load_state_dict(model.state_dict())
    fresh.tie_weights()
    fresh.generation_config = model.generation_config
    fresh.name_or_path = model.name_or_path
    result: PreTrainedModel = fresh
    return result


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    import transformers

    _log.info("dequantising %s once, into the cache", gguf.name)
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    # The rebuilt model draws initial weights before it gets the right ones: not from the caller's generator.
    with torch.random.fork_rng(devices=[]):
        model = rebuilt(transformers.AutoModelForCausalLM.from_pretrained(**where))
    longest = getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
    tokenizer.model_max_length = min(tokenizer.model_max_length, longest)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _publish(scratch: Path, folder: Path) -> None:
    """Flush the finished files and give the folder its name; another process may have been faster."""
    for path in scratch.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    try:
        scratch.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
