"""Adapters on disk: plain LoRA files, and the posterior beside them in ``posterior.safetensors``.

The sidecar holds ``rho``, ``eta`` and ``scale`` as tensors; its metadata hold one JSON document with the format's
version, the layers, the method's configuration and the noise stream's position, and a checksum of that document and
the tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import safetensors
import torch
from peft import LoraConfig, PeftConfig
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from monteclora.adapters.config import MonteCLoRAConfig
from monteclora.config import brief
from monteclora.errors import CheckpointError, MonteCLoRAError, UnsafeCodeError
from monteclora.posterior import AdapterPosterior, LayerShape
from monteclora.system.atomic import write_file

__all__ = [
    "CONFIG_FILE",
    "POSTERIOR_FILE",
    "WEIGHTS_FILE",
    "StoredPosterior",
    "adapter_errors",
    "check_adapter",
    "check_finite",
    "find_posterior",
    "load_posterior",
    "missing_posterior",
    "save_posterior",
]

POSTERIOR_FILE = "posterior.safetensors"
WEIGHTS_FILE, CONFIG_FILE, _PICKLED = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"
_FORMAT = 2
_KEY = "monteclora"
_TENSORS = ("rho", "eta", "scale")
_RESTORE = "Take the folder from a backup or an earlier checkpoint."
_HUB_ARGUMENTS = ("subfolder", "revision", "cache_dir", "token")


def _checksum(document: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(document.encode())
    for name in _TENSORS:
        digest.update(tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_posterior(posterior: AdapterPosterior, config: MonteCLoRAConfig, path: Path) -> None:
    """Write the sidecar of one adapter, atomically."""
    tensors = {name: getattr(posterior, name).detach().cpu().contiguous() for name in _TENSORS}
    fields = {
        "format": _FORMAT,
        "layers": posterior.layers,
        "config": config.method_fields(),
        "seed": posterior.seed,
        "draws": posterior.draws,
        "enabled": posterior.enabled,
    }
    document = json.dumps(fields, sort_keys=True)
    # in one entry: safetensors writes several in any order, and equal posteriors should be equal files
    envelope = json.dumps({"document": document, "sha256": _checksum(document, tensors)})
    write_file(path, save(tensors, metadata={_KEY: envelope}))


def find_posterior(model_id: str | os.PathLike[str], **kwargs: Any) -> Path | None:
    """The sidecar of a saved adapter, in a folder or on the hub; None where there is none."""
    folder = Path(model_id) / (kwargs.get("subfolder") or "")
    if Path(model_id).exists():
        path = folder / POSTERIOR_FILE
        return path if path.is_file() else None
    from huggingface_hub import file_exists, hf_hub_download
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    arguments = {key: kwargs[key] for key in _HUB_ARGUMENTS if kwargs.get(key) is not None}
    remote = "/".join(filter(None, [arguments.pop("subfolder", None), POSTERIOR_FILE]))
    shared = {key: value for key, value in arguments.items() if key in ("revision", "token")}
    try:
        if not file_exists(str(model_id), remote, **shared):
            return None
        return Path(hf_hub_download(str(model_id), remote, **arguments))
    except (OSError, ValueError, HFValidationError, OfflineModeIsEnabled) as error:
        raise CheckpointError(
            f"adapter '{model_id}' is neither a folder nor within reach on the hub ({type(error).__name__})",
            "Give the folder that save_pretrained wrote.",
        ) from error


def check_adapter(model_id: str | os.PathLike[str], subfolder: str | None = None) -> None:
    """Check the files of an adapter in a folder before peft sees them: it would read a pickle, and name no file.

    Raises:
        CheckpointError: one is missing or damaged, or the adapter is no LoRA.
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
            raise CheckpointError(f"{folder} has no {name}", _RESTORE)
    try:
        kind = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))["peft_type"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE} is damaged ({type(error).__name__})", _RESTORE) from None
    if kind != "LORA":
        raise CheckpointError(f"{folder / CONFIG_FILE} has the peft_type {brief(kind)}, expected LORA", _RESTORE)


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
            f"the adapter {model_id} cannot be loaded ({type(error).__name__}: {reason})", _RESTORE
        ) from error


