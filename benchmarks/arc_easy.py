"""LoRA beside MonteCLoRA on ARC-easy in instruction form: smollm2, one epoch of 1,000 rows, before and after.

    MONTECLORA_DATA=<folder> python benchmarks/arc_easy.py --out runs/arc-easy

Each answer option is scored by its likelihood. Resumable: finished runs are not trained again. Two processes may
share the training, ``--train lora`` and ``--train monteclora``; run without ``--train`` afterwards for the table, in
Markdown.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import monteclora

NAMES = ("accuracy", "nll", "ece")
METHODS = ("lora", "monteclora")


def recipe(out: Path, method: str) -> dict[str, Any]:
    options = {"name": method, "r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "k_proj", "v_proj"]}
    return {
        "name": method,
        "model": {"name": "smollm2", "dtype": "bfloat16"},
        "data": {"task": "arc_easy_instruct", "max_length": 256, "train_rows": 1000, "validation_fraction": 0},
        "method": options,
        "training": {
            "epochs": 1,
            "batch_size": 16,
            "group_by_length": True,
            "eval_batch_size": 16,
            "learning_rate": 1e-3,
            "schedule": "cosine",
            "precision": "bf16",
        },
        "output": str(out / method),
    }


def show(label: str, metrics: Mapping[str, float]) -> None:
    print(f"| {label} | " + " | ".join(f"{metrics[name]:.3f}" for name in NAMES) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/arc-easy"))
    parser.add_argument("--rows", type=int, default=200, help="test rows to score")
    parser.add_argument("--num-samples", type=int, default=0, help="posterior draws; each costs a pass over the rows")
    parser.add_argument("--train", choices=METHODS, help="train this method and do no more")
    args = parser.parse_args()
    if args.train:
        monteclora.train(recipe(args.out, args.train))
        return
    results = {method: monteclora.train(recipe(args.out, method)) for method in METHODS}
    for method, result in results.items():
        cost = {"seconds": result.seconds, "peak_memory_bytes": result.peak_memory_bytes, "tokens": result.tokens}
        print(json.dumps({"method": method, **cost}), flush=True)
    print("| model | " + " | ".join(NAMES) + " |\n|---|" + "---|" * len(NAMES), flush=True)
    before = monteclora.evaluate(results["lora"].folder, split="test", base=True, rows=args.rows)
    show("before", before.point)
    for method, result in results.items():
        draws = args.num_samples if method == "monteclora" else 0
        after = monteclora.evaluate(result.folder, split="test", num_samples=draws, rows=args.rows)
        show(f"{method}, mean weights", after.point)
        if after.posterior is not None:
            show(f"{method}, {draws} draws", after.posterior)


if __name__ == "__main__":
    main()
