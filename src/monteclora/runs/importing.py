"""Adapters of peft's MonteCLoRA variant: importing one needs its base model's configuration, and no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from monteclora.adapters.checks import check_adapter
from monteclora.adapters.importing import Imported, import_adapter
from monteclora.adapters.storage import CONFIG_FILE
from monteclora.data.models import empty_model, load_config, resolve_model
from monteclora.errors import ConfigError
from monteclora.system.quiet import quiet_libraries

__all__ = ["import_folder"]

_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def import_folder(folder: Path, out: Path, base: str | None = None) -> Imported:
    """Import an adapter, see :func:`~monteclora.adapters.importing.import_adapter`.

    Args:
        folder: of the adapter, or of a run of the method ``peft_monteclora``.
        out: the folder to write.
        base: the model it was trained on; by default the one that its configuration names.

    Raises:
        CheckpointError, ConfigError, UnsafeCodeError: as there; no base model is named, or there is none of that name.
    """
    adapter = folder / "adapter" if (folder / "adapter" / CONFIG_FILE).is_file() else folder
    check_adapter(adapter)
    written: dict[str, Any] = json.loads((adapter / CONFIG_FILE).read_text(encoding="utf-8"))
    name, task = base or written.get("base_model_name_or_path"), written.get("task_type")
    if not name:
        raise ConfigError(f"{adapter / CONFIG_FILE} names no base model", "Give it with --base.")
    if task not in _CLASSES:
        raise ConfigError(
            f"{adapter / CONFIG_FILE} has the task_type {task}, which does not say what model it is for",
            "Import it in Python: monteclora.adapters.importing.import_adapter(model, folder, out).",
        )
    source = resolve_model(name)
    with quiet_libraries():
        return import_adapter(empty_model(source, load_config(source), _CLASSES[task]), adapter, out)
