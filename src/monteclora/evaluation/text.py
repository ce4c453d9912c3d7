"""Text in, answer out: ``monteclora.load(run).predict(["..."])``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from monteclora.errors import ConfigError
from monteclora.evaluation.reference import abstention_of, novelty_of, see
from monteclora.runs.loading import LoadedRun, load_run
from monteclora.runs.result import RunResult
from monteclora.system.quiet import quiet_libraries
from monteclora.tasks.kinds import KINDS

__all__ = ["TextModel", "TextPredictions", "load"]


@dataclass(frozen=True)
class TextPredictions:
    """Answers to B texts, a list of B values each.

    Attributes:
        texts: as given.
        labels: the most probable label, or the greedy completion of a language model.
        confidence: probability of the label, or of a completion's first token.
        total, aleatoric, epistemic: uncertainty of the label or first token, nats; total is the sum of the others.
        novelty: above 0 where a text is less like the training rows than 95 % of the validation rows are; None for a
            language model.
        abstain: whether the answer is not to be relied on: its confidence is below the threshold of the promised risk.
            None for a language model.
    """

    texts: list[str]
    labels: list[str]
    confidence: list[float]
    total: list[float]
    aleatoric: list[float]
    epistemic: list[float]
    novelty: list[float] | None
    abstain: list[bool] | None

    def to_dict(self) -> dict[str, Any]:
        """The columns by name, without those that are None."""
        return {name: values for name, values in asdict(self).items() if values is not None}

    def to_arrow(self) -> pa.Table:
        """Likewise, as a table of Arrow."""
        return pa.table(self.to_dict())


@dataclass(frozen=True)
class TextModel:
    """A trained run that answers texts.

    Attributes:
        run: as loaded.
        risk: the share of wrong answers wanted among those that are not abstained from, at most.
        level: with which probability; see :func:`monteclora.metrics.selective.abstention_threshold`.
    """

    run: LoadedRun
    risk: float = 0.1
    level: float = 0.9

    def predict(
        self, texts: Sequence[str], *, num_samples: int | None = None, seed: int = 0, max_new_tokens: int = 64
    ) -> TextPredictions:
        """Answer texts.

        The first call for a classifier measures the run's training and validation rows, and stores what novelty and
        abstention need beside the run.

        Args:
            texts: at least one; prompts for a language model.
            num_samples: posterior draws; by default the recipe's number, and 0 for a method without a posterior.
            seed: their stream.
            max_new_tokens: most tokens of a completion.

        Raises:
            ConfigError: ``texts`` is no list of texts, or an argument does not fit the run.
            DataError: the rows that novelty and abstention are measured on are gone.
        """
        if isinstance(texts, str) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ConfigError("predict takes a list of one text or more, none of them empty", 'Write ["a text"].')
        sampler = self.run.sampler(num_samples=num_samples, seed=seed)
        kind = KINDS[self.run.kind]
        rows = Dataset.from_dict({"prompt" if kind.predicts_tokens else "text": list(texts)})
        with quiet_libraries():
            columns = kind.predict(self.run.predictor(sampler), rows, max_new_tokens).columns
            novelty = abstain = None
            if not kind.predicts_tokens:
                novelty = novelty_of(self.run).of(see(self.run, rows)).tolist()
                promise = abstention_of(self.run, sampler, seed, self.risk, self.level)
                abstain = promise.abstains(columns["confidence"]).tolist()
        numbers = {
            name: np.asarray(columns[name]).tolist() for name in ("confidence", "total", "aleatoric", "epistemic")
        }
        labels = columns["completion" if kind.predicts_tokens else "prediction"]
        return TextPredictions(list(texts), list(labels), **numbers, novelty=novelty, abstain=abstain)


def load(run: str | Path | RunResult, *, risk: float = 0.1, level: float = 0.9) -> TextModel:
    """Load a run that answers texts.

    Args:
        run: a run folder, or what ``train`` gave.
        risk: the share of wrong answers wanted among those that are not abstained from, at most.
        level: with which probability.

    Raises:
        CheckpointError: not a run, an unfinished one, or its adapter is damaged.
    """
    return TextModel(load_run(run.folder if isinstance(run, RunResult) else run), risk, level)
