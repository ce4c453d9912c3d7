"""Adapters on disk: plain LoRA files, and the posterior beside them in ``posterior.safetensors``.

The sidecar holds ``rho``, ``eta`` and ``scale`` as tensors; its metadata hold one JSON document with the format's
version, the layers, the method's configuration, the noise stream's position and a checksum of the mean (every
``lora_A`` of the weights beside it), and a checksum of that document and the tensors.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from peft import LoraConfig, PeftConfig
from safetensors.torch import save
from torch import Tensor

from monteclora.adapters.config import MonteCLoRAConfig
from monteclora.adapters.names import plain_name
from monteclora.errors import CheckpointError, ConfigError
from monteclora.posterior import AdapterPosterior, LayerShape, PosteriorSettings
from monteclora.posterior.bounds import BOUND, WIDE, at_bound, rows_wider
from monteclora.system.atomic import write_file

__all__ = [
    "CONFIG_FILE",
    "GRAFTED",
    "POSTERIOR_FILE",
    "RESTORE",
    "WEIGHTS_FILE",
    "StoredPosterior",
    "find_file",
    "find_posterior",
    "load_posterior",
    "missing_posterior",
    "read_document",
    "save_posterior",
    "write_document",
]

POSTERIOR_FILE = "posterior.safetensors"
WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
GRAFTED = "grafted"
"""Of a calibration: how the rows of a posterior are scaled that training did not make."""

_FORMAT = 2
_KEY = "monteclora"
_TENSORS = ("rho", "eta", "scale")
RESTORE = "Take the folder from a backup or an earlier checkpoint."

logger = logging.getLogger(__name__)

_HUB_ARGUMENTS = ("subfolder", "revision", "cache_dir", "token")


def _checksum(document: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(document.encode())
    for name in _TENSORS:
        digest.update(tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _mean_checksum(weights: Path) -> str:
    """Of every ``lora_A`` in an adapter's weights, as they are stored."""
    digest = hashlib.sha256()
    with safetensors.safe_open(weights, framework="pt") as file:
        for name in sorted(key for key in file.keys() if ".lora_A." in key):  # noqa: SIM118 - not a mapping
            digest.update(name.encode())
            digest.update(file.get_tensor(name).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_posterior(
    posterior: AdapterPosterior,
    config: MonteCLoRAConfig,
    folder: Path,
    *,
    state: Mapping[str, Tensor] | None = None,
    labels: Mapping[int, str] | None = None,
) -> None:
    """Write the sidecar of an adapter into the folder that has its weights, atomically.

    Args:
        posterior: of the adapter.
        config: its configuration.
        folder: has ``adapter_model.safetensors``, to whose mean the posterior belongs.
        state: values that take the place of the posterior's own ``rho``, ``eta`` and ``scale``.
        labels: label names of a classifier, by class.
    """
    values = {name: (state or {}).get(name, getattr(posterior, name)) for name in _TENSORS}
    tensors = {name: value.detach().to("cpu", torch.float32).contiguous() for name, value in values.items()}
    if GRAFTED not in (posterior.calibration or {}):  # rows of unequal width are meant there, and no rate made them
        _warn_of_divergence(tensors)
    fields = {
        "format": _FORMAT,
        "layers": [(plain_name(layer.name), *layer[1:]) for layer in posterior.layers],
        "config": config.method_fields(),
        "resolved": config.resolved().given(),
        "seed": posterior.seed,
        "draws": posterior.draws,
        "enabled": posterior.enabled,
        "mean_sha256": _mean_checksum(folder / WEIGHTS_FILE),
        "labels": {str(index): str(name) for index, name in (labels or {}).items()},
    }
    if posterior.calibration is not None:
        fields["calibration"] = dict(posterior.calibration)
    write_document(folder, fields, tensors)


def _warn_of_divergence(tensors: Mapping[str, Tensor]) -> None:
    for name in ("rho", "eta"):
        if at_bound(tensors[name]):
            what = "%s of the posterior has reached its bound of %g and is held at it: lower the learning rate"
            logger.warning(what, name, BOUND)
    rho = tensors["rho"]
    if rows_wider(rho, WIDE) and not at_bound(rho):
        what = "the posterior is over %g times as wide as its prior in %d of %d rows: lower the learning rate"
        logger.warning(what, WIDE, rows_wider(rho, WIDE), len(rho))


def write_document(folder: Path, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a sidecar with its checksum, atomically."""
    document = json.dumps(fields, sort_keys=True)
    # in one entry: safetensors writes several in any order, and equal posteriors should be equal files
    envelope = json.dumps({"document": document, "sha256": _checksum(document, tensors)})
    write_file(folder / POSTERIOR_FILE, save(dict(tensors), metadata={_KEY: envelope}))


def find_file(model_id: str | os.PathLike[str], name: str, **kwargs: Any) -> Path | None:
    """A file of a saved adapter, in a folder or on the hub; None where there is none.

    Offline, what the hub's cache has is found.

    Args:
        model_id: a folder, or a repository on the hub.
        name: the file's.
        **kwargs: what loading takes; ``subfolder``, ``revision``, ``cache_dir`` and ``token`` count.

    Raises:
        CheckpointError: neither a folder nor within reach on the hub.
    """
    if Path(model_id).exists():
        path = Path(model_id) / (kwargs.get("subfolder") or "") / name
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    arguments = {key: kwargs[key] for key in _HUB_ARGUMENTS if kwargs.get(key) is not None}
    try:
        return Path(hf_hub_download(str(model_id), name, **arguments))
    except LocalEntryNotFoundError as error:  # offline: the file may exist on the hub
        raise _out_of_reach(model_id, error) from error
    except EntryNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _out_of_reach(model_id, error) from error


def _out_of_reach(model_id: str | os.PathLike[str], error: Exception) -> CheckpointError:
    return CheckpointError(
        f"adapter '{model_id}' is neither a folder nor within reach on the hub ({type(error).__name__})",
        "Give the folder that save_pretrained wrote.",
    )


def find_posterior(model_id: str | os.PathLike[str], **kwargs: Any) -> Path | None:
    """The sidecar of a saved adapter, see :func:`find_file`."""
    return find_file(model_id, POSTERIOR_FILE, **kwargs)


def missing_posterior(model_id: str | os.PathLike[str]) -> CheckpointError:
    """The error for an adapter without a sidecar."""
    return CheckpointError(
        f"{model_id} has no {POSTERIOR_FILE}: it is a plain LoRA adapter",
        "Load it with peft.PeftModel.from_pretrained, or train it with MonteCLoRA first.",
    )


@dataclass(frozen=True)
class StoredPosterior:
    """What a sidecar holds, checked."""

    path: Path
    tensors: Mapping[str, Tensor]
    layers: list[LayerShape]
    fields: Mapping[str, Any]
    resolved: Mapping[str, Any] | None
    seed: int
    draws: int
    enabled: bool
    mean_sha256: str | None
    labels: Mapping[int, str]
    calibration: Mapping[str, Any] | None = None

    def config(self, lora: PeftConfig) -> MonteCLoRAConfig:
        """The adapter's configuration: peft's LoRA fields and the sidecar's own."""
        plain = {f.name: getattr(lora, f.name) for f in fields(LoraConfig) if f.init}
        try:
            config = MonteCLoRAConfig(**plain, **self.fields)
            if self.resolved is not None:
                # the defaults of the version that trained it, where they have changed since
                config = replace(config, **config.settled(PosteriorSettings(**self.resolved)).given())
            return config
        except TypeError as error:
            raise CheckpointError(
                f"{self.path} was written by another version of monteclora: {error}", "Load it with that version."
            ) from error
        except ConfigError as error:
            raise CheckpointError(
                f"the adapter in {self.path.parent} cannot be loaded: {error.message}", RESTORE
            ) from error

    def check_mean(self, weights: Path | None) -> None:
        """Check that the posterior belongs to the mean in these weights; files of the first format do not say.

        Raises:
            CheckpointError: it was saved with another mean.
        """
        if weights is None or self.mean_sha256 is None:
            return
        try:
            found = _mean_checksum(weights)
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{weights} cannot be read ({type(error).__name__}: {error})", RESTORE) from error
        if found != self.mean_sha256:
            raise CheckpointError(
                f"{self.path} is the posterior of another mean than the one in {weights}",
                f"Save both with model.save_pretrained, or delete {self.path.name} to keep a plain LoRA.",
            )

    def check_layers(self, layers: list[LayerShape], names: Sequence[str] | None = None) -> None:
        """Check that the posterior belongs to an adapter with these layers.

        Args:
            layers: of the model.
            names: what the model calls the stored layers, where it is not what they are stored as.

        Raises:
            CheckpointError: it belongs to another one.
        """
        found = [LayerShape(plain_name(name), *shape) for name, *shape in layers]
        stored = self.layers
        if names is not None:
            stored = [LayerShape(name, *layer[1:]) for name, layer in zip(names, stored, strict=True)]
        if found != stored:
            changed = sorted(set(found) ^ set(stored)) or stored
            raise CheckpointError(
                f"{self.path} does not fit this model: layer '{changed[0].name}' (rank {changed[0].rank}, "
                f"{changed[0].in_features} inputs) differs",
                "Load it onto the base model it was trained on, with the same target_modules.",
            )

    def check_fits(self, posterior: AdapterPosterior, names: Sequence[str] | None = None) -> None:
        """Check that ``posterior`` has the layers and the number of components of this one; see :meth:`check_layers`.

        Raises:
            CheckpointError: it has others.
        """
        self.check_layers(posterior.layers, names)
        for name in _TENSORS:
            expected, found = getattr(posterior, name).shape, self.tensors[name].shape
            if expected != found:
                raise CheckpointError(
                    f"{self.path}: {name} has shape {tuple(found)}, expected {tuple(expected)}",
                    "Load it with the num_components it was trained with.",
                )

    @torch.no_grad()
    def copy_into(self, posterior: AdapterPosterior) -> None:
        """Restore parameters, scales and the stream's position into a posterior that :meth:`check_fits` accepted."""
        for name in _TENSORS:
            getattr(posterior, name).copy_(self.tensors[name])
        posterior.seed, posterior.draws, posterior.enabled = self.seed, self.draws, self.enabled
        posterior.calibration = self.calibration
        posterior.measured = True


def load_posterior(path: Path) -> StoredPosterior:
    """Read a sidecar.

    Raises:
        CheckpointError: not a sidecar, damaged, or of another format.
    """
    fields, tensors = read_document(path)
    try:
        stored = StoredPosterior(
            path=path,
            tensors=tensors,
            layers=[LayerShape(str(name), int(rank), int(inputs)) for name, rank, inputs in fields["layers"]],
            fields=_current_names(fields["config"]),
            resolved=fields.get("resolved"),
            seed=int(fields["seed"]),
            draws=int(fields["draws"]),
            enabled=bool(fields["enabled"]),
            mean_sha256=fields.get("mean_sha256"),
            labels={int(index): str(name) for index, name in fields.get("labels", {}).items()},
            calibration=fields.get("calibration"),
        )
        _check_shapes(stored)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a posterior file ({type(error).__name__}: {error})", RESTORE) from error
    return stored


def read_document(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields and the tensors of a sidecar, whose checksum and format are right.

    Raises:
        CheckpointError: not a sidecar, damaged, or of another format.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in _TENSORS}
        document, expected = _sealed(metadata)
    except (safetensors.SafetensorError, KeyError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a readable posterior file ({type(error).__name__}: {error})", RESTORE
        ) from error
    if _checksum(document, tensors) != expected:
        raise CheckpointError(f"{path} is damaged: its content does not match its checksum", RESTORE)
    # a checksum finds damage, and says nothing of who wrote the document
    try:
        fields: dict[str, Any] = json.loads(document)
        known = fields["format"] in (1, _FORMAT)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a posterior file ({type(error).__name__}: {error})", RESTORE) from error
    if not known:
        raise CheckpointError(
            f"{path} has format {fields['format']}, this version reads formats 1 to {_FORMAT}", "Upgrade monteclora."
        )
    if not _is_calibration(fields.get("calibration"), len(tensors["scale"])):
        raise CheckpointError(f"{path}: its calibration does not fit its layers", RESTORE)
    return fields, tensors


def _is_calibration(found: Any, layers: int) -> bool:
    """Whether it is what is known of a scale that was changed, or None."""
    if found is None:
        return True
    numbers = [found.get("factor"), *_listed(found.get("trained_scale"))] if isinstance(found, dict) else []
    finite = all(type(number) in (int, float) and 0.0 <= number < float("inf") for number in numbers)
    return len(numbers) == 1 + layers and finite


def _listed(found: Any) -> list[Any]:
    return found if isinstance(found, list) else []


def _sealed(metadata: Mapping[str, str]) -> tuple[str, str]:
    """The document and the checksum; in the first files they were two entries."""
    if "sha256" in metadata:
        return metadata[_KEY], metadata["sha256"]
    envelope = json.loads(metadata[_KEY])
    return envelope["document"], envelope["sha256"]


def _current_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """The stored fields of the configuration: format 1 calls the number of components ``num_samples``."""
    fields = dict(config)
    if {"num_samples", "num_components"} <= fields.keys():
        raise ValueError("it has two numbers of components")
    if "num_samples" in fields:
        fields["num_components"] = fields.pop("num_samples")
    return fields


def _check_shapes(stored: StoredPosterior) -> None:
    count, num = len(stored.layers), int(stored.fields["num_components"])
    expected = {"rho": (sum(layer.rank for layer in stored.layers),), "eta": (count, num), "scale": (count,)}
    for name, shape in expected.items():
        tensor = stored.tensors[name]
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise CheckpointError(
                f"{stored.path}: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}, expected floats of {shape}",
                RESTORE,
            )
        if not tensor.isfinite().all():
            raise CheckpointError(f"{stored.path}: {name} holds numbers that are not finite", RESTORE)
