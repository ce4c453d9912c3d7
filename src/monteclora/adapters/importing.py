"""Adapters of peft's own MonteCLoRA variant (``peft.MontecloraConfig``) as adapters of this package.

peft keeps the posterior of each layer in the adapter's weights, as a sampler module beside A and B, which the name
checks of servers refuse. Here A, B and what else was trained stay as they are, bit for bit, and the posterior goes
into ``posterior.safetensors``. Its law is the published one: a diagonal Wishart that is not normalised, the Laplace
approximation of the Dirichlet, and an absolute scale (docs/method.md sections 1 and 2).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from safetensors.torch import load_file, save
from torch import Tensor, nn

from monteclora.adapters import card, checks, storage
from monteclora.adapters.config import MonteCLoRAConfig
from monteclora.adapters.names import current_names
from monteclora.adapters.wrapping import build
from monteclora.errors import CheckpointError, ConfigError
from monteclora.posterior import AdapterPosterior, LayerShape
from monteclora.posterior.bounds import bounded
from monteclora.posterior.settings import PosteriorSettings
from monteclora.system.atomic import new_folder, write_file

__all__ = ["Imported", "import_adapter"]

_SAMPLER = ".lora_monteclora_sampler."
_PREFIX, _MEAN = "base_model.model.", ".lora_A.weight"
_LEARNED = ("std_prior", "expert_weights_prior")
_LAST_DRAW = ("gaussian_var_prior", "expert_weights")
_NAME = "default"
_TAKEN = frozenset((storage.CONFIG_FILE, storage.WEIGHTS_FILE, "README.md"))


@dataclass(frozen=True)
class Imported:
    """An adapter that was written.

    Attributes:
        folder: it.
        settings: of its posterior.
        left_out: what of peft's adapter has no counterpart, in words.
    """

    folder: Path
    settings: PosteriorSettings
    left_out: tuple[str, ...]


def import_adapter(model: nn.Module, folder: Path, out: Path) -> Imported:
    """Write an adapter of peft's MonteCLoRA variant as a plain LoRA with a posterior beside it.

    Args:
        model: the base model, for the order of its layers; its weights are not read and may be on the ``meta`` device.
            Changed in place.
        folder: as ``save_pretrained`` of peft wrote it.
        out: the folder to write; there must be none of that name, or an empty one.

    Raises:
        CheckpointError: a file is missing or damaged, the layers do not fit the model, or ``out`` is in use.
        ConfigError: it is no adapter of that variant, or a layer is of a type that cannot be drawn.
        UnsafeCodeError: its weights are a pickle.
    """
    checks.check_adapter(folder)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(f"{out} exists", "Choose another folder.")
    with checks.adapter_errors(folder):
        given: Any = PeftConfig.from_pretrained(str(folder))
        config = _configuration(given, folder)
        weights = load_file(folder / storage.WEIGHTS_FILE)
    checks.check_finite(folder, weights)
    posterior = _posterior(model, config, weights, folder)
    with new_folder(out) as stage:
        plain = {**json.loads((folder / storage.CONFIG_FILE).read_text(encoding="utf-8")), "monteclora_config": None}
        write_file(stage / storage.CONFIG_FILE, (json.dumps(plain, indent=2) + "\n").encode())
        kept = {name: value for name, value in weights.items() if _SAMPLER not in name}
        write_file(stage / storage.WEIGHTS_FILE, save(kept, metadata={"format": "pt"}))
        storage.save_posterior(posterior, config, stage)
        base = card.portable_name(given.base_model_name_or_path)
        card.write_card(stage, config, posterior.settings, base, {})
    return Imported(out, posterior.settings, tuple(_left_out(given.monteclora_config, posterior, folder)))


def _configuration(given: Any, folder: Path) -> MonteCLoRAConfig:
    """peft's options by our names; what peft's variant does and has no option for is that of the published code."""
    found = getattr(given, "monteclora_config", None)
    if not found:
        raise ConfigError(
            f"{folder / storage.CONFIG_FILE} has no monteclora_config: it is an adapter without a posterior",
            f"Give it one, with `monteclora calibrate {quote(str(folder))} --data FILE` "
            "or training.post_hoc.adapter in a recipe.",
        )
    settings = PosteriorSettings(
        num_components=found.num_samples,
        sample_scale=found.sample_scaler,
        kl_weight=found.kl_loss_weight,
        coop_weight=1.0 if found.use_entropy else 0.0,
        covariance="diagonal",
        dirichlet="laplace",
        regulariser="sampled",
        alpha_prior=found.dirichlet_prior,
        normalised=False,
    )
    shared = {f.name: getattr(given, f.name) for f in fields(LoraConfig) if f.init}
    try:
        return MonteCLoRAConfig(**{**shared, "monteclora_config": None}, **settings.given())
    except ConfigError as error:
        hint = "Only what peft combines with its variant can be imported."
        raise ConfigError(f"{folder / storage.CONFIG_FILE}: {error.message}", hint) from None


def _posterior(
    model: nn.Module, config: MonteCLoRAConfig, weights: Mapping[str, Tensor], folder: Path
) -> AdapterPosterior:
    """With the values of peft's samplers, its layers in the order that the model has them in."""
    wrapped = build(model, config, _NAME)
    stored = [name.removeprefix(_PREFIX).removesuffix(_MEAN) for name in weights if name.endswith(_MEAN)]
    path = folder / storage.WEIGHTS_FILE
    current = dict(zip(current_names(wrapped, config, stored, None, path), stored, strict=True))
    layers = wrapped.base_model.layer_shapes(_NAME)
    settings = config.resolved()
    posterior = AdapterPosterior(layers, [float(settings.sample_scale or 0.0)] * len(layers), settings)
    parts = [_learned(weights, layer, current.get(layer.name), settings, path) for layer in layers]
    with torch.no_grad():
        posterior.rho.copy_(torch.cat([rho for rho, _ in parts]))
        posterior.eta.copy_(torch.stack([eta for _, eta in parts]))
    posterior.measured = True
    return posterior


