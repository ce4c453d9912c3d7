"""LoRA adapters as GGUF files, which llama.cpp and what is built on it load beside a base model.

The format is llama.cpp's (``gguf-py/gguf/constants.py``, ``convert_lora_to_gguf.py``, ``src/llama-adapter.cpp``): of
each adapted weight there are ``lora_a``, shape (r, n), and ``lora_b``, shape (m, r), under llama.cpp's name of the
weight, and ``adapter.lora.alpha``. llama.cpp multiplies ``B A`` by alpha / r, with r that of the tensor and one alpha a
file. Scalings that are not of this form (rank-stabilised ones, patterns of alphas) go into ``B``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, PeftType
from peft.tuners.lora.layer import LoraLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from monteclora.adapters.config import OTHER_VARIANTS
from monteclora.adapters.export import DrawnAdapters
from monteclora.adapters.merging import shared_targets
from monteclora.adapters.tuner import TUNER_TYPE
from monteclora.errors import ConfigError
from monteclora.system.atomic import replacing
from monteclora.system.extras import require_gguf

__all__ = ["export_gguf"]

# transformers' name of an architecture -> llama.cpp's, for those whose files were compared with what llama.cpp computes
_ARCHITECTURES = {"LlamaForCausalLM": "llama"}
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# initialisations that leave the base model's weights as they are
_ON_THE_BASE = (True, False, "gaussian", "orthogonal", "eva")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_PREFIX = "base_model.model."
_INSTEAD = "Export the merged model, and convert that with llama.cpp's convert_hf_to_gguf.py."


def export_gguf(
    model: PeftModel,
    directory: str | os.PathLike[str],
    num_samples: int = 0,
    seed: int = 0,
    layers: int | None = None,
) -> list[Path]:
    """Write the mean of a LoRA adapter and draws from its posterior as GGUF files for llama.cpp.

    Sample s is that of :func:`monteclora.export_samples` with the same seed and layers. All numbers are float32.

    Args:
        model: with one active adapter, LoRA or MonteCLoRA, on a Llama.
        directory: the folder that gets ``mean.gguf``, ``sample-0.gguf``, ...
        num_samples: how many draws, 0 for the mean alone.
        seed: the stream of draws.
        layers: as of :func:`monteclora.export_samples`.

    Returns:
        The files, the mean first.

    Raises:
        ConfigError: the package gguf is missing; an adapter or architecture that the format or this function does not
            know; ``num_samples`` below 0, or above it for an adapter without a posterior.
        CheckpointError: the disk refuses a file.
    """
    require_gguf("writing GGUF files")
    if num_samples < 0:
        raise ConfigError(f"num_samples is {num_samples}, expected at least 0", "Ask for 0 for the mean alone.")
    name, config = _checked(model)
    file = _File(model, name, config)
    # peft would add the base model's embeddings and head where they are adapted
    mean = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    file.check(mean)
    draws = DrawnAdapters.of(model, layers) if num_samples else None
    target = Path(directory)
    written = [file.write(target / "mean.gguf", mean)]
    for number in range(num_samples):
        assert draws is not None
        written.append(file.write(target / f"sample-{number}.gguf", draws.weights(seed, number)))
    return written


class _File:
    """What all GGUF files of one adapter share.

    Attributes:
        architecture: llama.cpp's name of the base model's.
        alpha: of the whole file.
        layers: of each layer, by its name in the base model: the weight's name in the file, what its B is multiplied
            by, and the attention heads whose rows llama.cpp has in another order, 0 where it has not.
    """

    def __init__(self, model: PeftModel, adapter: str, config: LoraConfig) -> None:
        base: Any = model.get_base_model()
        self.architecture = _ARCHITECTURES[type(base).__name__]
        # llama.cpp takes an alpha of 0 for none at all, and does not scale
        self.alpha = float(config.lora_alpha) or 1.0
        heads = {"attn_q": base.config.num_attention_heads, "attn_k": base.config.num_key_value_heads}
        self.layers: dict[str, tuple[str, float, int]] = {}
        for path, layer in _layers(model, adapter).items():
            weight, kind = _weight_name(path)
            factor = layer.scaling[adapter] * layer.r[adapter] / self.alpha
            self.layers[path] = weight, factor, heads.get(kind, 0)

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Raises ConfigError if an adapter has tensors beside the A and B of its layers."""
        known = {f"{_PREFIX}{layer}.lora_{part}.weight" for layer in self.layers for part in "AB"}
        others = [name.removeprefix(_PREFIX) for name in weights if name not in known]
        if others:
            raise ConfigError(
                f"the adapter has {len(others)} tensors beside lora_A and lora_B, as {others[0]}, and a GGUF adapter "
                "has no place for them",
                f"{_INSTEAD} Or train without modules_to_save, lora_bias, bias and trainable_token_indices.",
            )

    def write(self, path: Path, weights: Mapping[str, Tensor]) -> Path:
        """Write one adapter, given as peft names its tensors."""
        import gguf

        with replacing(path) as temporary:
            writer = gguf.GGUFWriter(temporary, self.architecture)
            try:
                writer.add_type(gguf.GGUFType.ADAPTER)
                writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
                writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, self.alpha)
                for layer, (name, factor, heads) in self.layers.items():
                    a = _numbers(weights[f"{_PREFIX}{layer}.lora_A.weight"])
                    b = _numbers(weights[f"{_PREFIX}{layer}.lora_B.weight"]) * np.float32(factor)
                    writer.add_tensor(f"{name}.lora_a", a)
                    writer.add_tensor(f"{name}.lora_b", _interleaved(b, heads) if heads else b)
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_tensors_to_file()
            finally:
                writer.close()
        return path


