"""``monteclora predict``."""

from __future__ import annotations

from pathlib import Path

from monteclora.cli.output import Json, note, print_json, print_line

__all__ = ["predict"]


def predict(
    run: str,
    file: Path,
    /,
    *,
    out: Path | None = None,
    sampler: str | None = None,
    calibrator: str | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    max_new_tokens: int = 64,
    batch_size: int | None = None,
    as_json: Json = False,
) -> None:
    """Predict every row of a file, and say how uncertain each prediction is.

    A classifier gives prediction, confidence and probabilities; a causal LM its completion and first token.
    Both give total, aleatoric and epistemic uncertainty in nats.

    Args:
        run: a run folder.
        file: csv, tsv, jsonl or Parquet with the columns of texts that the run was trained on.
        out: a .parquet or .jsonl file; by default the file's name with -predictions.parquet, in this folder.
        sampler: mean, posterior or mc_dropout; by default posterior for a method that has one, else mean.
        calibrator: temperature, fitted to the validation rows and stored with the run, or none, the default.
        num_samples: draws; by default the recipe's number, 0 for the mean alone.
        seed: of the draws.
        max_new_tokens: the most tokens of a completion.
        batch_size: rows a forward pass; by default the recipe's training.eval_batch_size.
    """
    from monteclora.evaluation.prediction import predict_file

    name = file.name.removesuffix(".gz")
    target = out or Path(f"{Path(name).stem}-predictions.parquet")
    found = predict_file(
        run,
        file,
        target,
        sampler=sampler,
        calibrator=calibrator,
        num_samples=num_samples,
        seed=seed,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    if as_json:
        print_json(
            {
                "path": found.path,
                "rows": found.rows,
                "sampler": found.sampler,
                "calibrator": found.calibrator,
                "num_samples": found.num_samples,
                "notes": list(found.notes),
            }
        )
        return
    how = f"{found.num_samples} {found.sampler} draws each" if found.num_samples else "no posterior draws"
    print_line(f"written: {found.path} ({found.rows:,} rows, {how})")
    for text in found.notes:
        note(text)
