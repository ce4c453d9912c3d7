"""Predictive distributions of one batch: all draws of the posterior in few forward passes."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from monteclora.adapters.active import sampled_posteriors
from monteclora.adapters.row_checks import RowOrderError
from monteclora.adapters.sampler import Posterior
from monteclora.errors import ConfigError
from monteclora.prediction import uncertainty
from monteclora.prediction.cached import cache_name
from monteclora.prediction.forward import base_of, placed, text_mask
from monteclora.prediction.sampler import SharesPasses
from monteclora.system.modes import evaluating

__all__ = ["PredictiveDistribution", "class_logits", "drawn_logits", "evaluating", "predict"]

_ROWS_AT_ONCE = 64
_SHARING_ROWS = 512  # of all draws together
_KEEPING_ROWS, _KEPT_ROWS = 96, 32  # of some draws together, of a draw: more would leave a processor's caches
_OTHER_HEADS = ("ForTokenClassification", "ForMaskedLM", "ForQuestionAnswering", "ForPreTraining", "ForMultipleChoice")


@dataclass(frozen=True)
class PredictiveDistribution:
    """Predictions for a batch of B inputs over C classes (labels, or the vocabulary).

    Attributes:
        probs: shape (S, B, C), float32, one distribution a posterior draw.
    """

    probs: Tensor

    def __repr__(self) -> str:
        draws, rows, classes = self.probs.shape
        return f"PredictiveDistribution({draws} draws, {rows} inputs, {classes} classes)"

    @property
    def mean(self) -> Tensor:
        """The predictive distribution, shape (B, C)."""
        return self.probs.double().mean(0).float()

    @property
    def total(self) -> Tensor:
        """H[mean_s p_s], shape (B,), float64, nats."""
        return uncertainty.total(self.probs)

    @property
    def aleatoric(self) -> Tensor:
        """mean_s H[p_s], shape (B,), float64, nats."""
        return uncertainty.aleatoric(self.probs)

    @property
    def epistemic(self) -> Tensor:
        """H[mean_s p_s] - mean_s H[p_s], shape (B,), float64, nats, never negative."""
        return uncertainty.epistemic(self.probs)


def class_logits(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Logits of the labels, or of the next token after each row's last one, shape (B, C), float32.

    Args:
        model: with a classification or a language-modelling head.
        inputs: what the model takes; rows may be padded on either side if ``attention_mask`` is among them
            (``decoder_attention_mask`` where tokens are a decoder's).

    Raises:
        ConfigError: the model has a head of another kind.
    """
    base = base_of(model)
    if type(base).__name__.endswith(_OTHER_HEADS):
        raise ConfigError(
            f"{type(base).__name__} does not predict one label or next token a row",
            "Use a model with a sequence classification or language-modelling head.",
        )
    parameters = inspect.signature(base.forward).parameters
    inputs = placed(base, inputs)
    if inputs.get(cache_name(model) or "") is None and "use_cache" in parameters:
        inputs.setdefault("use_cache", False)  # nothing reads on: draws that share blocks need not keep all of them
    mask = text_mask(base, inputs)
    if "logits_to_keep" in parameters:
        # over a large vocabulary, the logits of all positions would take more memory than the model
        sequence = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        kept, column = _last_positions(mask, sequence).unique(return_inverse=True)
        logits: Tensor = model(**{**inputs, "logits_to_keep": kept}).logits
    else:
        logits = model(**inputs).logits
        if logits.dim() == 2:
            return logits.float()
        column = _last_positions(mask, logits)
    return logits[torch.arange(logits.shape[0], device=logits.device), column.to(logits.device)].float()


def _last_positions(mask: Tensor | None, sequence: Tensor) -> Tensor:
    """Where each row's last token is, shape (B,), in a sequence of shape (B, T, ...)."""
    rows, length = sequence.shape[:2]
    if mask is None:
        return torch.full((rows,), length - 1, device=sequence.device)
    return (mask.long() * torch.arange(length, device=mask.device)).argmax(-1)


