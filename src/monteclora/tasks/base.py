"""The kinds of task: what a model needs for each, and how each is scored and predicted.

A kind knows its head, its rows and its metrics, so that training, evaluation and the command line need not ask which
kind a task is of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from monteclora.data.encoding import encode
from monteclora.data.kinds import Kind
from monteclora.data.scores import ScoreScale
from monteclora.data.truncation import Truncated, Truncation
from monteclora.metrics.registry import Scoring, measure
from monteclora.prediction.calibrator import Calibrator
from monteclora.prediction.completions import CompletionScores
from monteclora.prediction.forward import Collate
from monteclora.prediction.labels import LabelPredictions
from monteclora.prediction.novelty import Seen
from monteclora.prediction.predictions import Predictions
from monteclora.prediction.sampler import MEAN, Sampler
from monteclora.prediction.scores import ScorePredictions
from monteclora.system.progress import Progress

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from monteclora.tasks.loading import TaskData
    from monteclora.tasks.measures import Measures
    from monteclora.tasks.weights import ClassWeights

__all__ = ["AnyPredictions", "Predicted", "Predictor", "Scored", "TaskKind", "TextKind", "TokenKind"]

AnyPredictions = Predictions | CompletionScores | ScorePredictions | LabelPredictions
"""Of classes or options, completions, scores, or several labels; each has uncertainties of its rows."""

T = TypeVar("T")


@dataclass(frozen=True)
class Predictor:
    """A model that is ready to predict, and how it is to.

    Attributes:
        model: in evaluation mode.
        tokenizer: the model's.
        collate: pads a list of encoded rows to a batch.
        max_length: most tokens of a row.
        truncation: of longer rows with completions; rows are scored even where training left them out.
        label_names: in the order of the classes; empty where there are none.
        precision: a context in which the matmuls have the precision that the model was trained with.
        batch_size: sequences per forward pass.
        bins: of the calibration error.
        posterior: how draws are made, whatever they are draws of; None for predictions at the mean alone.
        progress: called with the number of rows done, by each sampler.
        calibrators: of class, option and label probabilities, by the name of the sampler that they were fitted for.
        at_mean: keeps what is predicted at the mean, for predictors that score the same rows under other draws; None
            keeps nothing.
        scale: on which scores were learned; None for other kinds.
        looks: whether predictions of classes at the mean keep what their forward passes show of each row.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    collate: Collate
    max_length: int
    label_names: Sequence[str]
    precision: Callable[[], AbstractContextManager[Any]]
    batch_size: int
    bins: int
    posterior: Sampler | None = None
    progress: Progress | None = None
    truncation: Truncation = "prompt_start"
    calibrators: Mapping[str, Calibrator] = field(default_factory=dict)
    at_mean: list[Any] | None = None
    scale: ScoreScale | None = None
    looks: bool = False

    @property
    def samplers(self) -> tuple[Sampler, ...]:
        """The mean, then the draws if there are any."""
        return (MEAN,) if self.posterior is None else (MEAN, self.posterior)

    def calibrated(self, found: Predictions, sampler: Sampler) -> Predictions:
        """Predictions of a sampler, corrected where there is a calibrator for it."""
        calibrator = self.calibrators.get(sampler.name)
        return found if calibrator is None else calibrator.apply(found)

    def once(self, sampler: Sampler, predict: Callable[[Sampler], T]) -> T:
        """What ``predict`` gives for a sampler; that of the mean is kept in ``at_mean``, where there is such a list."""
        if sampler is not MEAN or self.at_mean is None:
            return predict(sampler)
        if not self.at_mean:
            self.at_mean.append(predict(sampler))
        found: T = self.at_mean[0]
        return found

    def arguments(self) -> dict[str, Any]:
        """What every function of ``prediction`` takes besides model, rows and sampler."""
        return {"collate": self.collate, "batch_size": self.batch_size, "progress": self.progress}


