"""Training without a sweep over learning rates: what finds a rate, or does without one, against fixed rates.

    python benchmarks/no_sweep.py --out runs/no_sweep

The recipe helpdesk-minilm-monteclora, by LoRA and MonteCLoRA: AdamW at fixed rates, with what monteclora has (``auto``,
``back_off``), and with what was tried and left out: Prodigy, schedule-free AdamW, and an exponential moving average of
the weights. Each ends with the step of best validation NLL, and is measured at its mean weights. Every finished case is
a file in the folder, and is not run again; ``--only 'lora-0-*'`` runs some of them. Two of the candidates need
prodigyopt and schedulefree.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from results import arguments, read_results, run_cases, table

import monteclora
from monteclora.errors import DivergenceError
from monteclora.methods.base import Method
from monteclora.training.loop import Loop

METHODS = ("lora", "monteclora")
SEEDS = (0, 1, 2)
RATES = (4e-4, 1e-3, 2e-3, 3e-3, 6e-3, 1e-2, 2e-2)


@contextmanager
def optimizer(make: Callable[[Any], Any]) -> Iterator[None]:
    """Another optimiser in the place of AdamW; one that has an evaluation mode is in it while a step is finished."""
    finish = Loop._finish_step

    def finish_step(loop: Loop, **options: Any) -> None:
        own = getattr(loop.optimizer, "optimizer", loop.optimizer)
        if hasattr(own, "eval"):
            own.eval()
        finish(loop, **options)
        if hasattr(own, "train"):
            own.train()

    with (
        patch.object(Method, "optimizer", lambda method, groups, plan: make((groups, plan))),
        patch.object(Loop, "_finish_step", finish_step),
    ):
        yield


def prodigy(given: Any) -> Any:
    """Prodigy (Mishchenko and Defazio 2024) from AdamW's usual rate: its own start, 1e-6, leaves lora_B at zero."""
    from prodigyopt import Prodigy

    groups, _ = given
    return Prodigy(
        [group for group in groups if group["params"]], lr=1.0, d0=1e-4, use_bias_correction=True, safeguard_warmup=True
    )


def schedule_free(given: Any) -> Any:
    """Schedule-free AdamW (Defazio et al. 2024)."""
    from schedulefree import AdamWScheduleFree

    groups, plan = given
    made = AdamWScheduleFree(groups, lr=plan.learning_rate, betas=(0.9, 0.999))
    made.train()
    return made


@contextmanager
def moving_average(decay: float) -> Iterator[None]:
    """Validate, save and keep the bias-corrected moving average of the trained weights."""
    step, finish = Loop.step, Loop._finish_step
    averages: dict[int, torch.Tensor] = {}

    def step_and_average(loop: Loop, batches: Any) -> None:
        step(loop, batches)
        with torch.no_grad():
            for weight in loop._trained:
                mean = averages.setdefault(id(weight), torch.zeros_like(weight))
                mean.lerp_(weight, 1 - decay)

    def finish_averaged(loop: Loop, **options: Any) -> None:
        own = [weight.detach().clone() for weight in loop._trained]
        with torch.no_grad():
            for weight in loop._trained:
                weight.copy_(averages[id(weight)] / (1 - decay**loop.state.step))
        finish(loop, **options)
        if not loop.finished:
            with torch.no_grad():
                for weight, value in zip(loop._trained, own, strict=True):
                    weight.copy_(value)

    with patch.object(Loop, "step", step_and_average), patch.object(Loop, "_finish_step", finish_averaged):
        yield


def candidates() -> dict[str, tuple[dict[str, Any], Callable[[], AbstractContextManager[None]]]]:
    """Each with its ``training`` fields, and what has to be put around the run."""
    found: dict[str, tuple[dict[str, Any], Callable[[], AbstractContextManager[None]]]] = {}
    for rate in RATES:
        found[f"fixed-{rate:g}"] = ({"learning_rate": rate}, nullcontext)
    found["auto"] = ({"learning_rate": "auto"}, nullcontext)
    found["back_off-0.02"] = ({"learning_rate": 2e-2, "back_off": 2}, nullcontext)
    found["prodigy"] = ({"learning_rate": 1.0, "schedule": "linear"}, lambda: optimizer(prodigy))
    for rate in (3e-3, 1e-2):
        free = {"learning_rate": rate, "schedule": "constant"}
        found[f"schedule_free-{rate:g}"] = (free, lambda: optimizer(schedule_free))
        found[f"ema-{rate:g}"] = ({"learning_rate": rate}, lambda: moving_average(0.95))
    return found


def run(name: str, method: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train and evaluate a candidate; gives the metrics of the kept step on validation and test rows."""
    training, around = candidates()[name]
    overrides = [("method.name", method), ("seed", str(seed)), ("output", str(folder))]
    overrides += [(f"training.{key}", json.dumps(value)) for key, value in training.items()]
    facts: dict[str, Any] = {"method": method, "candidate": name, "seed": seed}
    try:
        with around():
            result = monteclora.train("helpdesk-minilm-monteclora", overrides, progress=False)
    except DivergenceError as error:
        return {**facts, "rows": {}, "left_out": {name: error.message}}
    test = monteclora.evaluate(result, "test", sampler="mean", progress=False)
    shutil.rmtree(folder)
    told = ("learning_rate", "steps", "range_test_steps", "back_offs", "seconds")
    facts |= {key: getattr(result, key) for key in told}
    return {**facts, "rows": {"validation": dict(result.metrics), "test": dict(test.point)}}


def summary(records: Sequence[Mapping[str, Any]]) -> str:
    """Means over the seeds that have finished, in the order of the candidates."""
    rows = []
    for method in METHODS:
        for name in candidates():
            found = [each for each in records if each["method"] == method and each["candidate"] == name]
            ended = [each["rows"] for each in found if each["rows"]]
            if not ended:
                continue
            numbers = [statistics.mean(rows["validation"]["nll"] for rows in ended)]
            numbers += [
                statistics.mean(rows["test"][metric] for rows in ended) for metric in ("nll", "accuracy", "ece")
            ]
            rates = ", ".join(dict.fromkeys(f"{each['learning_rate']:g}" for each in found if each["rows"]))
            diverged = str(len(found) - len(ended))
            rows.append([method, name, str(len(found)), diverged, rates, *(f"{value:.3f}" for value in numbers)])
    header = ["method", "candidate", "seeds", "diverged", "rates", "validation NLL", "test NLL", "accuracy", "ECE"]
    return table(header, rows)


def main() -> None:
    args = arguments(__doc__).parse_args()
    cases = {
        f"{method}-{seed}-{name}": partial(run, name, method, seed, args.out / "runs" / f"{method}-{seed}-{name}")
        for seed in SEEDS
        for method in METHODS
        for name in candidates()
    }
    run_cases("no_sweep", cases, args)
    print(summary(read_results(args.out, "no_sweep")))


if __name__ == "__main__":
    main()
