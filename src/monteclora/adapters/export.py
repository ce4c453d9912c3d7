"""Leave MonteCLoRA: a merged model, or plain LoRA adapters drawn from the posterior for multi-LoRA servers."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from monteclora.adapters.active import drawn_blocks
from monteclora.adapters.card import portable_name
from monteclora.adapters.config import MonteCLoRAConfig
from monteclora.adapters.merging import merged_copy
from monteclora.adapters.model import MonteCLoRAModel
from monteclora.adapters.names import plain_name, plain_patterns
from monteclora.adapters.storage import POSTERIOR_FILE
from monteclora.adapters.tuner import MonteCLoRATuner
from monteclora.errors import ConfigError
from monteclora.posterior import AdapterPosterior
from monteclora.posterior.torch_private import original
from monteclora.system.atomic import staged

__all__ = ["DrawnAdapters", "export_merged", "export_samples", "write_model"]


def export_samples(
    model: MonteCLoRAModel,
    directory: str | os.PathLike[str],
    num_samples: int = 8,
    seed: int = 0,
    layers: int | None = None,
) -> list[Path]:
    """Write plain LoRA adapters whose A is a draw from the posterior; their B is the trained one.

    Adapter s computes what eval-mode forward pass s computes inside ``posterior_sampling(model, seed, layers=layers)``.

    Args:
        model: with one active MonteCLoRA adapter.
        directory: the folder that gets ``sample-0``, ``sample-1``, ...
        num_samples: how many.
        seed: the stream of draws.
        layers: the last adapted blocks that are drawn, the others stay at the mean; by default those that the
            posterior's scale was calibrated with, else all.

    Returns:
        The adapters' folders.

    Raises:
        ConfigError: no single active MonteCLoRA adapter, ``num_samples`` below 1, or more ``layers`` than there are.
    """
    if num_samples < 1:
        raise ConfigError(f"num_samples is {num_samples}, expected at least 1", "Ask for one adapter or more.")
    drawn = DrawnAdapters.of(model, layers)
    config = cast(MonteCLoRAConfig, model.peft_config[drawn.name]).plain_lora()
    config.base_model_name_or_path = portable_name(config.base_model_name_or_path)
    config.inference_mode = True
    plain_patterns(config)
    folders = []
    for number in range(num_samples):
        folder = Path(directory) / f"sample-{number}"
        with staged(folder) as stage:
            weights = save(drawn.weights(seed, number), metadata={"format": "pt"})
            (stage / "adapter_model.safetensors").write_bytes(weights)
            config.save_pretrained(str(stage))
        (folder / POSTERIOR_FILE).unlink(missing_ok=True)  # that an adapter of this name left
        folders.append(folder)
    return folders


@dataclass(frozen=True)
class DrawnAdapters:
    """The active adapter of a model as the plain LoRA adapters that its posterior's draws are.

    Attributes:
        name: of the adapter.
        posterior: of it.
        mean: its weights, as peft names them in files.
        drawn: numbers of the posterior's layers that are drawn.
    """

    name: str
    posterior: AdapterPosterior
    mean: Mapping[str, Tensor]
    drawn: Collection[int]

    @classmethod
    def of(cls, model: PeftModel, layers: int | None = None) -> DrawnAdapters:
        """Draws in the last ``layers`` blocks; by default as the posterior's scale was calibrated.

        Raises ConfigError where there is no single active MonteCLoRA adapter, or more ``layers`` than it has.
        """
        names, tuner = list(model.active_adapters), model.base_model
        posterior = tuner.posterior(names[0]) if len(names) == 1 and isinstance(tuner, MonteCLoRATuner) else None
        if posterior is None:
            raise ConfigError(
                f"active adapters are {names}, expected one MonteCLoRA adapter",
                "Choose it with model.set_adapter(name).",
            )
        mean = get_peft_model_state_dict(model, adapter_name=names[0])
        count = (posterior.calibration or {}).get("layers") if layers is None else layers
        drawn = range(len(posterior.layers)) if count is None else drawn_blocks(model, count).drawn[posterior]
        return cls(names[0], posterior, {plain_name(key): value for key, value in mean.items()}, drawn)

    def weights(self, seed: int, number: int) -> dict[str, Tensor]:
        """The weights under draw ``number`` of the stream ``seed``, in the mean's dtypes, on the CPU."""
        draw = self.posterior.sample(seed, number)
        drawn = {key: tensor.detach().cpu().contiguous() for key, tensor in self.mean.items()}
        for index, layer in enumerate(self.posterior.layers):
            if index not in self.drawn:
                continue
            key = f"base_model.model.{layer.name}.lora_A.weight"
            part = draw.layers[index]
            assert part is not None  # every layer is drawn
            noise = part.matrix[0]
            mu = self.mean[key]
            drawn[key] = (mu.to(noise.device, noise.dtype) + noise).to(mu.dtype).cpu().contiguous()
        return drawn


def export_merged(model: PeftModel, directory: str | os.PathLike[str], tokenizer: Any = None) -> Path:
    """Write the base model with the adapter's mean merged in, as an ordinary transformers folder.

    Where a target shares its weight with another layer, such as a head with the embedding, the two are written apart
    and the configuration says ``tie_word_embeddings=False``.

    Args:
        model: the wrapped model; it is left as it is.
        directory: the folder to write.
        tokenizer: saved along, if given.

    Returns:
        The folder.

    Raises:
        ConfigError: the base model is not a transformers model.
    """
    base = original(model.get_base_model())
    if not isinstance(base, PreTrainedModel):
        raise ConfigError(f"{type(base).__name__} is not a transformers model", "Use model.merge_and_unload() instead.")
    return write_model(cast(PreTrainedModel, merged_copy(model)), directory, tokenizer)


def write_model(model: PreTrainedModel, directory: str | os.PathLike[str], tokenizer: Any = None) -> Path:
    """Write an ordinary transformers folder, whose files appear whole.

    Args:
        model: without adapters.
        directory: the folder to write.
        tokenizer: saved along, if given.

    Returns:
        The folder.
    """
    target = Path(directory)
    with staged(target) as stage:
        model.save_pretrained(str(stage), safe_serialization=True)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(stage))
    return target
