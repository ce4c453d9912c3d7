"""What became of a run, in words: whether it learned, overfits, is calibrated, was worth it, and what to do next."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

import numpy as np

from monteclora.errors import DataError
from monteclora.evaluation.baseline import frozen_baseline
from monteclora.evaluation.own_rows import FIT_SPLIT, own_rows
from monteclora.runs.data_facts import data_facts
from monteclora.runs.loading import check_finished, load_run
from monteclora.runs.run_folder import RunFolder

__all__ = ["Verdict", "verdict"]

_HARDLY = 0.95  # of the NLL without skill: a run above it has hardly learned
_ECE = 0.2
_WORSE = 1.02  # an NLL by this factor above the best one is worse


@dataclass(frozen=True)
class Verdict:
    """Findings on the validation rows.

    Attributes:
        findings: what was found, a sentence each.
        warnings: what is wrong, each with what to do about it.
    """

    findings: tuple[str, ...]
    warnings: tuple[str, ...]


def verdict(folder: Path) -> Verdict:
    """Judge a finished run by its own validation rows.

    A classifier of at most 3,000 training rows is compared with a logistic regression on the pretrained model's
    features, which costs one forward pass over the rows.

    Raises:
        CheckpointError: not a finished run, or a damaged one.
    """
    run = RunFolder.existing(folder)
    check_finished(run)
    metrics = (run.finished or {})["metrics"]
    findings: list[str] = []
    warnings: list[str] = []
    if "nll" not in metrics:
        return Verdict((), ("there are no validation rows: nothing says whether it learned or overfits",))
    if data_facts(run).kind == "classification":
        _skill(run, metrics, findings, warnings)
    _curve(run, findings, warnings)
    _calibration(run, metrics, findings, warnings)
    return Verdict(tuple(findings), tuple(warnings))


def _skill(run: RunFolder, metrics: Mapping[str, float], findings: list[str], warnings: list[str]) -> None:
    """Against the class frequencies, and against the pretrained model's features."""
    loaded = load_run(run.path)
    try:
        labels = np.array(own_rows(loaded, FIT_SPLIT).split(FIT_SPLIT)["label"])
        baseline = frozen_baseline(loaded)
    except DataError as error:
        findings.append(f"not compared with chance: {error}")
        return
    shares = np.bincount(labels) / len(labels)
    chance = float(-(shares[shares > 0] * np.log(shares[shares > 0])).sum())
    against = f"validation NLL {metrics['nll']:.3f}, class frequencies alone {chance:.3f}"
    accuracy = f"accuracy {metrics['accuracy']:.3f}, the largest class alone {shares.max():.3f}"
    findings.append(f"{against}; {accuracy} ({len(labels)} rows)")
    if metrics["nll"] > _HARDLY * chance:
        rate, epochs = run.recipe.training.learning_rate, run.recipe.training.epochs
        warnings.append(
            f"it has hardly learned: raise training.learning_rate (now {rate}) or training.epochs (now {epochs:g})"
        )
    if baseline is None:
        return
    text = f"NLL {baseline['nll']:.3f}, accuracy {baseline['accuracy']:.3f}"
    if baseline["nll"] < metrics["nll"]:
        warnings.append(
            f"fine-tuning is not worth it as it is: a logistic regression on the pretrained model's features has "
            f"{text} on the same rows. More rows, or another rate and number of epochs, may change that"
        )
    else:
        findings.append(f"a logistic regression on the pretrained model's features has {text}")


def _curve(run: RunFolder, findings: list[str], warnings: list[str]) -> None:
    """Over- or underfitted, by the validation NLL of each evaluation."""
    evaluations = [event for event in run.metrics.read() if event["event"] == "eval" and "nll" in event]
    if len(evaluations) < 2:
        return
    values = [event["nll"] if math.isfinite(event["nll"]) else math.inf for event in evaluations]
    best = int(np.argmin(values))
    at = f"step {evaluations[best]['step']}"
    kept = (run.finished or {})["kept_step"]
    if values[-1] > _WORSE * values[best]:
        text = f"it overfits after {at}: validation NLL rises from {values[best]:.3f} to {values[-1]:.3f}"
        if kept == evaluations[best]["step"]:
            findings.append(f"{text}; the weights of {at} are kept")
        else:
            warnings.append(f"{text}, and the weights of step {kept} are kept: set training.best_metric to nll")
    elif best == len(values) - 1 and values[0] > _WORSE * values[best]:
        findings.append("validation NLL was still falling at the end: more epochs may help")
    else:
        findings.append(f"validation NLL was best at {at}, and levels off")
    if best == 0:
        rate = run.recipe.training.learning_rate
        warnings.append(f"the first evaluation was the best: lower training.learning_rate (now {rate})")


def _calibration(run: RunFolder, metrics: Mapping[str, float], findings: list[str], warnings: list[str]) -> None:
    if "ece" not in metrics:
        return
    if metrics["ece"] > _ECE:
        warnings.append(
            f"its confidences are wrong by {metrics['ece']:.2f} on average (ECE): "
            f"monteclora calibrate {quote(str(run.path))} --temperature"
        )
    else:
        findings.append(f"its confidences are wrong by {metrics['ece']:.2f} on average (ECE)")
