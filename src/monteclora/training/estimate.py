"""How much memory and how many operations a run will take, from the shapes of the model alone.

A matmul takes two operations a weight and token forward, as many backward for the activations, and as many again where
the weight itself is trained. Attention over short texts and the draws of the posterior are small beside them.
Activations were counted on BERT and LLaMA; the estimate is good to a third.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from monteclora.runs.recipe import Recipe

__all__ = ["Memory", "Sizes", "operations", "required_memory"]

# bytes a parameter: 4-bit values with a float32 scale for every 64 of them, 8-bit values with one a row
_QUANTIZED = {"4bit": 0.5 + 4 / 64, "8bit": 1.0}
_ADAM = 4 + 4 + 4  # gradient and two moments in float32
_ACTIVATIONS_A_LAYER = {"half": 50, "full": 72}  # bytes a token and hidden unit, kept for the backward pass
_LOGITS = 12  # bytes a token and word of the vocabulary: logits, their float32 copy and gradient


@dataclass(frozen=True)
class Sizes:
    """Counts of a model with its adapter.

    Attributes:
        parameters: all of them.
        trained: those that training changes.
        quantizable: weights of the frozen linear layers but the head.
        embeddings: weights that are looked up, not multiplied with.
        layers, hidden, vocabulary: of the transformer, 0 where its configuration does not say.
    """

    parameters: int
    trained: int
    quantizable: int
    embeddings: int
    layers: int
    hidden: int
    vocabulary: int

    @classmethod
    def of(cls, model: nn.Module) -> Sizes:
        """Count, on any device, ``meta`` included."""
        config: Any = model.config
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        named: Any = getattr(model, "get_output_embeddings", lambda: None)
        head = named()
        linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
        frozen = [m.weight for m in linear if not m.weight.requires_grad]
        tied = {id(head.weight)} if isinstance(head, nn.Linear) else set()
        looked_up = [m.weight for m in model.modules() if isinstance(m, nn.Embedding) and id(m.weight) not in tied]
        return cls(
            parameters=sum(p.numel() for p in model.parameters()),
            trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
            quantizable=sum(weight.numel() for weight in frozen),
            embeddings=sum(weight.numel() for weight in looked_up),
            layers=int(getattr(text, "num_hidden_layers", 0) or 0),
            hidden=int(getattr(text, "hidden_size", 0) or 0),
            vocabulary=int(getattr(text, "vocab_size", 0) or 0),
        )


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step.

    Attributes:
        weights: of the model and its adapter.
        optimizer: gradients, Adam's moments, and what the method keeps besides.
        activations: kept for the backward pass; 0 where the model's shape is unknown.
        process: what Python, its libraries and the rows take beside these; 0 where the model is on a device of its own.
    """

    weights: int
    optimizer: int
    activations: int
    process: int = 0

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights + self.optimizer + self.activations + self.process


def required_memory(
    recipe: Recipe, sizes: Sizes, rows: int, longest: int, *, predicts_tokens: bool, extra: int = 0
) -> Memory:
    """What a forward and backward pass of ``rows`` rows of ``longest`` tokens keeps in memory.

    ``extra`` bytes are the method's own, see :meth:`~monteclora.methods.base.Method.extra_memory`.
    """
    width = 4 if recipe.model.dtype == "float32" else 2
    quantized = sizes.quantizable if recipe.model.quantization != "none" else 0
    weights = quantized * _QUANTIZED.get(recipe.model.quantization, 0.0)
    weights += (sizes.parameters - sizes.trained - quantized) * width + sizes.trained * 4
    half = recipe.training.precision != "fp32" or width == 2
    a_layer = _ACTIVATIONS_A_LAYER["half" if half else "full"] * sizes.hidden
    kept = a_layer * sizes.layers
    if recipe.training.gradient_checkpointing:
        kept = (2 if half else 4) * sizes.hidden * sizes.layers + a_layer
    logits = _LOGITS * sizes.vocabulary if predicts_tokens else 0
    return Memory(round(weights), sizes.trained * _ADAM + extra, rows * longest * (kept + logits))


def operations(recipe: Recipe, sizes: Sizes, tokens: float) -> float:
    """Floating-point operations of training on ``tokens`` tokens."""
    passes = 3 if recipe.training.gradient_checkpointing else 2
    multiplied = sizes.parameters - sizes.embeddings
    # where embeddings are trained too, as in full fine-tuning, all that is multiplied with is
    return 2.0 * (passes * multiplied + min(sizes.trained, multiplied)) * tokens
