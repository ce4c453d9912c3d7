"""``monteclora predict``."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from monteclora.cli.output import Flag, Json, note, print_json, print_line
from monteclora.errors import ConfigError, visible

if TYPE_CHECKING:
    from monteclora.evaluation.prediction import PredictedFile
    from monteclora.evaluation.text import TextPredictions

__all__ = ["predict"]


def predict(
    run: str,
    /,
    *others: str,
    text: Annotated[list[str] | None, Parameter(negative=())] = None,
    out: Path | None = None,
    keep: str | None = None,
    sampler: str | None = None,
    calibrator: str | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    layers: int | None = None,
    max_new_tokens: int = 64,
    batch_size: int | None = None,
    risk: float | None = None,
    level: float | None = None,
    tokens: Flag = False,
    answers: int = 0,
    without_novelty: Flag = False,
    page: Path | None = None,
    as_json: Json = False,
) -> None:
    """Predict every row of a file, or texts given here, and say how uncertain each prediction is.

    A classifier gives prediction, confidence and probabilities; a causal LM its completion and first token.
    Both give total, aleatoric and epistemic uncertainty in nats. A classifier also gives novelty, above 0 for a text
    unlike the training rows, and abstain, whether the answer is not to be relied on.

    Args:
        run: a run folder.
        others: the file: csv, tsv, jsonl or Parquet with the columns of texts that the run was trained on; before it,
            for the sampler ensemble, the folders of more runs.
        text: a text to predict instead of a file; repeat it for several. The answers are printed.
        out: a .parquet or .jsonl file; by default the file's name with -predictions.parquet, in this folder.
        keep: columns of the file to write beside the predictions, separated by commas: id,date.
        sampler: mean, posterior, mc_dropout, laplace or ensemble; by default posterior for a method that has one, else
            mean.
        calibrator: temperature, fitted to the validation rows and stored with the run, or none, the default.
        num_samples: draws; by default the recipe's number, 0 for the mean alone.
        seed: of the draws.
        layers: of a file: draw from the posterior in so many of the last adapted blocks alone, which costs less; by
            default those that its scale was calibrated with, else the recipe's number, else all.
        max_new_tokens: the maximum number of tokens of a completion.
        batch_size: rows per forward pass; by default the recipe's training.eval_batch_size.
        risk: the largest acceptable share of wrong answers among those a classifier does not abstain from; 0.1 by
            default.
        level: the probability with which that is promised; by default 0.9.
        tokens: write of each token of a causal LM's completion how probable and how uncertain it is.
        answers: have this many draws of a causal LM write a completion each, and say how far they agree.
        without_novelty: of a file: leave out novelty, which takes a forward pass more of each row under draws.
        page: with tokens, an .html file that shows the first texts with their tokens shaded by uncertainty.
    """
    if page is not None:
        _check_page(page, tokens)
    if text:
        only_files: dict[str, object] = {
            "page": page,
            "out": out,
            "keep": keep,
            "sampler": sampler,
            "calibrator": calibrator,
            "batch-size": batch_size,
            "layers": layers,
            "without-novelty": without_novelty or None,
        }
        _check_alone(others, [name for name, value in only_files.items() if value is not None])
        options = {"num_samples": num_samples, "seed": seed, "max_new_tokens": max_new_tokens, "answers": answers}
        _print_answers(run, text, options, risk, level, tokens, as_json)
        return
    if not others:
        raise ConfigError("there is nothing to predict", 'Give a file, or texts: --text "...".')
    *more, last = others
    file = Path(last)
    from monteclora.evaluation.prediction import predict_file

    name = file.name.removesuffix(".gz")
    target = out or Path(f"{Path(name).stem}-predictions.parquet")
    found = predict_file(
        [run, *more],
        file,
        target,
        sampler=sampler,
        calibrator=calibrator,
        num_samples=num_samples,
        seed=seed,
        layers=layers,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        keep=[column.strip() for column in keep.split(",")] if keep else (),
        risk=risk,
        level=level,
        tokens=tokens,
        answers=answers,
        novelty=not without_novelty,
    )
    if page is not None:
        from monteclora.reports.texts import write_text_page

        command = shlex.join(
            ["monteclora", "predict", run, *others, "--tokens", "--seed", str(seed), "--page", str(page)]
        )
        write_text_page(page, found.path, title=Path(run).name, command=command)
    _print_written(found, page, as_json)


def _print_written(found: PredictedFile, page: Path | None, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "path": found.path,
                "rows": found.rows,
                "sampler": found.sampler,
                "calibrator": found.calibrator,
                "num_samples": found.num_samples,
                "notes": list(found.notes),
                **({"page": page} if page else {}),
            }
        )
        return
    how = f"{found.num_samples} {found.sampler} draws each" if found.num_samples else "no posterior draws"
    print_line(f"written: {found.path} ({found.rows:,} rows, {how})")
    if page is not None:
        print_line(f"page: {page}")
    for words in found.notes:
        note(words)


def _check_page(page: Path, tokens: bool) -> None:
    if not tokens:
        raise ConfigError("--page shows tokens, and --tokens is not given", "Add --tokens.")
    if page.suffix != ".html" or page.is_dir():
        raise ConfigError(f"cannot write the page {page}", "Name it with .html.")


def _check_alone(others: Sequence[str], options: Sequence[str]) -> None:
    if others:
        raise ConfigError(f"both {' '.join(others)} and --text are given", "Give texts or a file, of one run.")
    if options:
        raise ConfigError(f"--{options[0]} is for a file, and --text is given", "Leave one of them out.")


def _print_answers(
    run: str,
    texts: Sequence[str],
    options: Mapping[str, Any],
    risk: float | None,
    level: float | None,
    tokens: bool,
    as_json: bool,
) -> None:
    from monteclora.evaluation.text import load

    model = load(run, risk=risk, level=level)
    found = model.predict(texts, **options)
    if tokens and found.tokens is None:
        raise ConfigError(f"{run} is a classifier, which writes no tokens", "Leave --tokens out.")
    if as_json:
        names = [{"texts": "text", "labels": "label"}.get(name, name) for name in found.to_dict()]
        answers = [dict(zip(names, values, strict=True)) for values in zip(*found.to_dict().values(), strict=True)]
        print_json({"answers": answers, "notes": list(found.notes)})
        return
    for index in range(len(found.texts)):
        print_line(_answer(found, index))
        for token in (found.tokens or [])[index] if tokens else ():
            print_line(_token(token))
    for words in found.notes:
        note(words)


def _answer(found: TextPredictions, index: int) -> str:
    """A text's answer in one line; a completion's line breaks are spaces."""
    if found.std is not None and found.low is not None and found.high is not None:
        parts = [
            f"{found.labels[index]:.4g}",
            f"standard deviation {found.std[index]:.3g} ({found.epistemic[index] ** 0.5:.3g} epistemic)",
            f"90 % within {found.low[index]:.4g} to {found.high[index]:.4g}",
        ]
        return ", ".join(parts)
    uncertainty = f"uncertainty {found.total[index]:.3f} nats ({found.epistemic[index]:.3f} epistemic)"
    if found.probabilities is not None:
        likely = [f"{name} {found.probabilities[index][name]:.3f}" for name in found.labels[index]]
        return ", ".join([*(likely or ["no label"]), uncertainty])
    assert found.confidence is not None
    label = visible(" ".join(found.labels[index].split()))
    parts = [label, f"confidence {found.confidence[index]:.3f}", uncertainty]
    if found.novelty is not None:
        parts.append(f"novelty {found.novelty[index]:+.2f}")
    if found.abstain is not None:
        parts.append("abstain" if found.abstain[index] else "answer")
    if found.agreement is not None:
        parts.append(f"agreement {found.agreement[index]:.2f}")
    return ", ".join(parts)


def _token(record: Mapping[str, Any]) -> str:
    """A token in one line, as Python writes a text, so that spaces show."""
    probability = f"log-probability {record['log_probability']:.3f}"
    uncertainty = f"uncertainty {record['total']:.3f} nats ({record['epistemic']:.4f} epistemic)"
    return f"  {record['text']!r:16} {probability}, {uncertainty}"
