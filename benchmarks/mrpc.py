"""LoRA beside MonteCLoRA on MRPC: choose each method's learning rate, then train three seeds on all rows.

    MONTECLORA_DATA=<folder> python benchmarks/mrpc.py --out runs/mrpc

The learning rate is chosen on training rows only: 1,000 to train on, 500 others to compare by likelihood. The official
validation split is seen once, at the end. Resumable: finished runs are kept in the folder and not trained again.
Two processes may share the work, ``--methods lora`` and ``--methods monteclora``; run without ``--methods`` afterwards
for the whole table. Prints it in Markdown.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import statistics
from pathlib import Path
from typing import Any

import monteclora

LEARNING_RATES = (5e-4, 1e-3, 2e-3)
SEEDS = (0, 1, 2)
METHODS = ("lora", "monteclora")
EPOCHS = 5


def recipe(out: Path, name: str, method: str, rate: float, seed: int, data: dict[str, Any]) -> dict[str, Any]:
    options = {"name": method, "r": 8, "lora_alpha": 16, "target_modules": ["query", "key", "value", "dense"]}
    training = {"epochs": EPOCHS, "batch_size": 16, "learning_rate": rate, "schedule": "linear", "precision": "bf16"}
    return {
        "name": name,
        "model": {"name": "minilm"},
        "data": {"max_length": 128, **data},
        "method": options,
        "training": training,
        "seed": seed,
        "output": str(out / name),
    }


def selection_files(out: Path) -> dict[str, Any]:
    """1,000 and 500 different training rows, as files."""
    source = Path(os.environ["MONTECLORA_DATA"]) / "mrpc" / "train.jsonl.gz"
    with gzip.open(source, "rt", encoding="utf-8") as file:
        rows = [line for line in file if line.strip()]
    random.Random(0).shuffle(rows)
    out.mkdir(parents=True, exist_ok=True)
    files = {"train_file": out / "select-train.jsonl", "validation_file": out / "select-validation.jsonl"}
    files["train_file"].write_text("".join(rows[:1000]), encoding="utf-8")
    files["validation_file"].write_text("".join(rows[1000:1500]), encoding="utf-8")
    texts = {"text_columns": ["sentence1", "sentence2"], "label_column": "label"}
    return {key: str(path) for key, path in files.items()} | texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/mrpc"))
    parser.add_argument("--num-samples", type=int, default=8)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    args = parser.parse_args()
    selection = selection_files(args.out)
    chosen: dict[str, float] = {}
    for method in args.methods:
        nll = {}
        for rate in LEARNING_RATES:
            name = f"select-{method}-{rate:g}"
            result = monteclora.train(recipe(args.out, name, method, rate, 0, selection))
            nll[rate] = result.metrics["nll"]
            print(json.dumps({"method": method, "learning_rate": rate, **result.metrics}), flush=True)
        chosen[method] = min(nll, key=lambda rate: nll[rate])
    print(f"chosen learning rates: {chosen}", flush=True)
    table: dict[str, list[dict[str, float]]] = {}
    for seed in SEEDS:
        for method in args.methods:
            name = f"full-{method}-seed{seed}"
            result = monteclora.train(recipe(args.out, name, method, chosen[method], seed, {"task": "mrpc"}))
            draws = args.num_samples if method == "monteclora" else 0
            found = monteclora.evaluate(result.folder, split="validation", num_samples=draws)
            table.setdefault(f"{method}, mean weights", []).append(dict(found.point))
            if found.posterior is not None:
                table.setdefault(f"{method}, {args.num_samples} draws", []).append(dict(found.posterior))
            print(json.dumps({"run": name, "seconds": result.seconds, **found.point}), flush=True)
    names = ("accuracy", "f1", "nll", "ece")
    print("| method | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for label, runs in table.items():
        cells = []
        for name in names:
            values = [run[name] for run in runs]
            cells.append(f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}")
        print(f"| {label} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
