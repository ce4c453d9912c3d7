"""Rows are tokenised once: token ids are kept on disk under the checksum of everything they depend on."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from monteclora.data.encoding import Encoded, encode
from monteclora.data.gguf import cache_folder
from monteclora.data.kinds import Kind
from monteclora.data.truncation import Truncation
from monteclora.errors import CheckpointError
from monteclora.system.atomic import write_file

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["encode_once"]

_FORMAT = 2  # to be raised with every change of what encode() gives
_ATTRIBUTES = ("special_tokens_map", "model_input_names", "model_max_length", "truncation_side", "chat_template")
_ROWS = 10_000

logger = logging.getLogger(__name__)


def encode_once(
    rows: Dataset,
    kind: Kind,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    truncation: Truncation = "prompt_start",
) -> Encoded:
    """As :func:`~monteclora.data.encoding.encode`; from the cache if the same was encoded before.

    The key is the content of the rows, of the tokenizer and of its chat template, ``max_length``, ``truncation`` and
    the versions of what tokenises. A damaged file is made again; where the cache cannot be written, nothing is kept.
    """
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:  # a tokenizer in Python: its content is unknown
        return encode(rows, kind, tokenizer, max_length, truncation)
    folder = cache_folder() / "tokens"
    key = _key(rows, kind, tokenizer, json.loads(fast.to_str()), max_length, truncation)
    for path in sorted(folder.glob(f"{key}-*.arrow")):
        found = _read(path)
        if found is not None:
            return found
    made = encode(rows, kind, tokenizer, max_length, truncation)
    try:
        _write(folder, key, made)
    except CheckpointError as error:
        logger.info("token ids are not kept: %s", error)
    return made


def _key(
    rows: Dataset,
    kind: Kind,
    tokenizer: PreTrainedTokenizerBase,
    content: dict[str, Any],
    max_length: int,
    truncation: Truncation,
) -> str:
    # how the last call cut and padded is in the content too
    lasting = {name: part for name, part in content.items() if name not in ("truncation", "padding")}
    facts = {
        "format": _FORMAT,
        "kind": kind,
        "max_length": max_length,
        "truncation": truncation,
        "tokenizer": [type(tokenizer).__name__, lasting, *(getattr(tokenizer, name) for name in _ATTRIBUTES)],
        "versions": [importlib.metadata.version(name) for name in ("tokenizers", "transformers")],
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for table in rows.with_format("arrow").iter(batch_size=_ROWS):
        digest.update(_stream(table.combine_chunks().replace_schema_metadata(None)))
    return digest.hexdigest()[:32]


def _stream(table: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _write(folder: Path, key: str, encoded: Encoded) -> None:
    """One file, whose name ends with its own checksum."""
    table = encoded.dataset.with_format("arrow")[:]
    about = {f.name: getattr(encoded, f.name) for f in dataclasses.fields(encoded) if f.name != "dataset"}
    metadata = {**(table.schema.metadata or {}), b"monteclora": json.dumps(about)}
    content = _stream(table.replace_schema_metadata(metadata))
    write_file(folder / f"{key}-{_checksum(content)}.arrow", content)


def _read(path: Path) -> Encoded | None:
    """What :func:`_write` wrote, memory-mapped; None where the file is damaged."""
    import datasets

    try:
        with path.open("rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        if not path.stem.endswith(f"-{checksum}"):
            return None
        about = json.loads(pa.ipc.open_stream(path).schema.metadata[b"monteclora"])
        return Encoded(datasets.Dataset.from_file(str(path)), **about)
    except OSError:
        return None


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