def predict(
    model: nn.Module, batch: Mapping[str, Any], num_samples: int = 16, seed: int = 0, layers: int | None = None
) -> PredictiveDistribution:
    """Sample the posterior predictive distribution of labels or next tokens.

    Draw s is the same for every input and every call with this seed: the result for an input depends neither on what
    else is in the batch nor on the global generators, and neither is changed. Draws share forward passes if the model
    keeps them apart, which is determined once; else they are made one at a time, with a warning that names the layer.

    Args:
        model: a model with a MonteCLoRA adapter; its mode (training or not) is as before afterwards.
        batch: what the model takes (``input_ids``, ``attention_mask``, ...), each value of shape (B, ...); labels are
            ignored.
        num_samples: S.
        seed: the stream of draws.
        layers: draw in so many of the last adapted blocks alone, which costs less: the blocks below run once for all
            draws where a trial shows that this changes nothing, else a warning says why not. None draws in all.

    Returns:
        Probabilities of shape (S, B, C), and their split into aleatoric and epistemic uncertainty.

    Raises:
        ConfigError: the model has no active MonteCLoRA adapter or a head of another kind, ``num_samples`` is below 1,
            there are fewer adapted blocks than ``layers``, or the batch has no tensor, is no mapping, or its
            ``input_ids`` are not of shape (B, T).
    """
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
        raise ConfigError(
            f"num_samples is {num_samples}, expected a whole number of at least 1", "Ask for one draw or more."
        )
    problem = getattr(getattr(base_of(model), "config", None), "problem_type", None)
    if problem in ("regression", "multi_label_classification"):
        raise ConfigError(
            f"the model's head is for {problem}, whose outputs are no probabilities of classes",
            "Use monteclora.load(run).predict(texts), or monteclora.posterior_sampling around the model.",
        )
    _check_batch(batch)
    _warn_of_padding(model, batch)
    device = sampled_posteriors(model)[0].rho.device
    inputs = {
        key: value.to(device) if isinstance(value, Tensor) else value
        for key, value in batch.items()
        if key not in ("labels", "label")
    }
    if _rows(inputs) == 0:
        raise ConfigError(
            "the batch has no tensor with a row in it", "Give what the model takes, such as input_ids of shape (B, T)."
        )
    sampler = Posterior(num_samples, seed, layers=layers)
    return PredictiveDistribution(drawn_logits(model, inputs, sampler, torch.softmax))


