"""What became of a run, in words: whether it learned, overfits, is calibrated, was worth it, and what to do next."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import torch

from monteclora.data.kinds import Kind
from monteclora.errors import DataError
from monteclora.evaluation.baseline import allow_baseline, frozen_baseline
from monteclora.evaluation.own_rows import FIT_SPLIT, own_rows
from monteclora.metrics.registry import METRICS
from monteclora.runs.data_facts import data_facts
from monteclora.runs.loading import check_finished, load_run
from monteclora.runs.run_folder import RunFolder

__all__ = ["Verdict", "verdict"]

_HARDLY = 0.95  # of the NLL without skill: a run above it has hardly learned
_ECE = 0.2
_WORSE = 0.02  # an NLL that is above another by this share of its size is worse


@dataclass(frozen=True)
class Verdict:
    """Findings on the validation rows.

    Attributes:
        findings: what was found, a sentence each.
        warnings: what is wrong, each with what to do about it.
    """

    findings: tuple[str, ...]
    warnings: tuple[str, ...]


def verdict(folder: Path, *, baseline: bool = True) -> Verdict:
    """Judge a finished run by its own validation rows.

    A classifier of at most 3,000 rows in each split is compared with a logistic regression on the pretrained model's
    features, which costs one forward pass over the rows.

    Args:
        folder: of the run, which is no ensemble.
        baseline: whether to compare; no for a model that does not fit on one device.

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
    kind, curve = data_facts(run).kind, _Curve.of(run)
    if kind == "classification":
        _skill(run, metrics, curve, baseline, findings, warnings)
    _judge_curve(run, curve, findings, warnings)
    _calibration(run, metrics, kind, findings, warnings)
    return Verdict(tuple(findings), tuple(warnings))


@dataclass(frozen=True)
class _Curve:
    """The validation NLL of each evaluation, infinite where it was no number.

    At the best temperature, where that chose the weights.

    Attributes:
        name: of what it is, in words.
        steps, values: of the evaluations.
        kept: steps whose weights a phase ended with.
    """

    name: str
    steps: tuple[int, ...]
    values: tuple[float, ...]
    kept: frozenset[int]

    @classmethod
    def of(cls, run: RunFolder) -> _Curve:
        events = run.metrics.read()
        chosen = any(event["event"] == "eval" and "tempered_nll" in event for event in events)
        metric = METRICS["tempered_nll" if chosen else "nll"]
        evaluations = [event for event in events if event["event"] == "eval" and metric.name in event]
        found = [event[metric.name] for event in evaluations]
        values = tuple(value if math.isfinite(value) else math.inf for value in found)
        phases = [event for event in events if event["event"] == "phase"] or [run.finished or {}]
        kept = frozenset(phase["kept_step"] for phase in phases)
        name = f"validation {metric.label.removesuffix(' (nats)')}"
        return cls(name, tuple(event["step"] for event in evaluations), values, kept)

    @property
    def best(self) -> int:
        """The number of the best evaluation."""
        return int(np.argmin(self.values))

    @property
    def kept_step(self) -> int:
        """The last validated step that was kept: the posterior's own phase is not validated."""
        return max(self.kept.intersection(self.steps) or self.kept)

    @property
    def worsened_at_once(self) -> bool:
        """Whether the first evaluation was the best, and the last is worse."""
        return len(self.values) > 1 and self.best == 0 and _is_worse(self.values[-1], self.values[0])


def _is_worse(value: float, than: float) -> bool:
    """Of NLLs, which a density's can make negative."""
    return value > than + _WORSE * abs(than)


def _skill(
    run: RunFolder,
    metrics: Mapping[str, float],
    curve: _Curve,
    baseline: bool,
    findings: list[str],
    warnings: list[str],
) -> None:
    """Against the class frequencies, and against the pretrained model's features."""
    try:
        data = own_rows(run.path, run.recipe.data, "train", FIT_SPLIT)
        labels = np.array(data.split(FIT_SPLIT)["label"])
    except DataError as error:
        findings.append(f"not compared with chance: {error}")
        return
    shares = np.bincount(labels) / len(labels)
    chance = float(-(shares[shares > 0] * np.log(shares[shares > 0])).sum())
    against = f"validation NLL {metrics['nll']:.3f}, class frequencies alone {chance:.3f}"
    accuracy = f"accuracy {metrics['accuracy']:.3f}, the largest class alone {shares.max():.3f}"
    findings.append(f"{against}; {accuracy} ({len(labels)} rows)")
    if metrics["nll"] > _HARDLY * chance:
        more = f"raise training.learning_rate{_now(run)} or training.epochs (now {run.recipe.training.epochs:g})"
        warnings.append("it has hardly learned" + ("" if curve.worsened_at_once else f": {more}"))
    if not baseline or not allow_baseline(data):
        return
    try:
        found = frozen_baseline(load_run(run.path), data)
    except torch.OutOfMemoryError:
        findings.append("not compared with a logistic regression on the pretrained model's features: out of memory")
        return
    if found is None:
        return
    text = f"NLL {found['nll']:.3f}, accuracy {found['accuracy']:.3f}"
    if found["nll"] < metrics["nll"]:
        warnings.append(
            f"fine-tuning is not worth it as it is: a logistic regression on the pretrained model's features has "
            f"{text} on the same rows. More rows, or another rate and number of epochs, may change that"
        )
    else:
        findings.append(f"a logistic regression on the pretrained model's features has {text}")


def _now(run: RunFolder) -> str:
    """The learning rate that was trained with, in brackets; nothing where an earlier version did not write it down."""
    rate: Any = (run.finished or {}).get("learning_rate") or run.recipe.training.learning_rate
    return "" if rate == "auto" else f" (now {rate:g})"


def _judge_curve(run: RunFolder, curve: _Curve, findings: list[str], warnings: list[str]) -> None:
    """Over- or underfitted, by the validation NLL of each evaluation."""
    steps, values = curve.steps, curve.values
    if len(values) < 2:
        return
    best, at = curve.best, f"step {steps[curve.best]}"
    if _is_worse(values[-1], values[best]):
        text = f"it overfits after {at}: {curve.name} rises from {values[best]:.3f} to {values[-1]:.3f}"
        if steps[best] in curve.kept:
            findings.append(f"{text}; the weights of {at} are kept")
        else:
            kept = f"the weights of step {curve.kept_step} are kept"
            warnings.append(f"{text}, and {kept}: set training.best_metric to nll")
    elif best == len(values) - 1 and _is_worse(values[0], values[best]):
        findings.append(f"{curve.name} was still falling at the end: more epochs may help")
    else:
        findings.append(f"{curve.name} was best at {at}, and levels off")
    if curve.worsened_at_once:
        warnings.append(f"the first evaluation was the best: lower training.learning_rate{_now(run)}")


def _calibration(
    run: RunFolder, metrics: Mapping[str, float], kind: Kind, findings: list[str], warnings: list[str]
) -> None:
    if "ece" not in metrics:
        return
    text = f"its confidences are wrong by {metrics['ece']:.2f} on average (ECE)"
    temperature = (run.finished or {}).get("temperature")
    if temperature is not None:
        text += f", once its head is divided by the best temperature, {temperature:.2f}"
    if metrics["ece"] <= _ECE:
        findings.append(text)
    elif kind == "classification" and temperature is None:
        warnings.append(f"{text}: monteclora evaluate {quote(str(run.path))} --calibrator temperature")
    else:
        warnings.append(text)
