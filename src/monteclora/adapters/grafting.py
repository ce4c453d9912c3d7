"""A posterior for a plain LoRA adapter, without training: noise around its A, to be scaled by calibration.

docs/method.md section 9. The adapter may be of any tool that writes peft's files. Its weights are its own, or with
``isotropic`` rows the same update B A with other factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, PeftConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save
from torch import Tensor, nn

from monteclora.adapters import checks, storage
from monteclora.adapters.config import MonteCLoRAConfig
from monteclora.adapters.model import MonteCLoRAModel
from monteclora.adapters.rescaling import PLAIN_WEIGHTS, restore_plain
from monteclora.adapters.snapshot import unchanged_on_error
from monteclora.adapters.wrapping import build
from monteclora.errors import CheckpointError, ConfigError
from monteclora.posterior import AdapterPosterior
from monteclora.posterior.settings import PosteriorSettings
from monteclora.system.atomic import write_file

__all__ = ["Graft", "Rows", "from_plain", "graft"]

Rows = Literal["equal", "isotropic"]
_NAME = "default"
_SETTINGS = PosteriorSettings(sample_scale="relative:1.0")


def from_plain(
    model: nn.Module, folder: Path, settings: PosteriorSettings, *, noise_seed: int = 0, is_trainable: bool = False
) -> MonteCLoRAModel:
    """Load a plain LoRA adapter with a new posterior around its A: rho and eta at the prior.

    Args:
        model: the base model; changed in place.
        folder: as ``save_pretrained`` of peft writes it.
        settings: of the posterior; a relative scale is one to the A that is loaded.
        noise_seed: the noise stream.
        is_trainable: whether adapter and posterior are to be trained.

    Raises:
        CheckpointError: a file of the adapter is missing or damaged, or does not fit the model.
        ConfigError: it is a variant of LoRA whose A cannot be drawn, named.
        UnsafeCodeError: its weights are a pickle.
    """
    checks.check_adapter(folder)
    with checks.adapter_errors(folder):
        plain = PeftConfig.from_pretrained(str(folder))
    shared = {f.name: getattr(plain, f.name) for f in fields(LoraConfig) if f.init}
    try:
        config = MonteCLoRAConfig(**shared, **settings.given(), noise_seed=noise_seed)
    except ConfigError as error:
        raise ConfigError(f"{folder / storage.CONFIG_FILE}: {error.message}", "Give a plain LoRA adapter.") from None
    config.inference_mode = not is_trainable
    checks.check_head(folder / storage.WEIGHTS_FILE, model)
    with unchanged_on_error(model, _NAME), checks.adapter_errors(folder):
        wrapped = build(model, config, _NAME)
        missing = wrapped.load_mean(folder, _NAME, is_trainable).missing_keys
        if missing:
            raise CheckpointError(f"{folder / storage.WEIGHTS_FILE} has no {missing[0]}", storage.RESTORE)
        checks.check_finite(folder, get_peft_model_state_dict(wrapped, adapter_name=_NAME, save_embedding_layers=False))
    return wrapped


@dataclass(frozen=True)
class Graft:
    """A posterior that is not on disk yet.

    Attributes:
        model: with the adapter and its posterior.
        folder: of the adapter.
        rows: how the rows of the noise are scaled.
        weights: what is to replace the adapter's weights, by name; None where they stay.
    """

    model: MonteCLoRAModel
    folder: Path
    rows: Rows
    weights: Mapping[str, Tensor] | None

    def save(self, labels: Mapping[int, str] | None = None) -> None:
        """Write the posterior beside the weights; those that are replaced are kept, for the way back.

        Killed in between, the folder holds a plain LoRA of the same update, and :func:`graft` or `calibrate --undo`
        puts back the weights that were kept.
        """
        path = self.folder / storage.WEIGHTS_FILE
        if self.weights is None:
            (self.folder / PLAIN_WEIGHTS).unlink(missing_ok=True)  # of an earlier posterior, and not of these weights
        else:
            write_file(self.folder / PLAIN_WEIGHTS, path.read_bytes())
            write_file(path, save(dict(self.weights), metadata={"format": "pt"}))
        config = cast(MonteCLoRAConfig, self.model.peft_config[_NAME])
        storage.save_posterior(_posterior(self.model), config, self.folder, labels=labels)


def graft(model: nn.Module, folder: Path, rows: Rows, seed: int = 0) -> Graft:
    """Give a plain LoRA adapter a posterior, in memory; one that a kill left with rotated weights gets its own back.

    Its scale is that of A: the noise of each layer has the root mean square of its A, times ``||pi||``.

    Args:
        model: the base model; changed in place.
        folder: of the adapter.
        rows: ``equal`` scales for the rows of A, or such that the noise in the layer's output is ``isotropic`` within
            the column space of B.
        seed: the noise stream, should it be trained further.

    Raises:
        CheckpointError, ConfigError, UnsafeCodeError: as :func:`from_plain`.
    """
    restore_plain(folder)
    wrapped = from_plain(model, folder, _SETTINGS, noise_seed=seed)
    posterior = _posterior(wrapped)
    posterior.measured = True
    scale = posterior.scale.tolist()
    posterior.calibration = {"factor": 1.0, "trained_scale": scale, storage.GRAFTED: rows}
    weights = None if rows == "equal" else _rotate(wrapped, posterior, load_file(folder / storage.WEIGHTS_FILE), folder)
    return Graft(wrapped, folder, rows, weights)


def _posterior(model: MonteCLoRAModel) -> AdapterPosterior:
    posterior = model.base_model.posterior(_NAME)
    assert posterior is not None
    return posterior


@torch.no_grad()
def _rotate(
    model: MonteCLoRAModel, posterior: AdapterPosterior, weights: dict[str, Tensor], folder: Path
) -> dict[str, Tensor]:
    """Set rho, and A and B of the model, so that the noise is isotropic; the adapter's weights with these A and B."""
    rho = []
    for name, layer in model.base_model.adapted_layers(posterior).items():
        keys = [f"base_model.model.{name}.{part}.weight" for part in ("lora_A", "lora_B")]
        if not {*keys} <= weights.keys():
            raise CheckpointError(
                f"{folder / storage.WEIGHTS_FILE} has no {keys[0]}: its layers have other names than the model's",
                "Choose equal rows.",
            )
        parts: Any = layer
        a, b, of_rows = isotropic(*(weights[key] for key in keys))
        for key, part, value in zip(keys, (parts.lora_A, parts.lora_B), (a, b), strict=True):
            weights[key] = value.contiguous()
            part[_NAME].weight.copy_(value)
        rho.append(of_rows)
    posterior.rho.copy_(torch.cat(rho))
    return weights