def check_finite(model_id: str | os.PathLike[str], weights: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError for a weight that is not finite."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(f"{model_id}: {name} holds numbers that are not finite", _RESTORE)


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
    seed: int
    draws: int
    enabled: bool

    def config(self, lora: PeftConfig) -> MonteCLoRAConfig:
        """The adapter's configuration: peft's LoRA fields and the sidecar's own."""
        plain = {f.name: getattr(lora, f.name) for f in fields(LoraConfig) if f.init}
        try:
            return MonteCLoRAConfig(**plain, **self.fields)
        except TypeError as error:
            raise CheckpointError(
                f"{self.path} was written by another version of monteclora: {error}", "Load it with that version."
            ) from error

    def build(self, config: MonteCLoRAConfig, layers: list[LayerShape], device: torch.device) -> AdapterPosterior:
        """The posterior itself, for an adapter with these layers.

        Raises:
            CheckpointError: the layers differ.
        """
        self.check_layers(layers)
        posterior = AdapterPosterior(
            layers, self.tensors["scale"].tolist(), config.posterior_settings(), seed=self.seed, device=device
        )
        self.copy_into(posterior)
        return posterior

    def check_layers(self, layers: list[LayerShape]) -> None:
        """Check that the posterior belongs to an adapter with these layers.

        Raises:
            CheckpointError: it belongs to another one.
        """
        if layers != self.layers:
            changed = sorted(set(layers) ^ set(self.layers)) or self.layers
            raise CheckpointError(
                f"{self.path} does not fit this model: layer '{changed[0].name}' (rank {changed[0].rank}, "
                f"{changed[0].in_features} inputs) differs",
                "Load it onto the base model it was trained on, with the same target_modules.",
            )

    def check_fits(self, posterior: AdapterPosterior) -> None:
        """Check that ``posterior`` has the layers and the number of components of this one.

        Raises:
            CheckpointError: it has others.
        """
        self.check_layers(posterior.layers)
        for name in _TENSORS:
            expected, found = getattr(posterior, name).shape, self.tensors[name].shape
            if expected != found:
                raise CheckpointError(
                    f"{self.path}: {name} has shape {tuple(found)}, expected {tuple(expected)}",
                    "Load it with the num_components it was trained with.",
                )

    @torch.no_grad()
    def copy_into(self, posterior: AdapterPosterior) -> None:
        """Restore parameters, scales and the stream's position into a posterior that it fits.

        Raises:
            CheckpointError: it does not fit.
        """
        self.check_fits(posterior)
        for name in _TENSORS:
            getattr(posterior, name).copy_(self.tensors[name])
        posterior.seed, posterior.draws, posterior.enabled = self.seed, self.draws, self.enabled


def load_posterior(path: Path) -> StoredPosterior:
    """Read a sidecar.

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
            f"{path} is not a readable posterior file ({type(error).__name__}: {error})", _RESTORE
        ) from error
    if _checksum(document, tensors) != expected:
        raise CheckpointError(f"{path} is damaged: its content does not match its checksum", _RESTORE)
    # a checksum finds damage, and says nothing of who wrote the document
    try:
        fields = json.loads(document)
        if fields["format"] not in (1, _FORMAT):
            raise CheckpointError(
                f"{path} has format {fields['format']}, this version reads formats 1 to {_FORMAT}",
                "Upgrade monteclora.",
            )
        stored = StoredPosterior(
            path=path,
            tensors=tensors,
            layers=[LayerShape(str(name), int(rank), int(inputs)) for name, rank, inputs in fields["layers"]],
            fields=_current_names(fields["config"]),
            seed=int(fields["seed"]),
            draws=int(fields["draws"]),
            enabled=bool(fields["enabled"]),
        )
        _check_shapes(stored)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a posterior file ({type(error).__name__}: {error})", _RESTORE) from error
    return stored


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
                _RESTORE,
            )
        if not tensor.isfinite().all():
            raise CheckpointError(f"{stored.path}: {name} holds numbers that are not finite", _RESTORE)
