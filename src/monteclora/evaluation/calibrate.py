"""Fit the posterior's scale to validation rows, without training (docs/method.md section 9).

Every scale is measured under the same draws, so that the curve is smooth and differences between scales are not noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from monteclora.adapters.active import active_posteriors
from monteclora.adapters.rescaling import rescale_posterior, restore_posterior
from monteclora.data.splitting import content_sha256
from monteclora.errors import ConfigError, DataError
from monteclora.evaluation.calibrators import fit_calibrators
from monteclora.evaluation.own_rows import FIT_SPLIT, halves, own_rows
from monteclora.prediction.calibrator import Calibrator
from monteclora.prediction.sampler import Sampler
from monteclora.runs.calibration import read_calibration, write_calibration
from monteclora.runs.loading import LoadedRun, load_run
from monteclora.runs.result import RunResult
from monteclora.runs.run_folder import RunFolder
from monteclora.system.progress import Progress, progress_bar
from monteclora.system.quiet import quiet_libraries
from monteclora.tasks.base import Scored
from monteclora.tasks.kinds import KINDS

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["CalibrationResult", "calibrate", "undo_calibration"]

_GRID = (0.0, 0.1, 0.3, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
_REFINEMENTS = 5
_SECTION = "posterior_scale"
Curve = dict[float, Mapping[str, float]]


@dataclass(frozen=True)
class CalibrationResult:
    """A fitted posterior scale.

    Attributes:
        folder: of the run.
        factor: c, relative to the scale of training.
        criterion: how it was chosen, in words.
        curve: metrics on the rows of the fit by scale, in its order.
        report: metrics on the rows that the fit did not use: at the ``mean``, as ``trained``, ``calibrated``,
            and with a temperature ``calibrated + temperature``.
        rows: how many rows were fitted to, and how many are reported on.
        num_samples: draws.
        temperature: T, fitted at that scale to the rows of the fit; None where none was asked for.
    """

    folder: Path
    factor: float
    criterion: str
    curve: Mapping[float, Mapping[str, float]]
    report: Mapping[str, Mapping[str, float]]
    rows: tuple[int, int]
    num_samples: int
    temperature: float | None = None

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "factor": self.factor,
            "criterion": self.criterion,
            "curve": [{"scale": scale, **metrics} for scale, metrics in self.curve.items()],
            "report": {name: dict(metrics) for name, metrics in self.report.items()},
            "fit_rows": self.rows[0],
            "report_rows": self.rows[1],
            "num_samples": self.num_samples,
            "temperature": self.temperature,
        }


def calibrate(
    run: str | Path | RunResult,
    *,
    tolerance: float | None = None,
    temperature: bool = False,
    num_samples: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> CalibrationResult:
    """Choose the scale of a run's posterior on one half of its validation rows, report on the other, and store it.

    The scale is stored in ``adapter/posterior.safetensors``, and so holds for evaluation, prediction, export and
    ``from_pretrained``; how it was found goes to ``calibration.json``.

    Args:
        run: a run folder, or what ``train`` gave.
        tolerance: by how much accuracy may fall below that of the mean: the largest scale that keeps to it is taken.
            None takes the scale with the smallest NLL.
        temperature: also fit a temperature, to the same half and under the same draws at the chosen scale; it is stored
            for the calibrator ``temperature`` of evaluation and prediction at this number of draws and seed.
        num_samples: draws; by default the recipe's number.
        seed: the stream of draws.
        batch_size: sequences per forward pass.
        progress: whether to draw a progress bar on standard error.

    Raises:
        CheckpointError: not a run, an unfinished one, or its adapter is damaged.
        ConfigError: the method has no posterior, an argument is out of its range, or a temperature is asked for where
            rows have neither classes nor options.
        DataError: there are too few validation rows, or they changed since the run was trained.
    """
    if tolerance is not None and not 0.0 <= tolerance < 1.0:
        raise ConfigError(f"tolerance is {tolerance}, expected at least 0 and below 1", "Give a share, such as 0.005.")
    if num_samples == 0:
        raise ConfigError("num_samples is 0, and a scale is measured under draws", "Ask for one draw or more.")
    loaded = load_run(run.folder if isinstance(run, RunResult) else run)
    fit, held_out, origin = _halves(loaded, temperature)
    sampler = loaded.sampler("posterior", num_samples, seed)
    assert sampler is not None
    score = _scoring(loaded, sampler, batch_size)
    steps = len(_GRID) + _REFINEMENTS
    with quiet_libraries(), progress_bar(f"{loaded.recipe.name}: posterior scale", steps, progress) as advance:
        curve, best = _search(lambda scale: score(scale, fit), tolerance, advance)
        factor = _best(curve, tolerance)
        stages = {"mean": 0.0, "trained": 1.0, "calibrated": factor}
        held = {scale: _metrics(score(scale, held_out)) for scale in dict.fromkeys(stages.values())}
        report = {name: held[scale] for name, scale in stages.items()}
    criterion = "smallest NLL" if tolerance is None else f"accuracy at most {tolerance:g} below the mean's"
    used = {"split": FIT_SPLIT, "rows_sha256": content_sha256(fit)}
    how = {"criterion": criterion, "num_samples": sampler.num_samples, **used}
    rescale_posterior(RunFolder(loaded.folder).adapter, factor, how)
    fitted = None
    if temperature:
        with quiet_libraries():
            calibrators = fit_calibrators(loaded, "temperature", sampler, seed, best, fit, origin)
            report["calibrated + temperature"] = _metrics(score(factor, held_out, calibrators))
        fitted = calibrators[sampler.name].state["temperature"]
    rows, curve = (len(fit), len(held_out)), dict(sorted(curve.items()))
    result = CalibrationResult(loaded.folder, factor, criterion, curve, report, rows, sampler.num_samples, fitted)
    stored = read_calibration(loaded.folder)
    write_calibration(loaded.folder, {**stored, _SECTION: {**result.facts(), **used, "seed": seed}})
    return result


def undo_calibration(run: str | Path | RunResult) -> bool:
    """Put the scale of training back; whether there was anything to undo.

    Raises:
        CheckpointError: not a run, or its posterior is missing or damaged.
    """
    folder = RunFolder.existing(run.folder if isinstance(run, RunResult) else run)
    undone = restore_posterior(folder.adapter)
    sections = read_calibration(folder.path)
    if sections.pop(_SECTION, None) is not None:
        write_calibration(folder.path, sections)
    return undone


def _halves(loaded: LoadedRun, temperature: bool) -> tuple[Dataset, Dataset, str]:
    """The rows to fit to, those to report on, and where both are from; refuses a run that cannot be calibrated."""
    if not loaded.has_posterior:
        raise ConfigError(
            f"the method {loaded.recipe.method.name} of {loaded.folder} has no posterior to scale",
            "Evaluate it with --calibrator temperature.",
        )
    data = own_rows(loaded, FIT_SPLIT)
    rows = data.splits.get(FIT_SPLIT)
    if rows is None or len(rows) < 4:
        raise DataError(
            f"{data.name} has {0 if rows is None else len(rows)} {FIT_SPLIT} rows, too few to fit to one half and "
            "report on the other",
            "Give data.validation_file or a larger data.validation_fraction.",
        )
    origin = data.sources[FIT_SPLIT].origin
    if temperature and KINDS[loaded.kind].predicts_tokens and not {"options", "answer"} <= set(rows.column_names):
        raise ConfigError(
            f"a temperature needs probabilities of classes or options, and {origin} has completions",
            "Leave out temperature.",
        )
    return *halves(rows, data.name), origin


class _Score(Protocol):
    def __call__(self, scale: float, rows: Dataset, calibrators: Mapping[str, Calibrator] | None = None) -> Scored: ...


def _scoring(loaded: LoadedRun, sampler: Sampler, batch_size: int | None) -> _Score:
    """Predictions at a scale and what they are worth, under the same draws at every scale but 0, which is the mean."""
    posteriors = active_posteriors(loaded.model)
    trained = [
        posterior.scale.clone()
        if posterior.calibration is None
        else torch.tensor(posterior.calibration["trained_scale"]).to(posterior.scale)
        for posterior in posteriors
    ]

    def score(scale: float, rows: Dataset, calibrators: Mapping[str, Calibrator] | None = None) -> Scored:
        for posterior, eps in zip(posteriors, trained, strict=True):
            posterior.scale.copy_(scale * eps)
        drawn = sampler if scale else None
        return KINDS[loaded.kind].score(loaded.predictor(drawn, batch_size, calibrators=calibrators), rows)

    return score


def _metrics(scored: Scored) -> Mapping[str, float]:
    """Of the mean over draws, where there are any."""
    return scored.point if scored.posterior is None else scored.posterior


def _search(score: Callable[[float], Scored], tolerance: float | None, advance: Progress) -> tuple[Curve, Scored]:
    """The grid, then scales between those where the optimum, or the largest scale that is good enough, must lie.

    Returns:
        The metrics by scale, and what was predicted at the best one.
    """
    curve: Curve = {}
    kept: Scored | None = None

    def add(scale: float) -> None:
        nonlocal kept
        scored = score(scale)
        curve[scale] = _metrics(scored)
        if kept is None or _best(curve, tolerance) == scale:
            kept = scored  # the best only moves to the scale that was added: one set of predictions is in memory
        advance(1)

    for scale in _GRID:
        add(scale)
    for _ in range(_REFINEMENTS):
        scales = sorted(curve)
        place = scales.index(_best(curve, tolerance))
        beside = [scales[i] for i in (place - 1, place + 1) if 0 <= i < len(scales)]
        if tolerance is not None:
            beside = [scale for scale in beside if scale > scales[place]]
        if not beside:
            break  # every scale is good enough
        # the wider gap, halved on a logarithmic scale (the one above 0 has no logarithm)
        other = max(beside, key=lambda scale: abs(math.log((scale or 0.01) / (scales[place] or 0.01))))
        low, high = sorted((scales[place], other))
        add(math.sqrt(low * high) if low else high / 2)
    assert kept is not None
    return curve, kept


def _best(curve: Curve, tolerance: float | None) -> float:
    """The scale with the smallest NLL, or the largest up to which accuracy keeps to the tolerance."""
    scales = sorted(curve)
    if tolerance is None:
        return min(scales, key=lambda scale: curve[scale]["nll"])
    name = "accuracy" if "accuracy" in curve[0.0] else "token_accuracy"
    least = curve[0.0][name] - tolerance - 1e-12
    return list(takewhile(lambda scale: curve[scale][name] >= least, scales))[-1]
