"""Do two checkouts train the same adapters? Runs a set of recipes with both, and compares the results bit by bit.

    python benchmarks/same_results.py OTHER_CHECKOUT [--only CASE] [--out FOLDER]

needs the starter models, and ``MONTECLORA_DATA`` for the cases on mrpc and arc_easy. Prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

HERE = Path(__file__).parents[1]
_STEPS = {"training.max_steps": "60", "training.logging_every": "1"}
CASES: dict[str, tuple[str, dict[str, str]]] = {
    "helpdesk lora": ("helpdesk-minilm-lora", _STEPS),
    "helpdesk monteclora": ("helpdesk-minilm-monteclora", _STEPS),
    "mrpc, accumulated, ragged": (
        "mrpc-minilm-monteclora",
        {
            "data.train_rows": "197",
            "data.validation_rows": "100",
            "training.epochs": "2",
            "training.batch_size": "8",
            "training.micro_batch_size": "2",
            "training.logging_every": "1",
        },
    ),
    "arc_easy, cosine, bf16": (
        "arc-easy-smollm2-monteclora",
        {
            "data.train_rows": "100",
            "data.validation_rows": "20",
            "training.max_steps": "12",
            "training.schedule": "cosine",
            "training.precision": "bf16",
            "training.logging_every": "1",
        },
    ),
    "post hoc": (
        "helpdesk-minilm-monteclora",
        {**_STEPS, "training.mode": "post_hoc", "training.max_steps": "30", "training.post_hoc.max_steps": "20"},
    ),
    "best, early stopping": (
        "helpdesk-minilm-monteclora",
        {
            **_STEPS,
            "training.eval_every": "5",
            "training.early_stopping_patience": "2",
            "training.learning_rate": "3e-2",
        },
    ),
    "shuffled": ("helpdesk-minilm-monteclora", {**_STEPS, "training.group_by_length": "false"}),
}
_PROGRAM = (
    "import sys, json, torch; torch.set_num_threads(1); from monteclora import train;"
    "recipe, overrides = json.loads(sys.argv[1]);"
    "train(recipe, [tuple(pair) for pair in overrides.items()], progress=False)"
)


def run(checkout: Path, recipe: str, overrides: dict[str, str], folder: Path) -> str:
    """Train with the code of a checkout; gives the last line of an error, empty if there was none."""
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": "1"}
    arguments = json.dumps([recipe, {**overrides, "output": str(folder)}])
    done = subprocess.run([sys.executable, "-c", _PROGRAM, arguments], env=environment, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def losses(folder: Path) -> list[float]:
    """Of every logged step."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [event["loss"] for event in map(json.loads, lines) if event["event"] == "train"]


def compare(one: Path, other: Path) -> dict[str, Any]:
    """Whether the adapters are equal to the bit, and the largest relative difference of a loss."""
    equal = True
    for file in ("adapter_model.safetensors", "posterior.safetensors"):
        if (one / "adapter" / file).exists() or (other / "adapter" / file).exists():
            first, second = load_file(one / "adapter" / file), load_file(other / "adapter" / file)
            equal &= first.keys() == second.keys() and all((first[name] == second[name]).all() for name in first)
    pairs = list(zip(losses(one), losses(other), strict=True))
    return {
        "bitwise equal": bool(equal),
        "steps logged": len(pairs),
        "largest difference of a loss": max((abs(a - b) / max(abs(a), 1e-12) for a, b in pairs), default=0.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path)
    parser.add_argument("--only")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/same"))
    arguments = parser.parse_args()
    for name, (recipe, overrides) in CASES.items():
        if arguments.only in (None, name):
            place = arguments.out / name.replace(" ", "-").replace(",", "")
            folders = [place / side for side in ("other", "here")]
            errors = [
                run(checkout, recipe, overrides, folder.absolute())
                for checkout, folder in zip((arguments.other, HERE), folders, strict=True)
            ]
            found = {"errors": errors} if any(errors) else compare(*folders)
            print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in found.items()), flush=True)


if __name__ == "__main__":
    main()
