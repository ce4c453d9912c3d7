"""The posterior scale of a saved adapter: eps of every layer times one number c (docs/method.md section 9).

It is changed in ``posterior.safetensors`` itself, so that whatever loads the posterior draws at the new scale. The
scales that training ended with stay in the file, for the way back. A posterior that training did not make
(:mod:`monteclora.adapters.grafting`) is removed on the way back.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from monteclora.adapters import storage
from monteclora.errors import ConfigError

__all__ = ["PLAIN_WEIGHTS", "posterior_scale", "rescale_posterior", "restore_posterior"]

PLAIN_WEIGHTS = "adapter_model.safetensors.plain"
"""An adapter's weights before a posterior was given to it that needs other ones; no loader takes it for weights."""


def posterior_scale(folder: Path) -> Mapping[str, Any]:
    """What is known of the scale of the adapter in ``folder``: ``factor``, 1 where it was never changed, and how.

    Raises:
        CheckpointError: the posterior is missing or damaged.
    """
    document, _ = storage.read_document(_file(folder))
    calibration: Mapping[str, Any] = document.get("calibration") or {"factor": 1.0}
    return calibration


def rescale_posterior(folder: Path, factor: float, facts: Mapping[str, Any]) -> None:
    """Let the posterior be drawn at ``factor`` times the scales it was trained with, whatever they are now.

    Args:
        folder: of the adapter; the file is replaced as a whole.
        factor: c, at least 0; 0 makes every draw the mean.
        facts: how it was chosen, for JSON.

    Raises:
        CheckpointError: the posterior is missing or damaged.
        ConfigError: ``factor`` is negative or not finite.
    """
    if not 0.0 <= factor < float("inf"):
        raise ConfigError(f"the posterior scale is {factor}, expected a finite number of at least 0", "Choose another.")
    document, tensors = storage.read_document(_file(folder))
    trained = torch.tensor(_trained(document, tensors), dtype=torch.float32)
    known = {key: value for key, value in (document.get("calibration") or {}).items() if key == storage.GRAFTED}
    calibration = {**known, **facts, "factor": factor, "trained_scale": trained.tolist()}
    storage.write_document(folder, {**document, "calibration": calibration}, {**tensors, "scale": trained * factor})


def restore_posterior(folder: Path) -> bool:
    """Restore the scales of training, or remove a posterior that training did not make.

    Returns:
        Whether there was anything to undo.

    Raises:
        CheckpointError: the posterior is missing or damaged.
    """
    document, tensors = storage.read_document(_file(folder))
    if "calibration" not in document:
        return False
    if storage.GRAFTED in document["calibration"]:
        _remove(folder)
        return True
    trained = torch.tensor(_trained(document, tensors), dtype=torch.float32)
    kept = {key: value for key, value in document.items() if key != "calibration"}
    storage.write_document(folder, kept, {**tensors, "scale": trained})
    return True


def _remove(folder: Path) -> None:
    """First the posterior, which belongs to the weights beside it."""
    _file(folder).unlink()
    if (folder / PLAIN_WEIGHTS).exists():
        (folder / PLAIN_WEIGHTS).replace(folder / storage.WEIGHTS_FILE)


def _trained(document: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> list[float]:
    calibration = document.get("calibration")
    found: list[float] = calibration["trained_scale"] if calibration else tensors["scale"].tolist()
    return found


def _file(folder: Path) -> Path:
    path = folder / storage.POSTERIOR_FILE
    if not path.is_file():
        raise storage.missing_posterior(folder)
    return path
