"""Predictions for a file of new rows, with how certain each is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from monteclora.config.checks import check_at_least_one
from monteclora.data.columns import listed
from monteclora.data.parts import open_files
from monteclora.data.truncation import Truncated
from monteclora.errors import ConfigError, DataError
from monteclora.evaluation.calibrators import fitted_calibrators
from monteclora.evaluation.laplace import prepare_sampler
from monteclora.evaluation.reference import Judge, promise
from monteclora.prediction.registry import NO_CALIBRATOR
from monteclora.prediction.sampler import MEAN
from monteclora.runs.ensemble import Runs, load_runs
from monteclora.runs.loading import LoadedRun
from monteclora.system.atomic import replacing
from monteclora.system.progress import progress_bar
from monteclora.system.quiet import quiet_libraries
from monteclora.tasks import load_inputs
from monteclora.tasks.base import Predicted, Predictor, TaskKind, TokenKind
from monteclora.tasks.kinds import KINDS
from monteclora.tasks.token_columns import check_answers

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["OUTPUT_COLUMNS", "OUTPUT_ENDINGS", "PredictedFile", "predict_file"]

OUTPUT_ENDINGS = (".parquet", ".jsonl")
OUTPUT_COLUMNS = frozenset(
    {
        *("index", "text", "text_pair", "prompt", "messages", "prediction", "completion", "next_token", "tools"),
        *("confidence", "probabilities", "total", "aleatoric", "epistemic", "novelty", "abstain"),
        *("tokens", "sequence", "answers", "answer", "agreement"),
        *("std", "low", "high", "label_total", "label_epistemic"),
    }
)
"""Every name that a column of the predictions can have, whatever the kind of task."""


@dataclass(frozen=True)
class PredictedFile:
    """What was written.

    Attributes:
        path: of the predictions.
        rows: how many.
        num_samples: draws of each, 0 for none.
        notes: what a reader of the predictions must know, in words.
        sampler: how they were made, by name.
        calibrator: what corrected their probabilities, by name.
    """

    path: Path
    rows: int
    num_samples: int
    notes: tuple[str, ...]
    sampler: str = MEAN.name
    calibrator: str = NO_CALIBRATOR


class _Writer(Protocol):
    def __call__(self, table: pa.Table) -> None: ...


def predict_file(
    run: Runs,
    file: str | Path,
    out: str | Path,
    *,
    sampler: str | None = None,
    calibrator: str | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    layers: int | None = None,
    max_new_tokens: int = 64,
    batch_size: int | None = None,
    keep: Sequence[str] = (),
    risk: float | None = None,
    level: float | None = None,
    tokens: bool = False,
    answers: int = 0,
    novelty: bool = True,
    progress: bool = True,
) -> PredictedFile:
    """Predict every row of a file.

    A classifier gives prediction, confidence and the probability of each label; and novelty and abstain, as
    :meth:`monteclora.evaluation.text.TextModel.predict` does: where they are left out, a note says why. A causal LM
    gives its greedy completion at the posterior's mean, the most likely next token after the prompt and its probability
    (confidence). Scores have a mean, a standard deviation and a 90 % interval; rows with several labels those that are
    more probable than not, with the probability and uncertainty of each. All give the prediction's total, aleatoric and
    epistemic uncertainty in nats; of scores, variances.

    Args:
        run: a run folder, or what ``train`` gave; several for the sampler ``ensemble``.
        file: csv, tsv, jsonl or Parquet with the columns of the run's texts; labels are not read.
        out: ``.parquet`` or ``.jsonl``; written at once when every row is predicted.
        sampler: of the draws, by name; by default ``posterior`` for a method that has one, else ``mean``.
        calibrator: ``temperature`` or ``none``, the default; fitted to the run's validation rows and stored with it.
        num_samples: draws; by default the recipe's number, 0 for the mean alone.
        seed: the stream of draws.
        layers: of the posterior's draws: the last adapted blocks that have noise; by default those that its scale was
            calibrated with, else the recipe's number, else all.
        max_new_tokens: the maximum number of tokens of a completion.
        batch_size: rows per forward pass; by default the recipe's ``training.eval_batch_size``.
        keep: columns of the file that are written as they are, after the index.
        risk: of a classifier: the largest acceptable share of wrong answers among those that are not abstained from; by
            default 0.1.
        level: with which probability; by default 0.9.
        tokens: of a causal LM: whether to write the columns ``tokens`` and ``sequence``, as
            :class:`monteclora.evaluation.text.TextPredictions` has them.
        answers: of a causal LM: this many draws write a completion each, into ``answers``, ``answer`` and
            ``agreement``.
        novelty: of a classifier: whether to write how novel each row is; of answers under draws it takes a forward pass
            more.
        progress: whether to draw a progress bar on standard error.

    Raises:
        CheckpointError: not a run, an unfinished one, or its adapter or what was stored with it is damaged.
        ConfigError: an argument does not fit the run, ``keep`` has a name of the predictions' own columns, or ``out``
            cannot be written.
        DataError: the file is missing or wrong.
    """
    target = _checked_target(Path(out), Path(file))
    check_at_least_one(max_new_tokens=max_new_tokens)
    _check_kept(keep)
    loaded = load_runs(run, sampler, num_samples)
    promised = promise(loaded, risk, level)
    rows, read = load_inputs(file, loaded.recipe.data, loaded.kind, loaded.columns)
    kept = _kept(file, keep)
    prepared = prepare_sampler(loaded, sampler, num_samples, progress=progress)
    kind, drawn = KINDS[loaded.kind], loaded.sampler(sampler, num_samples, seed, layers)
    _check_calibrated(calibrator, kind, loaded.folder)
    # refuses what it cannot do before anything is computed
    predict = _predicting(loaded, loaded.predictor(drawn, batch_size), max_new_tokens, tokens, answers)
    with quiet_libraries():
        calibrators, fitted = fitted_calibrators(loaded, calibrator, drawn, seed, batch_size)
        judge, left_out = (
            Judge.of(loaded, drawn, seed, *promised, bool(calibrators), with_novelty=novelty, batch_size=batch_size)
            if kind.has_classes
            else (None, ())
        )
    notes = [*read, *prepared, *fitted, *left_out]
    with (
        quiet_libraries(),
        replacing(target) as temporary,
        _writer(temporary, target.suffix) as write,
        progress_bar(f"{loaded.recipe.name}: {Path(file).name}", len(rows), progress) as advance,
    ):
        looks = judge is not None and judge.novelty is not None
        predictor, cut = loaded.predictor(drawn, batch_size, advance, calibrators, looks), list[Truncated]()
        for first in range(0, len(rows), kind.rows_at_once):
            chunk = rows.select(range(first, min(first + kind.rows_at_once, len(rows))))
            found = predict(predictor, chunk)
            cut.append(found.truncated)
            place = {"index": range(first, first + len(chunk)), **_slice(kept, first, len(chunk))}
            judged = judge.columns(found) if judge else {}
            write(pa.table({**place, **found.columns, **judged}))
    return PredictedFile(
        target,
        len(rows),
        drawn.num_samples if drawn else 0,
        (*notes, *reduce(add, cut).notes),
        drawn.name if drawn else MEAN.name,
        calibrator or NO_CALIBRATOR,
    )


def _predicting(
    loaded: LoadedRun, predictor: Predictor, max_new_tokens: int, tokens: bool, answers: int
) -> Callable[[Predictor, Dataset], Predicted]:
    """What predicts a part of the rows."""
    kind = KINDS[loaded.kind]
    if not (tokens or answers):
        return lambda predictor, rows: kind.predict(predictor, rows, max_new_tokens)
    if not isinstance(kind, TokenKind):
        asked = "tokens" if tokens else "answers"
        raise ConfigError(f"{asked} are of language models, and {loaded.folder} is a classifier", "Leave them out.")
    check_answers(predictor.samplers[-1], answers)
    more = partial(kind.predict_tokens, max_new_tokens=max_new_tokens, tokens=tokens, answers=answers)
    return lambda predictor, rows: more(predictor, rows)


def _check_calibrated(calibrator: str | None, kind: TaskKind, folder: Path) -> None:
    if calibrator not in (None, NO_CALIBRATOR) and kind.predicts_tokens:
        raise ConfigError(
            f"the calibrator {calibrator} needs probabilities of classes or options, and {folder} writes text",
            "Leave it out.",
        )


def _check_kept(keep: Sequence[str]) -> None:
    if isinstance(keep, str):
        raise ConfigError(f"keep is the text {keep!r}, expected a list of columns", f'Write ["{keep}"].')
    if clash := sorted(OUTPUT_COLUMNS.intersection(keep)):
        raise ConfigError(
            f"the predictions have a column {clash[0]!r} of their own", "Rename it in the file to keep it."
        )


def _kept(file: str | Path, keep: Sequence[str]) -> dict[str, pa.Array]:
    """The columns of a file that are passed through, a value for each row."""
    if not keep:
        return {}
    table = open_files(file)
    for name in keep:
        if name not in table.columns:
            raise DataError(f"{table.name} has no column {name!r}; it has {listed(table)}", "Keep one of these.")
    values: dict[str, list[Any]] = {name: [] for name in keep}
    for _, row in table.rows():
        for name, column in values.items():
            column.append(row.get(name))
    try:
        return {name: pa.array(column) for name, column in values.items()}
    except pa.ArrowException as error:
        raise DataError(
            f"{table.name} has a column of mixed types among {', '.join(keep)}: {error}", "Give one type."
        ) from None


def _slice(columns: dict[str, pa.Array], first: int, count: int) -> dict[str, pa.Array]:
    return {name: column.slice(first, count) for name, column in columns.items()}


def _checked_target(out: Path, file: Path) -> Path:
    if out.suffix not in OUTPUT_ENDINGS:
        raise ConfigError(f"cannot tell the format of {out}", f"Name it with one of {', '.join(OUTPUT_ENDINGS)}.")
    if out.is_dir():
        raise ConfigError(f"{out} is a folder", "Give the name of a file.")
    if out.exists() and file.exists() and out.samefile(file):
        raise ConfigError(f"{out} is the file to predict", "Choose another name for the predictions.")
    return out


@contextmanager
def _writer(path: Path, suffix: str) -> Iterator[_Writer]:
    """Appends tables to a file."""
    if suffix == ".jsonl":
        with path.open("w", encoding="utf-8") as file:
            yield lambda table: file.writelines(
                json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in table.to_pylist()
            )
        return
    opened: list[pq.ParquetWriter] = []

    def write(table: pa.Table) -> None:
        if not opened:
            opened.append(pq.ParquetWriter(path, table.schema))
        opened[0].write_table(table)

    try:
        yield write
    finally:
        for writer in opened:
            writer.close()
