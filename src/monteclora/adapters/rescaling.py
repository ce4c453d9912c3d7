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
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from monteclora.adapters import storage
from monteclora.errors import ConfigError

__all__ = ["PLAIN_WEIGHTS", "posterior_scale", "rescale_posterior", "restore_plain", "restore_posterior"]

PLAIN_WEIGHTS = "adapter_model.safetensors.plain"
"""An adapter's weights before a posterior was given to it that needs other ones; no loader takes it for weights."""

_ROUNDING = 1e-5  # relative, of an update whose factors were computed in float64 and stored in float32


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


def restore_plain(folder: Path) -> bool:
    """Put back the weights of an adapter whose posterior was not written, or not wholly removed, before a kill.

    Those that were kept belong to the ones in their place where every layer has the same update B A. Others, of an
    adapter that was trained again in between, are left where they are.

    Returns:
        Whether they were put back.
    """
    weights, kept = folder / storage.WEIGHTS_FILE, folder / PLAIN_WEIGHTS
    if (folder / storage.POSTERIOR_FILE).is_file() or not kept.is_file():
        return False
    try:
        belong = _same_update(load_file(weights), load_file(kept))
    except (OSError, SafetensorError):
        return False  # the damaged one of the two is told by whatever reads it
    if belong:
        kept.replace(weights)
    return belong


def _same_update(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether B A is the same in every layer, to rounding, and all else to the bit."""
    if one.keys() != other.keys():
        return False
    unequal = {name for name in one if not torch.equal(one[name], other[name])}
    for name in sorted(unequal):
        first = name.replace(".lora_B.", ".lora_A.")
        second = first.replace(".lora_A.", ".lora_B.")
        if (
            first == second
            or second not in one
            or any(weights[n].dim() != 2 for weights in (one, other) for n in (first, second))
        ):
            return False
        pairs = [(weights[first].double(), weights[second].double()) for weights in (one, other)]
        (a, b), (of_a, of_b) = pairs
        if a.shape[1] != of_a.shape[1] or b.shape[0] != of_b.shape[0]:
            return False
        # |BA - B'A'|^2 as the trace of a product of Gram matrices, so that no matrix of the layer's size is made
        rows, columns = torch.cat([a, of_a]), torch.cat([b, -of_b], 1)
        apart = ((columns.T @ columns) * (rows @ rows.T)).sum().clamp(min=0).sqrt()
        if not apart <= _ROUNDING * of_b.norm() * of_a.norm():
            return False
    return True


def _trained(document: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> list[float]:
    calibration = document.get("calibration")
    found: list[float] = calibration["trained_scale"] if calibration else tensors["scale"].tolist()
    return found


def _file(folder: Path) -> Path:
    path = folder / storage.POSTERIOR_FILE
    if not path.is_file():
        raise storage.missing_posterior(folder)
    return path
