"""Models, batches and training steps that the benchmarks share.

A kind is what is measured: ``base`` is the frozen model with the gradient of its input embeddings (the floor: forward
and backward without an adapter), ``lora`` peft's LoRA, ``peft_monteclora`` peft's MonteCLoRA, ``shared`` and
``per_example`` this package's adapter with noise for the batch and for each example.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

import monteclora
from monteclora.data.models import load_model, resolve_model

KINDS = ("lora", "shared", "per_example", "peft_monteclora", "base")
OURS = ("shared", "per_example")
SIZES = {"minilm": ("32x32", "32x128"), "smollm2": ("1x16", "1x64", "4x128", "8x256")}
_QKV = {"bert": ["query", "key", "value"], "llama": ["q_proj", "k_proj", "v_proj"]}


@dataclass(frozen=True)
class Setting:
    """One setting of the benchmarks.

    ``size`` is examples x tokens. ``dtype`` bf16 means autocast to bfloat16; the frozen weights are stored in bfloat16
    too on a GPU, and in float32 on the CPU. Adapters stay in float32, as peft keeps them.
    """

    model: str
    size: str
    r: int = 8
    num_components: int = 4
    targets: str = "all-linear"
    dtype: str = "fp32"
    checkpointing: bool = False

    @property
    def name(self) -> str:
        """The model, the size, and whatever differs from the usual setting."""
        parts = [self.model, self.size]
        parts += [f"r{self.r}"] if self.r != 8 else []
        parts += [f"N{self.num_components}"] if self.num_components != 4 else []
        parts += [part for part in (self.targets, self.dtype) if part not in ("all-linear", "fp32")]
        parts += ["checkpointing"] if self.checkpointing else []
        return "-".join(parts)

    @property
    def shape(self) -> tuple[int, int]:
        """Examples and tokens."""
        rows, length = map(int, self.size.split("x"))
        return rows, length


def usual_settings() -> list[Setting]:
    """Every model at every size."""
    return [Setting(model, size) for model, sizes in SIZES.items() for size in sizes]


@functools.lru_cache(maxsize=2)
def load_base(model: str, device: str = "cpu", dtype: str = "fp32", num_labels: int = 2) -> PreTrainedModel:
    """A starter model, frozen; a classification head is the same in every call."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    torch.manual_seed(0)
    kind = "classification" if model == "minilm" else "causal_lm"
    stored = "bfloat16" if dtype == "bf16" and device != "cpu" else "float32"
    base = load_model(resolve_model(model), kind, num_labels if model == "minilm" else None, dtype=stored)
    return base.to(device).requires_grad_(False)


def clone(base: nn.Module, device: str | None = None) -> nn.Module:
    """A copy of the modules on the very same weights: nothing but adapters differs, in memory and in caches either.

    With ``device="meta"`` the copy has no weights at all.
    """
    tensors = [*base.parameters(), *base.buffers()]
    shared = {id(tensor): tensor if device is None else _on(tensor, device) for tensor in tensors}
    return copy.deepcopy(base, shared)


def _on(tensor: Tensor, device: str) -> Tensor:
    moved = tensor.detach().to(device)
    return nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved


def is_classifier(model: nn.Module) -> bool:
    """Whether the model has a sequence classification head."""
    return type(model).__name__.endswith("ForSequenceClassification")


def lora_options(model: PreTrainedModel, setting: Setting) -> dict[str, Any]:
    """What every adapter of a setting has in common."""
    targets = "all-linear" if setting.targets == "all-linear" else _QKV[model.config.model_type]
    task = "SEQ_CLS" if is_classifier(model) else "CAUSAL_LM"
    return {"r": setting.r, "lora_alpha": 2 * setting.r, "target_modules": targets, "task_type": task}


def adapter_config(kind: str, model: PreTrainedModel, setting: Setting, **options: Any) -> peft.LoraConfig:
    """The configuration of a kind's adapter; ``options`` are further fields of ours."""
    shared = lora_options(model, setting)
    if kind in OURS:
        return monteclora.MonteCLoRAConfig(num_components=setting.num_components, noise=kind, **shared, **options)
    if kind == "peft_monteclora":
        noise = peft.MontecloraConfig(num_samples=setting.num_components)
        return peft.LoraConfig(monteclora_config=noise, **shared)
    return peft.LoraConfig(**shared)


def wrap(kind: str, model: PreTrainedModel, config: peft.LoraConfig) -> nn.Module:
    """Put an adapter on ``model``, with the same initial weights in every call."""
    torch.manual_seed(0)
    return (monteclora.get_peft_model if kind in OURS else peft.get_peft_model)(model, config)


def build(kind: str, base: PreTrainedModel, setting: Setting, **options: Any) -> nn.Module:
    """A model of a kind in training mode, on the weights of ``base``."""
    model = clone(base)
    if setting.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if kind == "base":
        model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, output: output.requires_grad_())
        return model.train()
    return wrap(kind, model, adapter_config(kind, model, setting, **options)).train()


def adapter_cells(base: PreTrainedModel, setting: Setting) -> int:
    """Entries of all A together, the sum of r x n."""
    model = clone(base, "meta")
    wrapped = peft.get_peft_model(model, adapter_config("lora", model, setting))
    return sum(tensor.numel() for name, tensor in wrapped.named_parameters() if "lora_A" in name)


def peft_noise_bytes(base: PreTrainedModel, setting: Setting) -> int:
    """What peft's MonteCLoRA draws in advance: buffer_size x N numbers for every entry of A, in float32."""
    buffer = peft.MontecloraConfig().buffer_size
    return 4 * buffer * setting.num_components * adapter_cells(base, setting)


def refusal(kind: str, base: PreTrainedModel, setting: Setting, available: float) -> str | None:
    """Why a kind cannot be measured in ``available`` bytes; None if it can."""
    if kind != "peft_monteclora":
        return None
    # half is left to the model and its activations
    needed = peft_noise_bytes(base, setting)
    if needed <= available / 2:
        return None
    return f"its pre-drawn noise takes {needed / 1e9:.1f} GB, of {available / 1e9:.1f} GB available"


def batch_of(base: PreTrainedModel, setting: Setting) -> dict[str, Tensor]:
    """Random tokens with labels, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    rows, length = setting.shape
    ids = torch.randint(2, base.config.vocab_size, (rows, length), generator=generator)
    labels = torch.arange(rows) % base.config.num_labels if is_classifier(base) else ids
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: tensor.to(base.device) for name, tensor in batch.items()}


@contextlib.contextmanager
def precision(setting: Setting, device: torch.device) -> Iterator[None]:
    """Autocast where the setting asks for it."""
    with torch.autocast(device.type, torch.bfloat16, enabled=setting.dtype == "bf16"):
        yield


def regularised(kind: str, model: nn.Module, loss: Tensor) -> Tensor:
    """The task's loss and whatever the kind adds to it."""
    if kind in OURS:
        return loss + monteclora.variational_loss(model)
    if kind == "peft_monteclora":
        return loss + model.base_model._get_monteclora_loss()
    return loss


def training_step(kind: str, model: nn.Module, batch: Mapping[str, Tensor], setting: Setting) -> Callable[[], None]:
    """Forward, loss, regulariser, backward and AdamW."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trainable, lr=1e-4) if trainable else None
    device = batch["input_ids"].device

    def step() -> None:
        with precision(setting, device):
            loss = model(**batch).loss
        regularised(kind, model, loss).backward()
        if optimiser is not None:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    return step