def _numbers(tensor: Tensor) -> NDArray[np.float32]:
    found: NDArray[np.float32] = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    return found


def _interleaved(matrix: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows in llama.cpp's order: it rotates neighbouring rows of a head where transformers rotates its halves."""
    rows, rank = matrix.shape
    pairs = matrix.reshape(heads, 2, rows // heads // 2, rank).swapaxes(1, 2)
    return np.ascontiguousarray(pairs.reshape(rows, rank))


def _layers(model: PeftModel, adapter: str) -> dict[str, LoraLayer]:
    """The layers that an adapter adapts, by their names in the base model."""
    found = model.get_base_model().named_modules()
    return {name: layer for name, layer in found if isinstance(layer, LoraLayer) and adapter in layer.scaling}


def _weight_name(layer: str) -> tuple[str, str]:
    """llama.cpp's name of a layer's weight, and of its kind.

    Raises:
        ConfigError: a layer whose adapter llama.cpp was not checked with.
    """
    if layer == "lm_head":
        return "output.weight", "output"
    found = _LAYER.fullmatch(layer)
    kind = _NAMES.get(found[2]) if found else None
    if found is None or kind is None:
        raise ConfigError(
            f"layer {layer} is adapted, and a GGUF adapter can have {', '.join(sorted(_NAMES))} and an lm_head",
            "Leave it out of target_modules, or export the merged model and convert that.",
        )
    return f"blk.{found[1]}.{kind}.weight", kind


def _checked(model: PeftModel) -> tuple[str, LoraConfig]:
    """The active adapter's name and configuration, if all of it can be said in GGUF."""
    names = list(model.active_adapters)
    if len(names) != 1:
        raise ConfigError(f"active adapters are {names}, expected one", "Choose it with model.set_adapter(name).")
    base, config = model.get_base_model(), model.peft_config[names[0]]
    if type(base).__name__ not in _ARCHITECTURES:
        raise ConfigError(
            f"GGUF adapters were checked for {', '.join(_ARCHITECTURES)}, not for {type(base).__name__}",
            _INSTEAD,
        )
    if not isinstance(config, LoraConfig) or config.peft_type not in (PeftType.LORA, TUNER_TYPE):
        raise ConfigError(f"adapter '{names[0]}' is of type {config.peft_type}, expected a LoRA", _INSTEAD)
    variants = [name for name in OTHER_VARIANTS if getattr(config, name, None)]
    if variants:
        raise ConfigError(f"the adapter has {', '.join(variants)}, which llama.cpp does not know", _INSTEAD)
    if config.init_lora_weights not in _ON_THE_BASE or config.layer_replication:
        raise ConfigError(
            "the adapter belongs to weights of the base model that its initialisation (init_lora_weights) or "
            "layer_replication changed, and llama.cpp would add it to the original ones",
            _INSTEAD,
        )
    tied = shared_targets(model)
    if tied:
        raise ConfigError(
            f"layer {tied[0].removeprefix(_PREFIX)} is adapted and shares its weight with another one, which llama.cpp "
            "would adapt as well",
            "Leave it out of target_modules, or export the merged model and convert that.",
        )
    return names[0], config
