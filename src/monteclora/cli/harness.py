"""``monteclora harness``."""

from __future__ import annotations

from pathlib import Path

from monteclora.cli.output import Flag, Json, print_json, print_table

__all__ = ["harness"]


def harness(
    run: str,
    /,
    *tasks: str,
    include: Path | None = None,
    limit: int | None = None,
    num_samples: int = 0,
    seed: int = 0,
    batch_size: int | None = None,
    base: Flag = False,
    as_json: Json = False,
) -> None:
    """Measure a run with lm-evaluation-harness, on the model as it is, adapter and posterior in place.

    Args:
        run: a run folder of a language model.
        tasks: gsm8k (this package's data), names of the harness's tasks, or paths of their YAML files.
        include: a folder with YAML files of tasks, to be looked in instead of the harness's own.
        limit: at most this many questions of each task.
        num_samples: posterior draws, each measured by itself; 0 for the mean.
        seed: of the draws.
        batch_size: sequences per forward pass; by default the recipe's training.eval_batch_size.
        base: measure the pretrained model without the adapter.
    """
    from monteclora.evaluation.harness import harness as measure

    result = measure(
        run,
        tasks or ("gsm8k",),
        include=include,
        limit=limit,
        num_samples=num_samples,
        seed=seed,
        batch_size=batch_size,
        base=base,
    )
    if as_json:
        print_json({"num_samples": result.num_samples, "results": list(result.results)})
        return
    rows = [
        (f"draw {draw}" if result.num_samples else "pretrained" if base else "mean", task, metric, f"{value:.4f}")
        for draw, tasks_ in enumerate(result.results)
        for task, metrics in tasks_.items()
        for metric, value in metrics.items()
        if isinstance(value, float) and "stderr" not in metric
    ]
    print_table(["", "task", "metric", "value"], rows, left=3)
