"""What the configuration of a LoRA adapter says, whatever tool wrote it, in the words of a recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monteclora.adapters.storage import CONFIG_FILE
from monteclora.config import Document, build
from monteclora.config.document import from_python
from monteclora.data.kinds import Kind
from monteclora.errors import DataError
from monteclora.methods.lora import LoRAFields, LoRAOptions
from monteclora.tasks.kinds import KINDS

__all__ = ["check_task", "lora_options"]

_ABSENT = {"r": 8, "lora_alpha": 8}  # what peft takes then, where a recipe's default may be another
_HEADS = ("classifier", "score")  # peft adds both to what a classifier's adapter saves, whatever its head is


def lora_options(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of :class:`~monteclora.methods.lora.LoRAFields` that an adapter was made with.

    Args:
        folder: of the adapter, for messages.
        config: what its ``adapter_config.json`` holds.

    Raises:
        ConfigError: a value is of another type than a recipe's, or out of its range.
    """
    names = [field.name for field in dataclasses.fields(LoRAFields) if field.name != "name"]
    written = {**_ABSENT, **{name: config[name] for name in names if config.get(name) not in (None, [], "")}}
    if isinstance(written.get("modules_to_save"), list):
        written["modules_to_save"] = [name for name in written["modules_to_save"] if name not in _HEADS]
    # peft keeps lists of layers as sets, which it writes in any order
    ordered = {name: sorted(value, key=str) if isinstance(value, list) else value for name, value in written.items()}
    file = str(folder / CONFIG_FILE)
    checked = build(LoRAOptions, Document(from_python(ordered, file), file))
    return {name: getattr(checked, name) for name in names}


def check_task(folder: Path, config: Mapping[str, Any], kind: Kind, rows: str = "the rows") -> None:
    """Check that an adapter is one for rows of this kind; one that says nothing of its task is taken for it.

    Args:
        folder: of the adapter.
        config: what its ``adapter_config.json`` holds.
        kind: of the rows.
        rows: what messages call them.

    Raises:
        DataError: it is for another one.
    """
    expected, found = KINDS[kind].peft_task, config.get("task_type")
    if found not in (None, expected):
        raise DataError(
            f"{rows} are for {expected}, and the adapter {folder} is one for {found}",
            "Give rows with the columns of the adapter's task.",
        )
