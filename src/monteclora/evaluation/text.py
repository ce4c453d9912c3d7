"""Text in, answer out: ``monteclora.load(run).predict(["..."])``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from monteclora.errors import ConfigError
from monteclora.evaluation.reference import LEVEL, RISK, Judge, promise
from monteclora.prediction.sampler import Sampler
from monteclora.runs.adapter_folder import fetched, load_adapter_folder, run_of_adapter
from monteclora.runs.loading import LoadedRun, load_run
from monteclora.runs.result import RunResult
from monteclora.runs.run_folder import RunFolder
from monteclora.system.quiet import quiet_libraries
from monteclora.tasks import list_tasks
from monteclora.tasks.base import TokenKind
from monteclora.tasks.kinds import KINDS
from monteclora.tasks.local import is_hub_name

__all__ = ["TextModel", "TextPredictions", "load"]


Text = str | tuple[str, str]
"""What is answered: a text, or two that belong together."""


@dataclass(frozen=True)
class TextPredictions:
    """Answers to B texts, a list of B values each.

    Attributes:
        texts: as given, pairs as tuples.
        labels: the most probable label, the list of labels that are more probable than not, the mean of the score, or
            the greedy completion of a language model.
        confidence: probability of the label, or of a completion's first token; None for scores and for several labels.
        total, aleatoric, epistemic: uncertainty of the label or first token, nats; summed over several labels; of a
            score variances, in the square of its unit. Total is the sum of the others.
        novelty: above 0 where a text is less like the training rows than 95 % of the validation rows are; None for a
            run that is no classifier, and where the run's rows are gone.
        abstain: whether the answer is not to be relied on: its confidence is below the threshold of the promised risk.
            None likewise.
        notes: what was left out or shortened, in words.
        tokens: of a language model: a record for each token of the completion, with its ``text``, ``id``,
            ``log_probability`` and uncertainties, see :class:`monteclora.prediction.tokens.TokenScores`.
        sequence: likewise a record for the whole of it, see :class:`monteclora.prediction.tokens.SequenceScores`.
        answers: of as many draws as were asked for; None without.
        answer: the one on which most of them agree, by exact match after normalisation.
        agreement: the share of those that do.
        std: standard deviation of a score; None for labels and completions.
        low, high: ends of its 90 % interval; None likewise.
        probabilities: of several labels of a text, the probability of each by its name; None for other runs.
    """

    texts: list[Text]
    labels: list[Any]
    confidence: list[float] | None
    total: list[float]
    aleatoric: list[float]
    epistemic: list[float]
    novelty: list[float] | None
    abstain: list[bool] | None
    notes: tuple[str, ...] = ()
    tokens: list[list[dict[str, Any]]] | None = None
    sequence: list[dict[str, float]] | None = None
    answers: list[list[str]] | None = None
    answer: list[str] | None = None
    agreement: list[float] | None = None
    std: list[float] | None = None
    low: list[float] | None = None
    high: list[float] | None = None
    probabilities: list[dict[str, float]] | None = None

    def __repr__(self) -> str:
        columns = ", ".join(name for name in self.to_dict() if name not in ("texts", "labels"))
        return f"TextPredictions({len(self.texts)} texts: labels, {columns})"

    def to_dict(self) -> dict[str, Any]:
        """The columns by name, without those that are None."""
        columns = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "notes"}
        return {name: list(values) for name, values in columns.items() if values is not None}

    def to_arrow(self) -> pa.Table:
        """Likewise, as a table of Arrow."""
        return pa.table(self.to_dict())


@dataclass(frozen=True)
class TextModel:
    """A trained run, or an adapter, that answers texts.

    Attributes:
        run: as loaded.
        risk: the largest acceptable share of wrong answers among those that are not abstained from.
        level: with which probability; see :func:`monteclora.metrics.selective.abstention_threshold`.
        notes: what was taken for granted of an adapter, in words.
    """

    run: LoadedRun
    risk: float = RISK
    level: float = LEVEL
    notes: tuple[str, ...] = ()
    # what judges the answers of a sampler: weights in memory do not change, so that it is looked up once
    _judges: dict[tuple[Sampler | None, int], tuple[Judge | None, tuple[str, ...]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __repr__(self) -> str:
        return f"TextModel({self.run.folder})"

    def predict(
        self,
        texts: Sequence[Text],
        *,
        num_samples: int | None = None,
        seed: int = 0,
        max_new_tokens: int = 64,
        completions: Sequence[str] | None = None,
        answers: int = 0,
    ) -> TextPredictions:
        """Answer texts.

        The first call for a classifier measures the run's training and validation rows, and stores what novelty and
        abstention need beside the run. Where these rows are gone or changed, both are None, and a note says so. Later
        calls take what the first one found.

        Args:
            texts: at least one, in a list or anything else in an order; prompts for a language model; of a classifier
                of pairs a tuple (or list) of two texts each, in the order of ``data.text_columns``.
            num_samples: posterior draws; by default the recipe's number, and 0 for a method without a posterior.
            seed: their stream.
            max_new_tokens: most tokens of a completion.
            completions: of a language model: what each text is completed with, in place of what the model writes.
            answers: of a language model: this many draws write a completion each.

        Raises:
            ConfigError: ``texts`` is no list of what the run reads, or an argument does not fit the run.
            CheckpointError: what was stored beside the run is damaged.
        """
        kind = KINDS[self.run.kind]
        texts = _listed(texts)
        columns_of_texts = _checked(self.run, texts)
        given = _completions(self.run, len(texts), completions, answers)
        sampler = self.run.sampler(num_samples=num_samples, seed=seed)
        rows = Dataset.from_dict({**columns_of_texts, **given})
        with quiet_libraries():
            judge, left_out = self._judge(sampler, seed) if kind.has_classes else (None, ())
            predictor = self.run.predictor(sampler, looks=judge is not None and judge.novelty is not None)
            if isinstance(kind, TokenKind):
                answered = kind.predict_tokens(predictor, rows, max_new_tokens, answers=answers, given=bool(given))
            else:
                answered = kind.predict(predictor, rows, max_new_tokens)
            columns, notes = answered.columns, (*answered.notes, *left_out)
            judged = judge.columns(answered) if judge else {}
        names = ("confidence", "total", "aleatoric", "epistemic", "std", "low", "high")
        numbers = {name: np.asarray(columns[name]).tolist() for name in names if name in columns}
        labels = columns["completion" if kind.predicts_tokens else "prediction"]
        by_label = columns["probabilities"].to_pylist() if "label_total" in columns else None
        return TextPredictions(
            texts,
            labels.to_pylist() if isinstance(labels, pa.Array) else np.asarray(labels).tolist(),
            **{"confidence": None, **numbers},
            probabilities=by_label,
            novelty=judged.get("novelty"),
            abstain=judged.get("abstain"),
            notes=notes,
            tokens=columns.get("tokens"),
            sequence=columns.get("sequence"),
            answers=columns.get("answers"),
            answer=columns.get("answer"),
            agreement=columns.get("agreement"),
        )

    def _judge(self, sampler: Sampler | None, seed: int) -> tuple[Judge | None, tuple[str, ...]]:
        key = (sampler, seed)
        if key not in self._judges:
            self._judges[key] = Judge.of(self.run, sampler, seed, self.risk, self.level)
        return self._judges[key]


def _completions(run: LoadedRun, count: int, completions: Sequence[str] | None, answers: int) -> dict[str, list[str]]:
    """The column of given completions, if there are any."""
    asked = [name for name, value in (("completions", completions), ("answers", answers)) if value]
    if asked and not KINDS[run.kind].predicts_tokens:
        raise ConfigError(f"{asked[0]} are of language models, and {run.folder} is a classifier", "Leave them out.")
    if completions is None:
        return {}
    listed = isinstance(completions, Sequence) and not isinstance(completions, str)
    if not listed or len(completions) != count or not all(isinstance(each, str) for each in completions):
        raise ConfigError(f"completions has to be a list of {count} texts, one for each", "Give as many.")
    return {"completion": list(completions)}


def _no_texts() -> ConfigError:
    return ConfigError("predict takes a list of one text or more, none of them empty", 'Write ["a text"].')


def _listed(texts: Any) -> list[Text]:
    """Texts as a list, pairs as tuples. Raises ConfigError for what holds no texts, or holds them in no order."""
    one_by_one = isinstance(texts, Iterable) and not isinstance(texts, str | bytes | Mapping | Set)
    if not one_by_one or getattr(texts, "ndim", 1) != 1:  # a table of pandas would give the names of its columns
        raise _no_texts()
    return [tuple(text) if isinstance(text, list) else text for text in texts]


def _checked(run: LoadedRun, texts: Sequence[Text]) -> dict[str, list[str]]:
    """The columns of texts that the run reads. Raises ConfigError where what was given is something else."""
    words = [part for text in texts for part in (text if isinstance(text, tuple) else [text])]
    if not words or not all(isinstance(word, str) and word.strip() for word in words):
        raise _no_texts()
    pairs = [text for text in texts if isinstance(text, tuple)]
    if KINDS[run.kind].predicts_tokens:
        if pairs:
            raise ConfigError(f"{run.folder} is a language model, and a pair of texts was given", "Give prompts.")
        return {"prompt": words}
    read = _text_columns(run)  # none where nobody wrote them down: either is taken
    if len(read) == 2 and len(pairs) < len(texts):
        raise ConfigError(
            f"{run.folder} reads pairs of texts ({', '.join(read)}), and single ones were given",
            'Write [("a text", "another")].',
        )
    if pairs and (len(read) == 1 or len(pairs) < len(texts) or any(len(pair) != 2 for pair in pairs)):
        wrong = f"reads single texts ({read[0]})" if len(read) == 1 else "reads single texts, or two each"
        raise ConfigError(f"{run.folder} {wrong}, and something else was given", 'Write ["a text", "another"].')
    if pairs:
        return {"text": [pair[0] for pair in pairs], "text_pair": [pair[1] for pair in pairs]}
    return {"text": words}


def _text_columns(run: LoadedRun) -> tuple[str, ...]:
    """Those that a classifier was trained on, as far as they were written down."""
    if run.columns is not None:
        return run.columns.text
    spec, tasks = run.recipe.data, {task.name: task.text_columns for task in list_tasks()}
    return tasks.get(spec.task or "", tuple(spec.text_columns))


def load(
    run: str | Path | RunResult, *, base: str | None = None, risk: float | None = None, level: float | None = None
) -> TextModel:
    """Load a run, or an adapter, that answers texts.

    Args:
        run: a run folder, what ``train`` gave, a folder that holds an adapter, or the name of one on the hub.
        base: of an adapter: the model it belongs on; by default the one that its files name. The model's ``notes`` say
            what was found.
        risk: of a classifier: the largest acceptable share of wrong answers among those that are not abstained from; by
            default 0.1.
        level: with which probability; by default 0.9.

    Raises:
        CheckpointError: neither a run nor an adapter, an unfinished run, or files are damaged.
        ConfigError: ``risk`` or ``level`` is out of range, or is given for a language model; no base model is known, or
            one is given for a run.
    """
    loaded, notes = _loaded(run.folder if isinstance(run, RunResult) else run, base)
    return TextModel(loaded, *promise(loaded, risk, level), notes)


def _loaded(source: str | Path, base: str | None) -> tuple[LoadedRun, tuple[str, ...]]:
    folder = Path(source)
    if not folder.exists() and is_hub_name(str(source)):
        folder = fetched(str(source))
    is_run = (folder / "recipe.yaml").is_file()
    if not is_run and RunFolder(folder).is_adapter:
        run = run_of_adapter(folder)
        if run is None or base is not None:
            return load_adapter_folder(folder, base)
        return load_run(run), (f"{folder} is the adapter of the run {run}, which is loaded",)
    if base is not None:
        raise ConfigError(f"base is {base}, and {folder} is no adapter without a run", "Leave it out.")
    return load_run(folder), ()