@dataclass(frozen=True)
class Scored:
    """Predictions of labelled rows with what they are worth.

    Attributes:
        point: metrics by name at the mean.
        posterior: likewise under the mean over draws; None without draws.
        predictions: of the rows in their order, under draws where there are any.
        at_mean: likewise, at the mean.
        table: a row for each, without its place in the split.
        notes: what was truncated, in words.
    """

    point: Mapping[str, float]
    posterior: Mapping[str, float] | None
    predictions: AnyPredictions
    at_mean: AnyPredictions
    table: pa.Table
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Predicted:
    """Predictions of rows without labels.

    Attributes:
        columns: by name.
        truncated: what was.
        inputs: the rows in tokens, where they have classes.
        seen: what the predictions' own forward passes show of the rows, where the predictor looked.
    """

    columns: Mapping[str, Any]
    truncated: Truncated
    inputs: Sequence[dict[str, Any]] | None = None
    seen: Seen | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What was truncated, in words."""
        return self.truncated.notes


class TaskKind(Protocol):
    """What is the same for all tasks of a kind."""

    name: Kind
    auto_class: str
    """The class of transformers that puts the right head on a model."""
    peft_task: str
    """What peft calls the kind."""
    has_pretrained_head: bool
    """Whether the pretrained model can be scored before any training."""
    predicts_tokens: bool
    """Whether there are logits over the vocabulary for every token."""
    has_classes: bool
    """Whether a row has one of some labels, so that an answer is right or wrong and has a confidence."""
    can_be_calibrated: bool
    """Whether rows can have probabilities of classes, options or labels, which a calibrator corrects."""
    rows_at_once: int
    """How many rows' predictions are kept in memory before they are written."""

    def measures(self, data: TaskData, weights: ClassWeights | None = None) -> Measures:
        """What is learned, with the weights of labels, and what validation measures in training.

        Raises:
            ConfigError: weights are given that the labels do not have.
        """
        ...

    def outputs(self, label_names: Sequence[str] | None) -> tuple[str, ...] | None:
        """What the head's outputs are, for these labels; None where the model keeps its own head."""
        ...

    def to_learn(self, rows: Dataset, data: TaskData) -> Dataset:
        """The rows with ``label`` as it is learned."""
        ...

    def shown(self, label: Any, data: TaskData) -> str | None:
        """What is learned of a row, for people; None where it is some of its tokens."""
        ...

    def accepts(self, label_names: Any) -> bool:
        """Whether these are the labels, or their absence, that a run of the kind has on disk."""
        ...

    def scorings(self, rows: Dataset) -> tuple[Scoring, ...]:
        """What :meth:`score` measures of such rows."""
        ...

    def score(self, predictor: Predictor, rows: Dataset) -> Scored:
        """Predict and measure labelled rows. Raises DataError for a row that cannot be scored."""
        ...

    def predict(self, predictor: Predictor, rows: Dataset, max_new_tokens: int) -> Predicted:
        """Predict rows without labels."""
        ...


@runtime_checkable
class TokenKind(Protocol):
    """A kind whose predictions are texts, with something to say of each of their tokens."""

    def predict_tokens(
        self,
        predictor: Predictor,
        rows: Dataset,
        max_new_tokens: int,
        *,
        tokens: bool = True,
        answers: int = 0,
        given: bool = False,
    ) -> Predicted:
        """Predict rows as :meth:`TaskKind.predict` does, with more columns.

        Args:
            predictor: how.
            rows: to predict.
            max_new_tokens: most tokens of a generated completion.
            tokens: whether to add the columns ``tokens`` and ``sequence``.
            answers: how many draws write an answer of their own, into ``answers``, ``answer`` and ``agreement``.
            given: whether the rows' column ``completion`` is read in place of what the model writes.

        Raises:
            ConfigError: there are fewer draws than ``answers``.
        """
        ...


class TextKind:
    """What is the same for all kinds whose rows are texts; see :class:`TaskKind`."""

    auto_class = "AutoModelForSequenceClassification"
    peft_task = "SEQ_CLS"
    has_pretrained_head = False
    predicts_tokens = False
    has_classes = False
    can_be_calibrated = True
    rows_at_once = 1024

    def outputs(self, label_names: Sequence[str] | None) -> tuple[str, ...] | None:
        """One for each label."""
        return tuple(label_names or ())

    def to_learn(self, rows: Dataset, data: TaskData) -> Dataset:
        """As they are."""
        return rows

    def accepts(self, label_names: Any) -> bool:
        """Two different names or more."""
        return len(set(label_names)) == len(label_names) >= 2 and all(isinstance(name, str) for name in label_names)


def scored(
    predictor: Predictor,
    scoring: Scoring,
    found: Sequence[Predictions],
    labels: NDArray[np.int64],
    columns: Mapping[str, Any],
    cut: Truncated,
) -> Scored:
    """The metrics of class or option probabilities, at the mean (the first of ``found``) and under draws (the second).

    Args:
        predictor: made the predictions.
        scoring: ``classes`` or ``options``.
        found: for each of the predictor's samplers.
        labels: shape (B,).
        columns: of the table, without the uncertainties.
        cut: what was truncated.
    """
    metrics = [measure(scoring, each.probs, labels, bins=predictor.bins) for each in found]
    labelled = [replace(each, labels=labels) for each in found]
    return Scored(
        point=metrics[0],
        posterior=metrics[1] if len(metrics) > 1 else None,
        predictions=labelled[-1],
        at_mean=labelled[0],
        table=pa.table({**columns, **uncertainties(found[-1])}),
        notes=cut.notes,
    )


def encoded_texts(rows: Dataset, predictor: Predictor) -> tuple[list[dict[str, Any]], Truncated]:
    """Rows of texts in tokens, without labels, and what was truncated."""
    unlabelled = rows.remove_columns("label") if "label" in rows.column_names else rows
    encoded = encode(unlabelled, "classification", predictor.tokenizer, predictor.max_length)
    return encoded.dataset.to_list(), Truncated(encoded.shortened, len(rows), "rows", predictor.max_length)


def texts_of(rows: Dataset) -> dict[str, Any]:
    """The columns of texts."""
    return {name: rows[name][:] for name in ("text", "text_pair") if name in rows.column_names}


def uncertainties(found: AnyPredictions) -> dict[str, NDArray[np.float64]]:
    """Total, aleatoric and epistemic uncertainty of each row: nats; of scores variances, in their unit squared."""
    return {name: getattr(found, name) for name in ("total", "aleatoric", "epistemic")}
