"""Whether scores of written answers tell wrong ones from right ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from datasets import Dataset

from monteclora.evaluation.error_detection import detected
from monteclora.tasks.token_columns import given_texts, token_scores

if TYPE_CHECKING:
    from monteclora.evaluation.answers import Slot
    from monteclora.tasks.base import Predictor
    from monteclora.tasks.generation import Problem, Verdict

__all__ = ["ANSWER_SCORES", "errors_told"]

ANSWER_SCORES: Mapping[str, str] = {
    "mean_log_probability": "mean log-probability",
    "mean_total": "mean token entropy",
    "max_total": "largest token entropy",
    "sum_total": "summed token entropy",
    "mean_epistemic": "mean mutual information",
    "max_epistemic": "largest mutual information",
    "sum_epistemic": "summed mutual information",
}
"""What may tell wrong answers, by the name that :class:`~monteclora.prediction.tokens.SequenceScores` has."""


def errors_told(
    predictor: Predictor,
    problems: Sequence[Problem],
    texts: Mapping[Slot, str],
    verdicts: Mapping[Slot, Verdict],
) -> tuple[Mapping[str, Mapping[str, float]], tuple[str, ...]]:
    """The AUROC of wrong against right answers by scores of their tokens, for each criterion.

    The first answer to each question is read again, token by token, under the predictor's last sampler. Without draws
    there is no mutual information.

    Args:
        predictor: its ``max_length`` bounds a question with its answer.
        problems: the questions.
        texts: the answers.
        verdicts: of them.

    Returns:
        By criterion and score; a criterion by which all are right or all wrong is left out. And what was left out, in
        words.
    """
    slots = [(number, 0, 0) for number in range(len(problems)) if texts[number, 0, 0].strip()]
    empty = len(problems) - len(slots)
    notes = [f"{empty} of {len(problems)} answers are empty and have no scores"] if empty else []
    found: dict[str, Mapping[str, float]] = {}
    if slots:
        rows = Dataset.from_dict(
            {"prompt": [problems[slot[0]].prompt for slot in slots], "completion": [texts[slot] for slot in slots]}
        )
        read, cut = given_texts(predictor, rows)
        with predictor.precision():
            sequences = [each.sequence() for each in token_scores(predictor, read)]
        drawn = predictor.samplers[-1].num_samples > 1
        names = [name for name in ANSWER_SCORES if drawn or "epistemic" not in name]
        signs = {"mean_log_probability": -1.0}
        scores = {name: [signs.get(name, 1.0) * getattr(sequence, name) for sequence in sequences] for name in names}
        for criterion in next(iter(verdicts.values())).correct:
            told = detected(np.array([verdicts[slot].correct[criterion] for slot in slots]), scores)
            if told is not None:
                found[criterion] = told
        notes += cut.notes
    if not found:
        notes.append("all answers are right, or all are wrong: nothing can tell them apart")
    return found, tuple(notes)
