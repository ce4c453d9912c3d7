"""``monteclora evaluate``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from monteclora.cli.output import Flag, Json, note, print_json, print_line, print_table
from monteclora.errors import ConfigError

if TYPE_CHECKING:
    from monteclora.evaluation.result import EvaluationResult

__all__ = ["evaluate"]


def evaluate(
    run: str,
    /,
    *others: str,
    split: str | None = None,
    task: str | None = None,
    sampler: str | None = None,
    calibrator: str | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    layers: int | None = None,
    base: Flag = False,
    rows: int | None = None,
    batch_size: int | None = None,
    allow_unfinished: Flag = False,
    ood: Path | None = None,
    shift: Flag = False,
    as_json: Json = False,
) -> None:
    """Measure a run's predictions, at the posterior's mean and under draws from it.

    Metrics go to evaluation.json and predictions to predictions.parquet in the run folder.

    Args:
        run: a run folder.
        others: a data file to measure on, in place of the run's own rows; or more run folders, for the sampler
            ensemble, whose results go to the folder of the first.
        split: train, validation or test; by default test where it has labels, else validation.
        task: another task than the run was trained on, such as piqa for one trained on commonsense_15k, or a file.
        sampler: mean, posterior, mc_dropout, laplace or ensemble; by default posterior for a method that has one, else
            mean.
        calibrator: temperature, fitted to the validation rows and stored with the run, or none, the default.
        num_samples: draws; by default the recipe's number, 0 for the mean alone.
        seed: of the draws.
        layers: draw from the posterior in so many of the last adapted blocks alone, which costs less; by default those
            that its scale was calibrated with, else the recipe's number, else all.
        base: measure the pretrained model without the adapter (causal LM only).
        rows: measure at most this many rows, the same ones for every run.
        batch_size: sequences per forward pass; by default the recipe's training.eval_batch_size.
        allow_unfinished: take the last checkpoint of a run that did not finish.
        ood: a file of texts unlike the training data: how well a classifier distinguishes them from the split's rows.
        shift: also measure the same rows with typos, words dropped, texts cut and in upper case, at three strengths.
    """
    from monteclora.evaluation.run import evaluate as measure
    from monteclora.tasks.local import looks_like_file

    files = [name for name in others if Path(name).is_file() or (looks_like_file(name) and not Path(name).is_dir())]
    if len(files) + (task is not None) > 1:
        raise ConfigError(f"{', '.join(files)}: more than one set of rows is given", "Give one file or one --task.")
    result = measure(
        [run, *(name for name in others if name not in files)],
        split,
        task=files[0] if files else task,
        sampler=sampler,
        calibrator=calibrator,
        num_samples=num_samples,
        seed=seed,
        layers=layers,
        base=base,
        rows=rows,
        batch_size=batch_size,
        allow_unfinished=allow_unfinished,
        ood=ood,
        shift=shift,
    )
    if as_json:
        print_json({"folder": result.folder, "split": result.split, "model": result.model, **result.facts()})
        return
    _print(result)


def _print(result: EvaluationResult) -> None:
    from monteclora.metrics.registry import METRICS
    from monteclora.runs.records import EVALUATION_FILE, PREDICTIONS_FILE

    state = f", unfinished: {result.unfinished}" if result.unfinished else ""
    title = f"{result.folder} on {result.split} ({result.source.rows:,} rows{state})"
    alone = "pretrained" if result.model == "base" else "first run alone" if result.members else "mean"
    by_name: dict[str, Mapping[str, float]] = {alone: result.point}
    if result.posterior is not None:
        draws = f"{result.num_samples} {'runs' if result.members else 'draws'}"
        by_name[f"{result.sampler}, {draws}"] = result.posterior
    if result.calibrator != "none":
        by_name = {f"{name} + {result.calibrator}": metrics for name, metrics in by_name.items()}
    shown = [metric for name, metric in METRICS.items() if name in result.point]
    rows = [[name, *(f"{metrics[m.name]:.3f}" for m in shown)] for name, metrics in by_name.items()]
    print_table(["", *(metric.label for metric in shown)], rows, title)
    _print_shift(result)
    _print_corrupted(result)
    print_line(f"written: {result.folder / EVALUATION_FILE}, {result.folder / PREDICTIONS_FILE}")
    for text in result.notes:
        note(text)


def _print_corrupted(result: EvaluationResult) -> None:
    from monteclora.evaluation.corrupted import TITLES
    from monteclora.metrics.registry import METRICS

    if not result.corrupted:
        return
    clean = {"title": "clean", "strength": "", "metrics": result.posterior or result.point}
    records = [clean] + [
        {
            "title": TITLES[each["corruption"]],
            "strength": each["strength"],
            "metrics": each["posterior"] or each["point"],
        }
        for each in result.corrupted
    ]
    shown = [metric for name, metric in METRICS.items() if name in result.point]
    rows = [[r["title"], str(r["strength"]), *(f"{r['metrics'][m.name]:.3f}" for m in shown)] for r in records]
    of = f"{result.sampler}, {result.num_samples} draws" if result.posterior else "mean"
    print_table(["rows", "strength", *(metric.label for metric in shown)], rows, f"the same rows corrupted ({of})")


def _print_shift(result: EvaluationResult) -> None:
    from monteclora.evaluation.error_detection import ERROR_SCORES
    from monteclora.evaluation.shift import COVERAGE, SCORES

    if result.error_detection is not None:
        by = ", ".join(f"{ERROR_SCORES[name]} {value:.3f}" for name, value in result.error_detection.items())
        print_line(f"AUROC of wrong against right answers by {by}")

    selective, ood = result.shift.selective, result.shift.ood
    if selective is not None:
        print_line(
            f"AURC {selective['aurc']:.4f} ({selective['aurc_excess']:.4f} above the best ranking), "
            f"accuracy at coverage {COVERAGE}: {selective[f'accuracy_at_{COVERAGE}']:.3f}"
        )
    if ood is not None:
        rows = [[SCORES[name], f"{of['auroc']:.3f}", f"{of['fpr95']:.3f}"] for name, of in ood["scores"].items()]
        print_table(["score", "AUROC", "FPR95"], rows, f"telling {ood['file']} ({ood['rows']:,} rows) from the split")