def isotropic(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of the same update whose noise is isotropic in the output (docs/method.md section 9).

    With ``B = U diag(sigma) Q^T`` they are ``Q^T A`` and ``B Q = U diag(sigma)``; row i of the noise gets the standard
    deviation ``k / sigma_i``, so that its covariance in the output is a multiple of ``U U^T``. k, the root mean square
    of sigma, leaves the noise in the output as large as rows of the standard deviation 1 make it. Rows that B maps to
    zero make none, and get the smallest one.

    Args:
        a: A, shape (r, n).
        b: B, shape (m, r).

    Returns:
        A (r, n) and B (m, r), in float32 or wider, and rho, shape (r,), float32.
    """
    wide = b.double()
    _, sigma, rotation = torch.linalg.svd(wide, full_matrices=b.shape[0] < b.shape[1])
    sigma = torch.cat([sigma, sigma.new_zeros(b.shape[1] - len(sigma))])
    seen = sigma > sigma.max() * max(b.shape) * torch.finfo(torch.float32).eps
    rho = torch.zeros_like(sigma)
    if seen.any():
        size = sigma[seen].square().mean().sqrt()
        rho = torch.where(seen, size / sigma, size / sigma.max()).log()
    dtypes = [torch.promote_types(part.dtype, torch.float32) for part in (a, b)]
    return (rotation @ a.double()).to(dtypes[0]), (wide @ rotation.T).to(dtypes[1]), rho.float()
