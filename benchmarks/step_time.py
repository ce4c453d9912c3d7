"""Time of a training step: this package beside peft's LoRA, peft's MonteCLoRA and the frozen base, in turns.

    python benchmarks/step_time.py --sizes 1x16,4x128 --rounds 15

Every round runs one step (forward and backward) of each method, so a drift of the machine's speed meets all alike;
ratios are taken round by round against peft's LoRA. Prints a table of medians and minima as Markdown.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import peft
import torch
from torch import nn

import monteclora
from monteclora.data.models import load_model, resolve_model

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build(kind: str, base: nn.Module, r: int, num_samples: int, targets: list[str]) -> nn.Module:
    model = copy.deepcopy(base)
    shared = {"r": r, "lora_alpha": 2 * r, "target_modules": targets, "task_type": "CAUSAL_LM"}
    if kind == "base":
        # the floor: forward and backward through the frozen model, with no adapter
        model.requires_grad_(False)
        model.get_input_embeddings().register_forward_hook(lambda _m, _i, output: output.requires_grad_())
        return model
    if kind == "lora":
        return peft.get_peft_model(model, peft.LoraConfig(**shared))
    if kind == "peft_monteclora":
        noise = peft.MontecloraConfig(num_samples=num_samples)
        return peft.get_peft_model(model, peft.LoraConfig(monteclora_config=noise, **shared))
    config = monteclora.MonteCLoRAConfig(num_samples=num_samples, noise=kind, **shared)
    return monteclora.get_peft_model(model, config)


def stepper(kind: str, model: nn.Module, batch: torch.Tensor) -> Callable[[], float]:
    device = batch.device

    def step() -> float:
        start = time.perf_counter()
        loss = model(input_ids=batch, labels=batch).loss
        if kind in ("shared", "per_example"):
            loss = loss + monteclora.variational_loss(model)
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elapsed = time.perf_counter() - start
        model.zero_grad(set_to_none=True)
        return elapsed

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="1x16,1x64,4x128")
    parser.add_argument("--kinds", default="lora,shared,per_example,peft_monteclora,base")
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--num-samples", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    base = load_model(resolve_model("smollm2"), "causal_lm", dtype="float32").to(args.device)
    kinds = args.kinds.split(",")
    models = {kind: build(kind, base, args.r, args.num_samples, ALL_LINEAR).train() for kind in kinds}
    print(
        f"smollm2, all-linear, r = {args.r}, N = {args.num_samples}, {torch.get_num_threads()} threads, {args.device}"
    )
    print("| tokens | method | median ms | min ms | median ratio | min ratio |\n|---|---|---|---|---|---|")
    for size in args.sizes.split(","):
        rows, length = map(int, size.split("x"))
        batch = torch.randint(0, 40_000, (rows, length), generator=torch.Generator().manual_seed(0)).to(args.device)
        steps = {kind: stepper(kind, models[kind], batch) for kind in kinds}
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        for number in range(args.warmup + args.rounds):
            for kind, step in steps.items():
                elapsed = step()
                if number >= args.warmup:
                    times[kind].append(elapsed)
        for kind, values in times.items():
            ratio = statistics.median(a / b for a, b in zip(values, times[kinds[0]], strict=True))
            low = min(values) / min(times[kinds[0]])
            median = 1e3 * statistics.median(values)
            print(f"| {size} | {kind} | {median:.1f} | {1e3 * min(values):.1f} | {ratio:.3f} | {low:.3f} |", flush=True)


if __name__ == "__main__":
    main()
