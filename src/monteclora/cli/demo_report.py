"""What the demo measures of each run, and the page it makes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from sklearn.metrics import roc_auc_score

from monteclora.evaluation.result import EvaluationResult
from monteclora.evaluation.run import evaluate_loaded
from monteclora.prediction.predictions import Predictions
from monteclora.reports.formats import decimals
from monteclora.reports.page import Column, Page, Row, Section, Table
from monteclora.reports.results import FINISHED, Evaluation, Example, RunReport, Uncertainty
from monteclora.reports.run_report import environment_facts, training_curve
from monteclora.reports.runs import demo_page
from monteclora.runs.loading import load_run
from monteclora.runs.result import RunResult
from monteclora.runs.run_folder import RunFolder
from monteclora.tasks import helpdesk
from monteclora.tasks.classification import classify

__all__ = ["Contender", "contend", "demo_report"]

IN_SCOPE, AMBIGUOUS, OUT_OF_SCOPE = "in scope", "ambiguous", "out of scope"
_EXAMPLES = 12


@dataclass(frozen=True)
class Contender:
    """A run of the demo with what it predicts.

    Attributes:
        name: of the method, for people.
        run: as trained.
        evaluation: on the test messages.
        groups: predictions of messages in scope (the test messages), ambiguous and out of scope.
        texts: of each group.
        label_names: in the order of the classes.
    """

    name: str
    run: RunResult
    evaluation: EvaluationResult
    groups: Mapping[str, Predictions]
    texts: Mapping[str, Sequence[str]]
    label_names: Sequence[str]

    @property
    def metrics(self) -> Mapping[str, float]:
        """Under posterior draws where there is a posterior."""
        return self.evaluation.posterior or self.evaluation.point

    @property
    def detection(self) -> float:
        """How well total uncertainty tells messages out of scope from those in scope: area under the ROC curve."""
        return self.separation("total")

    def separation(self, uncertainty: str) -> float:
        """Likewise for the part of the uncertainty that is named."""
        inside, outside = (getattr(self.groups[group], uncertainty) for group in (IN_SCOPE, OUT_OF_SCOPE))
        labels = np.repeat([0, 1], [len(inside), len(outside)])
        return float(roc_auc_score(labels, np.concatenate([inside, outside])))

    def facts(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        return {
            "method": self.name,
            "folder": self.run.folder,
            **self.metrics,
            "auroc_out_of_scope": self.detection,
            "seconds": self.run.seconds,
            "peak_memory_bytes": self.run.peak_memory_bytes,
            "trained_parameters": self.run.trained_parameters,
        }


def contend(name: str, run: RunResult) -> Contender:
    """Predict the test messages, and those that no intent fits or two do."""
    loaded = load_run(run.folder)
    evaluation = evaluate_loaded(loaded, "test")
    predictions = evaluation.scored.predictions
    assert isinstance(predictions, Predictions)
    texts: dict[str, Sequence[str]] = {
        IN_SCOPE: list(evaluation.rows["text"]),
        AMBIGUOUS: [message.text for message in helpdesk.ambiguous()],
        OUT_OF_SCOPE: helpdesk.out_of_scope(),
    }
    predictor = loaded.predictor(loaded.sampler(seed=evaluation.seed))
    groups = {IN_SCOPE: predictions}
    for group in (AMBIGUOUS, OUT_OF_SCOPE):
        (groups[group],), _ = classify(predictor, Dataset.from_dict({"text": texts[group]}), predictor.samplers[-1:])
    return Contender(name, run, evaluation, groups, texts, loaded.label_names or ())


def demo_report(contenders: Sequence[Contender], commands: Sequence[str]) -> Page:
    """The page.

    Args:
        contenders: the first is what the others are measured against.
        commands: that make the page again.
    """
    first = contenders[0].run
    page = demo_page(
        [_report(contender) for contender in contenders],
        title="LoRA beside MonteCLoRA",
        subtitle="MiniLM learns which of twelve intents a customer's message has",
        compared=_compared(contenders),
        environment=environment_facts(RunFolder(first.folder)),
        reproduce=commands,
    )
    return dataclasses.replace(page, sections=[*page.sections, _detection(contenders)])


def _report(contender: Contender) -> RunReport:
    labels = contender.groups[IN_SCOPE].labels
    assert labels is not None
    return RunReport(
        name=contender.name,
        method=contender.name,
        status=FINISHED,
        evaluation=Evaluation.of(contender.groups[IN_SCOPE].probs, labels),
        training=training_curve(RunFolder(contender.run.folder)),
        uncertainty={group: Uncertainty(p.total, p.epistemic) for group, p in contender.groups.items()},
        uncertain_examples=_most_uncertain(contender),
        seconds=contender.run.seconds,
        peak_bytes=contender.run.peak_memory_bytes,
        trained_parameters=contender.run.trained_parameters,
        notes=contender.evaluation.notes,
    )


def _most_uncertain(contender: Contender) -> list[Example]:
    """Of all groups; an ambiguous message has both its labels, one out of scope none."""
    names = contender.label_names
    labels = contender.groups[IN_SCOPE].labels
    assert labels is not None
    right = {
        IN_SCOPE: [names[label] for label in labels],
        AMBIGUOUS: [" or ".join(message.labels) for message in helpdesk.ambiguous()],
        OUT_OF_SCOPE: [""] * len(contender.texts[OUT_OF_SCOPE]),
    }
    examples = [
        Example(text, label, names[int(probs.argmax())], float(probs.max()), float(total), float(epistemic))
        for group, found in contender.groups.items()
        for text, label, probs, total, epistemic in zip(
            contender.texts[group], right[group], found.probs, found.total, found.epistemic, strict=True
        )
    ]
    return sorted(examples, key=lambda example: -example.total)[:_EXAMPLES]


def _compared(contenders: Sequence[Contender]) -> list[str]:
    recipe = contenders[0].run.recipe
    training, count = recipe.training, contenders[0].evaluation.source.rows
    draws = max(contender.evaluation.num_samples for contender in contenders)
    groups = contenders[0].texts
    return [
        f"The bundled data set holds messages to the support desk of a software company. {count} test messages have "
        f"one of twelve intents (in scope). {len(groups[AMBIGUOUS])} more fit two intents equally well (ambiguous), "
        f"and {len(groups[OUT_OF_SCOPE])} fit none (out of scope); neither kind was seen in training.",
        f"Both runs start from the same weights and see the same batches: {training.epochs:g} epochs, batch size "
        f"{training.batch_size}, learning rate {training.learning_rate:g}, rank {getattr(recipe.method, 'r', None)}, "
        f"seed {recipe.seed}. They differ in the method alone.",
        f"LoRA predicts with its weights. MonteCLoRA predicts with the mean over {draws} draws from its posterior.",
    ]


def _detection(contenders: Sequence[Contender]) -> Section:
    """How well uncertainty tells what is out of scope."""
    rows = [
        Row(
            [
                contender.name,
                contender.separation("total"),
                contender.separation("epistemic") if contender.evaluation.num_samples else None,
            ]
        )
        for contender in contenders
    ]
    columns = [
        Column("Run"),
        Column("by total uncertainty", decimals(3)),
        Column("by epistemic uncertainty", decimals(3)),
    ]
    caption = "Area under the ROC curve of messages out of scope against messages in scope: 0.5 is chance, 1 perfect."
    return Section("Telling what is out of scope", tables=[Table(columns, rows, caption)])
