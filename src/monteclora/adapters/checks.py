"""What is checked of an adapter's files before they are loaded, and how what peft says of them reads."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors
from safetensors import SafetensorError
from torch import Tensor, nn

from monteclora.adapters.storage import CONFIG_FILE, RESTORE, WEIGHTS_FILE
from monteclora.config import brief
from monteclora.errors import CheckpointError, MonteCLoRAError, UnsafeCodeError

__all__ = ["adapter_errors", "check_adapter", "check_finite", "check_head"]

_PICKLED = "adapter_model.bin"
_PREFIX = "base_model.model."


def check_adapter(model_id: str | os.PathLike[str], subfolder: str | None = None, kind: str = "LORA") -> None:
    """Check the files of an adapter in a folder before peft sees them: it would read a pickle, and name no file.

    Raises:
        CheckpointError: one is missing or damaged, or the adapter is not of the ``kind`` that peft calls so.
        UnsafeCodeError: the weights are a pickle.
    """
    folder = Path(model_id) / (subfolder or "")
    if not Path(model_id).exists():
        return  # a name on the hub
    if (folder / _PICKLED).exists() and not (folder / WEIGHTS_FILE).is_file():
        raise UnsafeCodeError(
            f"{folder} has {_PICKLED} in place of {WEIGHTS_FILE}: a pickle, which can run any program",
            "Convert it to safetensors where you trust it.",
        )
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} has no {name}", RESTORE)
    try:
        found = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))["peft_type"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE} is damaged ({type(error).__name__})", RESTORE) from None
    if found != kind:
        raise CheckpointError(f"{folder / CONFIG_FILE} has the peft_type {brief(found)}, expected {kind}", RESTORE)


@contextmanager
def adapter_errors(model_id: str | os.PathLike[str]) -> Iterator[None]:
    """What peft raises for an adapter that it cannot load, as one of ours that names the adapter."""
    try:
        yield
    except MonteCLoRAError:
        raise
    except (OSError, LookupError, AttributeError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"the adapter {model_id} cannot be loaded ({type(error).__name__}: {reason})", RESTORE
        ) from error


def check_finite(model_id: str | os.PathLike[str], weights: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError for a weight that is not finite."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(f"{model_id}: {name} holds numbers that are not finite", RESTORE)


def check_head(weights: Path, model: nn.Module) -> None:
    """Check that the layers which an adapter saves whole have the model's shapes, and finite weights.

    Args:
        weights: the adapter's.
        model: the base model.

    Raises:
        CheckpointError: a head for another number of labels, a layer of another shape, or a weight that is not finite.
    """
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    try:
        with safetensors.safe_open(weights, framework="pt") as file:
            keys = {key.removeprefix(_PREFIX): key for key in file.keys()}  # noqa: SIM118
            saved = {name: tuple(file.get_slice(key).get_shape()) for name, key in keys.items()}
            whole = {name: file.get_tensor(key) for name, key in keys.items() if name in own}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{weights} is damaged ({type(error).__name__}: {error})", RESTORE) from error
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    for name, shape in saved.items():
        there = own.get(name, shape)
        if shape == there:
            continue
        if len(shape) == len(there) and shape[1:] == there[1:] and there[0] == labels:
            raise CheckpointError(
                f"{weights} has a head of {shape[0]} labels ({name}), and the model one of {there[0]}",
                f"Load the base model with num_labels={shape[0]}.",
            )
        raise CheckpointError(
            f"{weights} has {name} of shape {shape}, and the model of shape {there}",
            "Load it onto the base model it was trained on, with the same vocabulary.",
        )
    check_finite(weights, whole)
