"""Prompt tuning (Lester et al. 2021, arXiv 2104.08691): trained embeddings before the tokens of every row.

peft has the embeddings; the passes through the model are this file's, so that what is outside need not know of virtual
tokens: logits, labels, positions and kept columns are those of the row's own tokens. peft drops position ids, gives
logits for virtual tokens too, and in a batch of rows of several lengths lets padding come between virtual and own
tokens, or lets a decoder classify padding.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from monteclora.errors import ConfigError
from monteclora.methods.adapters import AdapterMethod
from monteclora.methods.base import MethodOptions, TaskKind
from monteclora.methods.lora import peft_task, put_adapter

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

__all__ = ["PromptTuning", "PromptTuningOptions"]


@dataclass(frozen=True)
class PromptTuningOptions(MethodOptions):
    """The options of prompt tuning.

    Args:
        num_virtual_tokens: trained embeddings; they take this many of the model's positions.
        initialisation: ``vocabulary`` begins with embeddings of random tokens, ``random`` with standard normal numbers.
    """

    name: Literal["prompt_tuning"] = "prompt_tuning"
    num_virtual_tokens: int = 20
    initialisation: Literal["vocabulary", "random"] = "vocabulary"

    def problems(self) -> list[tuple[str, str]]:
        """What is wrong with the values, see :mod:`monteclora.config`."""
        few = self.num_virtual_tokens < 1
        return [("num_virtual_tokens", f"is {self.num_virtual_tokens}, expected at least 1")] if few else []


class PromptTuning(AdapterMethod):
    """See :class:`~monteclora.methods.base.Method`. It cannot be merged: no weight of the model changes."""

    name = "prompt_tuning"
    description = "prompt tuning: trained embeddings before the tokens of every row"
    options = PromptTuningOptions
    peft_type = "PROMPT_TUNING"

    def wrap(self, model: PreTrainedModel, options: PromptTuningOptions, task_kind: TaskKind, seed: int) -> nn.Module:
        """Put the embeddings before the model.

        Raises:
            ConfigError: the model takes no embeddings, or reads and writes with two stacks.
        """
        import peft

        if model.config.is_encoder_decoder or "inputs_embeds" not in inspect.signature(model.forward).parameters:
            raise ConfigError(
                f"method prompt_tuning cannot be used with {type(model).__name__}: it takes no embeddings in one stack",
                "Choose another method.",
            )
        start = "SAMPLE_VOCAB" if options.initialisation == "vocabulary" else "RANDOM"
        wrapped: Any = put_adapter(
            model,
            lambda: peft.PromptTuningConfig(
                task_type=peft_task(task_kind),
                num_virtual_tokens=options.num_virtual_tokens,
                prompt_tuning_init=start,
            ),
            seed,
        )
        wrapped.__class__ = _aligned(type(wrapped))
        return wrapped

    def virtual_tokens(self, options: PromptTuningOptions) -> int:
        """The prompt's."""
        return options.num_virtual_tokens

    def load_weights(self, model: Any, folder: Path) -> None:
        """peft refuses to train a prompt further that it loads as an adapter."""
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        from monteclora.adapters.storage import WEIGHTS_FILE

        set_peft_model_state_dict(model, load_file(folder / WEIGHTS_FILE), model.active_adapter)

    def merge(self, model: nn.Module) -> nn.Module:
        """Raises ConfigError."""
        raise ConfigError(
            "the method prompt_tuning cannot be merged: its prompt is an input, no weight changes",
            "Use the adapter as it is.",
        )


def _aligned(base: type) -> type:
    """peft's class of prompted models with passes in which only the row's own tokens are seen from outside."""
    return type(f"Aligned{base.__name__}", (base,), {"forward": _forward, "generate": _generate})


