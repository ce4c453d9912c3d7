"""What MonteCLoRA adds to LoRA on LLaMA-7B and LLaMA-70B: derived, and counted on the meta device.

    python benchmarks/paper_scale.py --write docs/scale.md

The models have their published shapes and no weights. Parameters, and the matmuls of LoRA's forward and backward pass,
are counted there; bytes kept for the backward pass and our own matmuls on a small model of the same kind.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from results import between, markers, table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import monteclora
from monteclora.system.atomic import write_file

Counts = dict[str, float]

SHAPES: dict[str, dict[str, int]] = {
    "LLaMA-7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "LLaMA-70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "small": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 100,
    },
}
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# r and targets: the published setting, and every linear layer
ADAPTERS = {"q, k, v, r = 32": (32, _PROJECTIONS[:3]), "all linear, r = 16": (16, _PROJECTIONS)}
NUM_COMPONENTS = 4
# micro batch 4 of 256 tokens, as published
_ROWS, _LENGTH = 4, 256


@dataclass(frozen=True)
class Plan:
    """A model's shape and its adapter."""

    shape: str
    r: int
    targets: tuple[str, ...]
    num_components: int = NUM_COMPONENTS

    @property
    def config(self) -> LlamaConfig:
        """The model's configuration."""
        return LlamaConfig(**SHAPES[self.shape], max_position_embeddings=2048, attn_implementation="eager")

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Inputs n and outputs m of every linear layer of a block."""
        c = self.config
        d, f = c.hidden_size, c.intermediate_size
        kv = d * c.num_key_value_heads // c.num_attention_heads
        shapes = (d, d), (d, kv), (d, kv), (d, d), (d, f), (d, f), (f, d)
        return dict(zip(_PROJECTIONS, shapes, strict=True))

    def build(self, kind: str, device: str) -> nn.Module:
        """The frozen model with an adapter of a kind, or without (``base``), and a gradient of its embeddings."""
        with torch.device(device):
            model = LlamaForCausalLM(self.config).requires_grad_(False).train()
            model.get_input_embeddings().register_forward_hook(lambda _m, _i, output: output.requires_grad_())
            shared = {"r": self.r, "lora_alpha": 2 * self.r, "target_modules": list(self.targets)}
            if kind == "lora":
                return peft.get_peft_model(model, peft.LoraConfig(**shared, task_type="CAUSAL_LM")).train()
            if kind == "shared":
                noise = {"num_components": self.num_components, "sample_scale": 5e-3}
                config = monteclora.MonteCLoRAConfig(**shared, **noise, task_type="CAUSAL_LM")
                return monteclora.get_peft_model(model, config).train()
        return model


def derive(plan: Plan, tokens: int) -> Counts:
    """All numbers from the shapes, for a step of ``tokens`` tokens on one device."""
    c, r = plan.config, plan.r
    per_block = list(plan.linears.values())
    adapted = [plan.linears[name] for name in plan.targets] * c.num_hidden_layers
    linear = c.num_hidden_layers * sum(n * m for n, m in per_block)
    head = c.vocab_size * c.hidden_size
    norms = (2 * c.num_hidden_layers + 1) * c.hidden_size
    cells = r * sum(n for n, _ in adapted)
    lora = r * sum(n + m for n, m in adapted)
    extra = len(adapted) * (r + plan.num_components)
    return {
        "base parameters": linear + 2 * head + norms,
        "LoRA parameters": lora,
        "extra parameters": extra,
        "extra training state, bytes": 16 * extra,
        "drawn A, bytes": 4 * cells,
        "peft's noise, bytes": 4 * peft.MontecloraConfig().buffer_size * plan.num_components * cells,
        "base FLOPs a token": 4 * (linear + head),
        "LoRA FLOPs a token": 6 * lora,
        "extra FLOPs a step": 5 * cells,
        "normal numbers a step": cells,
        "extra FLOPs / LoRA's": 5 * cells / (6 * lora * tokens),
        "extra FLOPs / base's": 5 * cells / (4 * (linear + head) * tokens),
        "LoRA gradient, bytes": 4 * lora,
        "extra gradient, bytes": 4 * extra,
    }


def count(plan: Plan, device: str = "meta", tokens: int = 8) -> Counts:
    """Parameters and matmul FLOPs of the models themselves."""
    models = {kind: plan.build(kind, device) for kind in ("base", "lora")}
    ours = plan.build("shared", device)
    flops = {kind: matmul_flops(model, tokens) / tokens for kind, model in models.items()}
    # attention between tokens has no weights: it is in both, and not in the derivation
    attention = 2 * _attention_flops(plan.config, tokens)
    return {
        "base parameters": _size(models["base"].parameters()),
        "LoRA parameters": _size(p for n, p in models["lora"].named_parameters() if "lora_" in n),
        "extra parameters": _size(p for n, p in ours.named_parameters() if "posteriors" in n),
        "drawn A, bytes": 4 * _size(p for n, p in ours.named_parameters() if "lora_A" in n),
        "base FLOPs a token": flops["base"] - attention,
        "LoRA FLOPs a token": flops["lora"] - flops["base"],
    }


def _size(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _attention_flops(config: LlamaConfig, tokens: int) -> float:
    """Half of what scores and weighted values of the whole model take a token, forward and backward."""
    return config.num_hidden_layers * 6 * tokens * config.hidden_size


def _summed_logits(model: nn.Module, tokens: int) -> Tensor:
    """A forward pass over one row."""
    device = next(model.parameters()).device
    ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
    # given whole, for there are no values on the meta device from which to make it
    mask = torch.zeros(1, 1, tokens, tokens, device=device)
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits.sum()


def matmul_flops(model: nn.Module, tokens: int) -> float:
    """FLOPs of the matmuls of a forward and backward pass over one row."""
    with FlopCounterMode(display=False) as counter:
        _summed_logits(model, tokens).backward()
    return float(counter.get_total_flops())


def kept_bytes(model: nn.Module, tokens: int) -> int:
    """Bytes of the different tensors kept for the backward pass, without parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _summed_logits(model, tokens)
    return sum(kept.values())