def _learned(
    weights: Mapping[str, Tensor], layer: LayerShape, stored: str | None, settings: PosteriorSettings, path: Path
) -> tuple[Tensor, Tensor]:
    """rho, shape (r,), and eta, shape (N,), of a layer: the logarithms that peft exponentiates too."""
    mean = weights.get(f"{_PREFIX}{stored}{_MEAN}")
    if mean is None or tuple(mean.shape) != (layer.rank, layer.in_features):
        found = "none" if mean is None else f"one of shape {tuple(mean.shape)}"
        raise CheckpointError(
            f"{path} has no A of shape ({layer.rank}, {layer.in_features}) for the layer {layer.name}, but {found}",
            "Give the base model it was trained on.",
        )
    parts = []
    for name, size in zip(_LEARNED, (layer.rank, settings.num_components), strict=True):
        part = weights.get(f"{_PREFIX}{stored}{_SAMPLER}{name}")
        if part is None or tuple(part.shape) != (size,):
            found = "none" if part is None else f"one of shape {tuple(part.shape)}"
            raise CheckpointError(
                f"{path} has no {name} of {size} numbers for the layer {layer.name}, but {found}: peft leaves its "
                "variant out of quantised layers, and loses it with low_cpu_mem_usage",
                "Load it with peft, as the plain LoRA it is, or train it again.",
            )
        parts.append(part.float())
    return parts[0], parts[1]


def _left_out(found: Any, posterior: AdapterPosterior, folder: Path) -> Iterator[str]:
    yield f"buffer_size {found.buffer_size}: draws are made one by one here"
    yield f"{' and '.join(_LAST_DRAW)} of each layer: the last draw of training, which nothing reads"
    yield "the floor of 1e-3 under each variance and of 1e-6 under each concentration: here there is none"
    yield "the state of torch's global generator: the noise stream here is noise_seed 0, from its first draw"
    if posterior.settings.kl_weight:
        yield "the sign of one log-gamma term of the Dirichlet's divergence: trained on, the exact formula counts"
    limited = zip(bounded(posterior.rho, posterior.eta), (posterior.rho, posterior.eta), strict=True)
    if any(not torch.equal(inside, value) for inside, value in limited):
        yield "logarithms beyond 20 in std_prior or expert_weights_prior: they count as 20"
    others = sorted(path.name for path in folder.iterdir() if path.name not in _TAKEN)
    if others:
        yield f"other files of the folder: {', '.join(others)}"