def drawn_logits(
    model: nn.Module,
    inputs: Mapping[str, Any],
    sampler: SharesPasses,
    change: Callable[[Tensor, int], Tensor] = lambda logits, dim: logits,
) -> Tensor:
    """What :func:`class_logits` gives under each draw, shape (S, B, C), float32, in few forward passes.

    Args:
        model: with a MonteCLoRA adapter.
        inputs: what the model takes, on its device; at least one tensor has the shape (B, ...).
        sampler: of the draws.
        change: of the logits and their dimension, pass by pass.

    Raises:
        ConfigError: as :func:`predict`.
    """
    rows = _rows(inputs)
    size, together, keeping = _division(rows, sampler, _device(inputs))
    parts = []
    with evaluating(model):
        for first in range(0, rows, size):
            some = {key: _some(value, rows, first, size) for key, value in inputs.items()}
            with sampler.keeping(model) if keeping else nullcontext():
                parts.append(_drawn(model, some, sampler, together, change))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _division(rows: int, sampler: SharesPasses, device: torch.device) -> tuple[int, int, bool]:
    """How many rows at a time, how many draws of them in a pass, and whether passes keep what draws share."""
    if not sampler.shares_passes:
        return rows, max(1, _ROWS_AT_ONCE // rows), False
    if sampler.keeps_shared and device.type == "cpu":
        size = min(rows, _KEPT_ROWS)
        return size, _KEEPING_ROWS // size, True
    return max(1, _SHARING_ROWS // sampler.num_samples), sampler.num_samples, False


def _drawn(
    model: nn.Module,
    inputs: Mapping[str, Any],
    sampler: SharesPasses,
    together: int,
    change: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """Logits, changed, (S, B, C), so many draws at once as are made ``together``."""
    rows, chunks = _rows(inputs), []
    first = 0
    while first < sampler.num_samples:
        left = sampler.num_samples - first
        count = left if left <= together + 1 else together  # not one by itself, which would share nothing
        repeated = {key: _repeated(value, rows, count) for key, value in inputs.items()}
        try:
            with sampler.draws(model, first, count):
                logits = class_logits(model, repeated)
        except RowOrderError as error:
            warnings.warn(f"{error.message}: they are drawn one at a time", UserWarning, stacklevel=4)
            chunks += [_one(model, inputs, sampler, s, change) for s in range(first, sampler.num_samples)]
            break
        chunks.append(change(logits, -1).view(count, rows, -1))
        first += count
    return torch.cat(chunks)


def _one(
    model: nn.Module,
    inputs: Mapping[str, Any],
    sampler: SharesPasses,
    number: int,
    change: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """Logits, changed, under one draw, shape (1, B, C)."""
    with sampler.draws(model, number, 1):
        return change(class_logits(model, inputs), -1).unsqueeze(0)


def _rows(inputs: Mapping[str, Any]) -> int:
    return max((value.shape[0] for value in inputs.values() if isinstance(value, Tensor) and value.dim()), default=0)


def _device(inputs: Mapping[str, Any]) -> torch.device:
    return next(value.device for value in inputs.values() if isinstance(value, Tensor) and value.dim())


def _some(value: Any, rows: int, first: int, count: int) -> Any:
    """Of what belongs to the rows, that of ``count`` of them."""
    if isinstance(value, Tensor) and value.dim() and value.shape[0] == rows:
        return value[first : first + count]
    return value


def _check_batch(batch: Any) -> None:
    """Refuse what is no batch of tokens: texts, lists, a tensor by itself, a row without a batch around it."""
    if not isinstance(batch, Mapping):
        raise ConfigError(
            f"predict was given a {type(batch).__name__}, expected the model's inputs by name",
            'Give what the tokenizer returns: tokenizer(texts, padding=True, return_tensors="pt").',
        )
    ids = batch.get("input_ids")
    if isinstance(ids, Tensor) and ids.dim() != 2:
        raise ConfigError(
            f"input_ids has the shape {tuple(ids.shape)}, expected (rows, tokens)",
            "Put a single row into a batch of one: input_ids.unsqueeze(0).",
        )
    if isinstance(ids, Tensor):
        _check_tokens(ids, batch.get("attention_mask"))


def _check_tokens(ids: Tensor, mask: Any) -> None:
    hint = 'Give what the tokenizer returns: tokenizer(texts, padding=True, return_tensors="pt").'
    if ids.dtype not in (torch.int64, torch.int32):
        raise ConfigError(f"input_ids is of {ids.dtype}, expected whole numbers (torch.int64)", hint)
    if ids.shape[0] and not ids.shape[1]:
        raise ConfigError(f"input_ids has the shape {tuple(ids.shape)}, expected at least one token a row", hint)
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[0] != ids.shape[0]:
        raise ConfigError(f"attention_mask has {mask.shape[0]} rows, and input_ids {ids.shape[0]}", hint)
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] < ids.shape[1]:
        raise ConfigError(f"attention_mask has {mask.shape[1]} positions a row, and input_ids {ids.shape[1]}", hint)


def _warn_of_padding(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """Warn of rows that seem to be padded, without a mask to say so: their padding is read as text."""
    ids, pad = batch.get("input_ids"), getattr(getattr(base_of(model), "config", None), "pad_token_id", None)
    if not isinstance(ids, Tensor) or not isinstance(pad, int) or batch.get("attention_mask") is not None:
        return
    padding = ids == pad
    # a single padding token at the end of every row may be the end of the text
    if any(bool(side.all(-1).any()) for side in (padding[:, :2], padding[:, -2:]) if side.shape[1] == 2) or any(
        bool(side.any()) and not bool(side.all()) for side in (padding[:, :1], padding[:, -1:]) if side.numel()
    ):
        warnings.warn(
            f"rows of input_ids begin or end with the padding token ({pad}) and there is no attention_mask, so that "
            "padding is read as text: pass the attention_mask that the tokenizer returns",
            UserWarning,
            stacklevel=3,
        )


def _repeated(value: Any, rows: int, count: int) -> Any:
    """What belongs to the rows, ``count`` times over; what they share (one row of positions, an option) as it is."""
    if isinstance(value, Tensor) and value.dim() and value.shape[0] == rows:
        return value.repeat(count, *[1] * (value.dim() - 1))
    return value