def check_small(plan: Plan, tokens: int = 8) -> dict[str, Counts]:
    """Ours against LoRA on a small model with weights: matmuls and bytes kept, derived and counted."""
    lora, ours = plan.build("lora", "cpu"), plan.build("shared", "cpu")
    derived = derive(plan, tokens)
    added = derived["drawn A, bytes"]
    return {
        "extra matmul FLOPs": {"derived": 0.0, "counted": matmul_flops(ours, tokens) - matmul_flops(lora, tokens)},
        "extra bytes kept": {"derived": added, "counted": kept_bytes(ours, tokens) - kept_bytes(lora, tokens)},
    }


def plans() -> dict[str, Plan]:
    """Every model with every adapter."""
    return {f"{shape}, {label}": Plan(shape, *a) for shape in list(SHAPES)[:2] for label, a in ADAPTERS.items()}


def report(tokens: int, counted: Callable[[Plan], Counts] = count) -> str:
    """The tables as Markdown."""
    found = plans()
    derived = {name: derive(plan, tokens) for name, plan in found.items()}
    names = list(next(iter(derived.values())))
    main_rows = [[name, *(_number(derived[label][name]) for label in found)] for name in names]
    checks = []
    for label, plan in found.items():
        for name, value in counted(plan).items():
            checks.append([f"{label}: {name}", _number(derived[label][name]), _number(value)])
    for name, pair in check_small(Plan("small", 4, _PROJECTIONS)).items():
        checks.append([f"small model: {name}", _number(pair["derived"]), _number(pair["counted"])])
    parts = [
        f"N = {NUM_COMPONENTS}, {tokens:,} tokens a step on each device.",
        table(["", *found], main_rows),
        "Derived against counted:",
        table(["", "derived", "counted"], checks),
    ]
    return "\n\n".join(parts)


def _number(value: float) -> str:
    if 0 < abs(value) < 1e-2:
        return f"{value:.1e}"
    return (
        f"{value:,.0f}"
        if abs(value) < 1e6
        else f"{value / 1e6:,.2f} M"
        if abs(value) < 1e9
        else f"{value / 1e9:,.2f} G"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=_ROWS * _LENGTH, help="tokens of a step on each device")
    parser.add_argument("--write", type=Path, help="Markdown file whose part between the markers is replaced")
    args = parser.parse_args()
    text = report(args.tokens, partial(count))
    print(text)
    if args.write:
        page = args.write.read_text(encoding="utf-8")
        old, (start, end) = between(page, "tables"), markers("tables")
        if old is None:
            parser.error(f"{args.write} has no {start} and {end}")
        head, tail = page.partition(start)[0], page.partition(end)[2]
        write_file(args.write, f"{head}{start}\n{text}\n{end}{tail}".encode())


if __name__ == "__main__":
    main()