def _forward(self: Any, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Any:
    """As the base model's, for tokens of shape (B, T); logits of a language model are (B, T, V), or those kept."""
    cache = inputs.get("cache", inputs.get("past_key_values"))
    if cache is not None and cache.get_seq_length():  # the prompt is in it
        return self.get_base_model()(input_ids=input_ids, **_continued(self, input_ids, attention_mask, inputs))
    count, kept = self.active_peft_config.num_virtual_tokens, inputs.pop("logits_to_keep", 0)
    given = _prompted(self, input_ids, attention_mask, inputs)
    every = isinstance(kept, int) and not kept
    if not every:
        given["logits_to_keep"] = kept if isinstance(kept, int) else kept + count
    output = self.get_base_model()(**given)
    if every and self.active_peft_config.task_type == "CAUSAL_LM":
        output.logits = output.logits[:, count:]
    return output


def _generate(self: Any, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
    """As the base model's ``generate``: the tokens given, shape (B, T), then those that it writes."""
    import torch

    given = _prompted(self, input_ids, attention_mask, {})
    given.pop("position_ids", None)  # generate() counts them by the mask itself
    written: Tensor = self.get_base_model().generate(**given, **options)
    return torch.cat([input_ids, written], dim=1)


def _prompted(model: Any, ids: Tensor, mask: Tensor | None, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs of the base model with the prompt right before each row's first own token, after padding on the left.

    Args:
        model: the prompted one.
        ids: own tokens, shape (B, T).
        mask: 0 where they are padding, shape (B, T).
        inputs: the others; those of shape (B, T) are about the tokens. Position ids are counted again.
    """
    import torch

    base, config = model.get_base_model(), model.active_peft_config
    mask = torch.ones_like(ids) if mask is None else mask
    by_token = {name: value for name, value in inputs.items() if name != "position_ids" and _is_like(value, ids)}
    result = {name: value for name, value in inputs.items() if name != "position_ids" and name not in by_token}
    by_token |= {"ids": ids, "attention_mask": mask}
    decoder = not _is_encoder(base)
    if decoder and config.task_type == "SEQ_CLS":
        by_token = _padded_on_the_left(by_token)  # given embeddings, a decoder classifies its last column
    first = by_token["attention_mask"].long().argmax(1)[:, None]
    count, length = config.num_virtual_tokens, ids.shape[1]
    columns = torch.arange(length + count, device=ids.device)[None]
    virtual = (columns >= first) & (columns < first + count)
    own = (columns - count * (columns >= first + count)).clamp_max(length - 1)
    fill = {"labels": -100, "attention_mask": 1}
    for name, value in by_token.items():
        result[name] = value.gather(1, own).masked_fill(virtual, fill.get(name, 0))
    embedded = model.word_embeddings(result.pop("ids"))
    prompt = model.get_prompt(batch_size=len(ids)).to(embedded)
    place = (columns - first).clamp(0, count - 1)
    spread = prompt.gather(1, place[..., None].expand_as(embedded))
    result["inputs_embeds"] = torch.where(virtual[..., None], spread, embedded)
    if decoder and "position_ids" in inspect.signature(base.forward).parameters:
        result["position_ids"] = (result["attention_mask"].long().cumsum(1) - 1).clamp_min(0)
    return result


def _continued(model: Any, ids: Tensor, mask: Tensor | None, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs beside ``ids``, (B, T), which follow cached tokens, the prompt among them.

    Args:
        model: the prompted one.
        ids: the new tokens.
        mask: of the cached own tokens and the new ones, shape (B, T' + T); None where none is padding.
        inputs: the others.
    """
    import torch

    count = model.active_peft_config.num_virtual_tokens
    if mask is None:
        return inputs
    first = mask.long().argmax(1)[:, None]
    columns = torch.arange(mask.shape[1] + count, device=mask.device)[None]
    own = (columns - count * (columns >= first + count)).clamp_max(mask.shape[1] - 1)
    whole = mask.gather(1, own).masked_fill((columns >= first) & (columns < first + count), 1)
    result = {**inputs, "attention_mask": whole}
    if "position_ids" in inspect.signature(model.get_base_model().forward).parameters:
        result["position_ids"] = (whole.long().cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    return result


def _is_like(value: Any, ids: Tensor) -> bool:
    shape = getattr(value, "shape", None)
    return shape is not None and shape == ids.shape


def _is_encoder(base: Any) -> bool:
    """Whether every token sees those after it."""
    import transformers

    masked = type(base.config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    return masked and not getattr(base.config, "is_decoder", False)


def _padded_on_the_left(by_token: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same rows, shape (B, T) each, with the padding after them moved before them."""
    import torch

    mask = by_token["attention_mask"]
    behind = mask.long().flip(1).argmax(1)[:, None]
    columns = (torch.arange(mask.shape[1], device=mask.device)[None] - behind) % mask.shape[1]
    return {name: value.gather(1, columns) for name, value in by_token.items()}
