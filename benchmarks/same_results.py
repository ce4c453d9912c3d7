"""Do two checkouts train the same adapters? Runs a set of recipes with both, and compares the results bit by bit.

    python benchmarks/same_results.py OTHER_CHECKOUT [--only CASE] [--out FOLDER]

needs the starter models, and ``MONTECLORA_DATA`` for the cases on mrpc and arc_easy. Prints a table. Another
checkout is made with ``git worktree add FOLDER COMMIT``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file

HERE = Path(__file__).parents[1]
_STEPS = {"training.max_steps": "60", "training.logging_every": "1"}


class Case(NamedTuple):
    """A recipe, what is changed in it, and the training forwards, from 1, whose loss is made NaN."""

    recipe: str
    overrides: dict[str, str]
    not_finite: tuple[int, ...] = ()


CASES: dict[str, Case] = {
    "helpdesk lora": Case("helpdesk-minilm-lora", _STEPS),
    "helpdesk monteclora": Case("helpdesk-minilm-monteclora", _STEPS),
    "mrpc, accumulated, ragged": Case(
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
    "arc_easy, cosine, bf16": Case(
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
    "post hoc": Case(
        "helpdesk-minilm-monteclora",
        {**_STEPS, "training.mode": "post_hoc", "training.max_steps": "30", "training.post_hoc.max_steps": "20"},
    ),
    "best, early stopping": Case(
        "helpdesk-minilm-monteclora",
        {
            **_STEPS,
            "training.eval_every": "5",
            "training.early_stopping_patience": "2",
            "training.learning_rate": "3e-2",
        },
    ),
    "shuffled": Case("helpdesk-minilm-monteclora", {**_STEPS, "training.group_by_length": "false"}),
    "skipped steps": Case(
        "helpdesk-minilm-monteclora", {**_STEPS, "training.non_finite": "skip"}, not_finite=(5, 6, 20)
    ),
}
_PROGRAM = """
import json, sys
import torch
from torch.nn.modules.module import register_module_forward_hook
from transformers import PreTrainedModel
from monteclora import train

torch.set_num_threads(1)
recipe, overrides, not_finite = json.loads(sys.argv[1])
forwards = 0


def spoil(module, inputs, output):
    global forwards
    if module.training and isinstance(module, PreTrainedModel) and output.get("loss", output.get("logits")) is not None:
        forwards += 1
        if forwards in not_finite:
            return type(output)({name: value * float("nan") for name, value in output.items()})


if not_finite:
    register_module_forward_hook(spoil)
train(recipe, [tuple(pair) for pair in overrides.items()], progress=False)
"""


def run(checkout: Path, case: Case, folder: Path) -> str:
    """Train with the code of a checkout; gives the last line of an error, empty if there was none."""
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": "1"}
    arguments = json.dumps([case.recipe, {**case.overrides, "output": str(folder)}, case.not_finite])
    done = subprocess.run([sys.executable, "-c", _PROGRAM, arguments], env=environment, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def losses(folder: Path) -> dict[int, float]:
    """Of every logged step."""
    return {event["step"]: event["loss"] for event in events(folder, "train")}


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Of one kind, from a run's metrics."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def compare(one: Path, other: Path) -> dict[str, Any]:
    """Whether the adapters are equal to the bit, the skipped steps the same, and the largest difference of a loss."""
    equal = True
    for file in ("adapter_model.safetensors", "posterior.safetensors"):
        if (one / "adapter" / file).exists() or (other / "adapter" / file).exists():
            first, second = load_file(one / "adapter" / file), load_file(other / "adapter" / file)
            equal &= first.keys() == second.keys() and all((first[name] == second[name]).all() for name in first)
    first_losses, second_losses = losses(one), losses(other)
    if first_losses.keys() != second_losses.keys():
        return {"steps logged by one alone": sorted(first_losses.keys() ^ second_losses.keys())}
    skipped, others = events(one, "skipped"), events(other, "skipped")
    differences = [abs(a - second_losses[step]) / max(abs(a), 1e-12) for step, a in first_losses.items()]
    return {
        "bitwise equal": bool(equal),
        "steps logged": len(differences),
        "largest difference of a loss": max(differences, default=0.0),
        "skipped": [event["step"] for event in others],
        "the same ones": skipped == others,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path)
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/same"))
    arguments = parser.parse_args()
    for name, case in CASES.items():
        if arguments.only in (None, name):
            place = arguments.out / name.replace(" ", "-").replace(",", "")
            folders = [place / side for side in ("other", "here")]
            errors = [
                run(checkout, case, folder.absolute())
                for checkout, folder in zip((arguments.other, HERE), folders, strict=True)
            ]
            found = {"errors": errors} if any(errors) else compare(*folders)
            print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in found.items()), flush=True)


if __name__ == "__main__":
    main()
