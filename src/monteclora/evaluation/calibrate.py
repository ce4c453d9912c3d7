"""Fit the posterior's scale to validation rows, without training (docs/method.md section 9).

Every scale is measured under the same draws, so that the curve is smooth and differences between scales are not noise.
A plain LoRA adapter is first given a posterior to scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, get_args

import torch

from monteclora.adapters.active import active_posteriors
from monteclora.adapters.card import add_calibration, mark_own, remove_calibration
from monteclora.adapters.grafting import Rows
from monteclora.adapters.model import MonteCLoRAModel
from monteclora.adapters.rescaling import rescale_posterior, restore_plain, restore_posterior
from monteclora.adapters.sampler import Posterior
from monteclora.adapters.storage import POSTERIOR_FILE
from monteclora.data.splitting import content_sha256
from monteclora.errors import ConfigError, DataError
from monteclora.evaluation.calibrators import fit_calibrators
from monteclora.evaluation.own_rows import FIT_SPLIT, halves, own_rows
from monteclora.methods import get_method
from monteclora.prediction.calibrator import Calibrator
from monteclora.prediction.sampler import Sampler
from monteclora.runs.adoption import adopt, disown, is_plain_adapter, rows_of, with_posterior
from monteclora.runs.calibration import read_calibration, write_calibration
from monteclora.runs.data_facts import data_facts
from monteclora.runs.loading import LoadedRun, load_run
from monteclora.runs.result import RunResult
from monteclora.runs.run_folder import RunFolder
from monteclora.system.progress import Progress, progress_bar
from monteclora.system.quiet import quiet_libraries
from monteclora.tasks import DataSpec
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
        report: metrics on the rows that the fit did not use: at the ``mean``, as ``trained`` where training made the
            posterior, ``calibrated``, and with a temperature ``calibrated + temperature``.
        rows: how many rows were fitted to, and how many are reported on.
        num_samples: draws.
        temperature: T, fitted at that scale to the rows of the fit; None where none was asked for.
        layers: the last adapted blocks that are drawn; None for all.
        grafted: how the rows of a posterior are scaled that training did not make; None where it did.
        notes: what was taken for granted, in words.
    """

    folder: Path
    factor: float
    criterion: str
    curve: Mapping[float, Mapping[str, float]]
    report: Mapping[str, Mapping[str, float]]
    rows: tuple[int, int]
    num_samples: int
    temperature: float | None = None
    layers: int | None = None
    grafted: Rows | None = None
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"CalibrationResult({self.folder}, factor={self.factor:.4g}, {self.rows[0]} rows, {self.criterion})"

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
            "layers": self.layers,
            "grafted": self.grafted,
        }


def calibrate(
    run: str | Path | RunResult,
    *,
    base: str | None = None,
    data: str | Path | DataSpec | None = None,
    label_names: Sequence[str] = (),
    rows: Rows | None = None,
    tolerance: float | None = None,
    temperature: bool = False,
    num_samples: int | None = None,
    seed: int = 0,
    layers: int | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> CalibrationResult:
    """Choose the scale of a run's posterior on one half of its validation rows, report on the other, and store it.

    The scale is stored in the adapter's ``posterior.safetensors``, and so holds for evaluation, prediction, export and
    ``from_pretrained``; how it was found goes to ``calibration.json``. A plain LoRA gets a posterior for that: a run of
    method ``lora``, or an adapter folder from elsewhere, which from then on can be given wherever a run can.

    Args:
        run: a run folder, what ``train`` gave, or the folder of a LoRA adapter.
        base: of an adapter folder: the model it was trained on; by default the one that its configuration names.
        data: of an adapter folder: a file with labels or completions, or a :class:`~monteclora.tasks.DataSpec` whose
            ``validation_file`` is one.
        label_names: of an adapter folder: a classifier's labels in the order of training, by default that of names.
        rows: of a posterior that an adapter is given: rows of A with ``equal`` noise, the default, or such that the
            noise in each layer's output is ``isotropic`` within the column space of B.
        tolerance: by how much accuracy may fall below that of the mean: the largest scale that keeps to it is taken.
            None takes the scale with the smallest NLL.
        temperature: also fit a temperature, to the same half and under the same draws at the chosen scale; it is stored
            for the calibrator ``temperature`` of evaluation and prediction at this number of draws and seed.
        num_samples: draws; by default the recipe's number.
        seed: the stream of draws.
        layers: draw in so many of the last adapted blocks alone, from now on; by default the recipe's number.
        batch_size: sequences per forward pass.
        progress: whether to draw a progress bar on standard error.

    Raises:
        CheckpointError: neither a run nor an adapter, an unfinished run, or an adapter that is damaged.
        ConfigError: the method has no posterior and no LoRA adapter to put one on, an argument is out of its range or
            does not fit, or a temperature is asked for where rows have neither classes nor options.
        DataError: there are too few validation rows, or they changed since the run was trained.
    """
    _check_arguments(tolerance, num_samples, rows)
    folder = Path(run.folder if isinstance(run, RunResult) else run)
    with _described(folder, base, data, label_names) as notes:
        loaded = load_run(folder)
        loaded.check_single("calibration")
        loaded, grafted = with_posterior(loaded, rows)
        fit, held_out, origin = _halves(loaded, temperature, tolerance)
        layers = loaded.recipe.evaluation.layers if layers is None else layers
        sampler = replace(cast(Posterior, loaded.sampler("posterior", num_samples, seed)), layers=layers)
        sampler.check(loaded.model)
        score = _scoring(loaded, sampler, batch_size)
        steps = len(_GRID) + _REFINEMENTS
        with quiet_libraries(), progress_bar(f"{loaded.recipe.name}: posterior scale", steps, progress) as advance:
            curve, best = _search(lambda scale: score(scale, fit), tolerance, advance)
            factor = _best(curve, tolerance)
            stages = {"mean": 0.0, "trained": 1.0, "calibrated": factor}
            made = rows_of(loaded)
            if made is not None:
                del stages["trained"]
            held = {scale: _metrics(score(scale, held_out)) for scale in dict.fromkeys(stages.values())}
            report = {name: held[scale] for name, scale in stages.items()}
        criterion = "smallest NLL" if tolerance is None else f"accuracy at most {tolerance:g} below the mean's"
        used = {"split": FIT_SPLIT, "rows_sha256": content_sha256(fit)}
        if grafted is not None:
            grafted.save(dict(enumerate(loaded.label_names or ())))
        about = _about(loaded, factor, criterion, sampler, len(held_out))
        how: dict[str, Any] = {"criterion": criterion, "num_samples": sampler.num_samples, "layers": layers, **used}
        how |= {"report": {name: dict(metrics) for name, metrics in report.items()}, "about": about}
        rescale_posterior(RunFolder(loaded.folder).adapter, factor, how)
    fitted = None
    if temperature:
        with quiet_libraries():
            calibrators = fit_calibrators(loaded, "temperature", sampler, seed, best, fit, origin)
            report["calibrated + temperature"] = _metrics(score(factor, held_out, calibrators))
        fitted = calibrators[sampler.name].state["temperature"]
    _write_card(loaded, report, about)
    counts, curve = (len(fit), len(held_out)), dict(sorted(curve.items()))
    result = CalibrationResult(
        loaded.folder, factor, criterion, curve, report, counts, sampler.num_samples, fitted, layers, made, notes
    )
    stored = read_calibration(loaded.folder)
    write_calibration(loaded.folder, {**stored, _SECTION: {**result.facts(), **used, "seed": seed}})
    return result


def _about(loaded: LoadedRun, factor: float, criterion: str, sampler: Posterior, rows: int) -> str:
    where = "" if sampler.layers is None else f" in the last {sampler.layers} blocks"
    return (
        f"The posterior is drawn at {factor:.3g} times its scale{where} ({criterion}), which half of the validation "
        f"rows of {data_facts(RunFolder(loaded.folder)).name} chose. The other half, {rows} rows, says what that is "
        f"worth, at the mean and under {sampler.num_samples} draws."
    )


def _write_card(loaded: LoadedRun, report: Mapping[str, Mapping[str, float]], about: str) -> None:
    """Put the numbers into the card of the adapter, and make one where there is none."""
    folder, model = RunFolder(loaded.folder).adapter, cast(MonteCLoRAModel, loaded.model)
    if not (folder / "README.md").exists():
        model.create_or_update_model_card(folder)
        mark_own(folder)
    add_calibration(folder, report, about)


def _check_arguments(tolerance: float | None, num_samples: int | None, rows: str | None) -> None:
    if tolerance is not None and not 0.0 <= tolerance < 1.0:
        raise ConfigError(f"tolerance is {tolerance}, expected at least 0 and below 1", "Give a share, such as 0.005.")
    if num_samples == 0:
        raise ConfigError("num_samples is 0, and a scale is measured under draws", "Ask for one draw or more.")
    if rows is not None and rows not in get_args(Rows):
        raise ConfigError(f"rows is {rows!r}, expected one of {', '.join(get_args(Rows))}", "Choose one.")


@contextmanager
def _described(
    folder: Path, base: str | None, data: str | Path | DataSpec | None, label_names: Sequence[str]
) -> Iterator[tuple[str, ...]]:
    """Describe an adapter folder as a run; not if the block raises, unless it was one before. Yields notes."""
    known = RunFolder(folder).recipe_file.is_file()
    given = {"base": base, "data": data, "label_names": label_names or None}
    if not is_plain_adapter(folder) or (known and data is None):
        for name, value in given.items():
            if value is not None:
                whose = "an adapter that is described already" if known else "no folder of an adapter"
                whose = "a run with its own" if not is_plain_adapter(folder) and known else whose
                raise ConfigError(f"{name} is given, and {folder} is {whose}", "Leave it out, or give data as well.")
        yield ()
        return
    if data is None:
        raise ConfigError(
            f"{folder} is an adapter without a recipe, and no labelled rows are given",
            "Give a file with labels or completions with --data.",
        )
    spec = data if isinstance(data, DataSpec) else DataSpec(validation_file=str(data))
    adopted = adopt(folder, base, replace(spec, label_names=list(label_names) or spec.label_names))
    try:
        yield adopted.notes
    except BaseException:
        if not known:
            disown(folder)
        raise


def undo_calibration(run: str | Path | RunResult) -> bool:
    """Restore the scale of training, or remove the posterior that a plain LoRA was given.

    Returns:
        Whether there was anything to undo.

    Raises:
        CheckpointError: not a run, or its posterior is missing or damaged.
    """
    folder = RunFolder.existing(run.folder if isinstance(run, RunResult) else run)
    has_own = get_method(folder.recipe.method.name).has_posterior
    undone = restore_plain(folder.adapter)
    if has_own or (folder.adapter / POSTERIOR_FILE).is_file():
        undone = restore_posterior(folder.adapter)
    remove_calibration(folder.adapter)
    sections = read_calibration(folder.path)
    if sections.pop(_SECTION, None) is not None:
        write_calibration(folder.path, sections)
    disown(folder.path)
    return undone


def _halves(loaded: LoadedRun, temperature: bool, tolerance: float | None) -> tuple[Dataset, Dataset, str]:
    """The rows to fit to, those to report on, and where both are from; refuses a run that cannot be calibrated."""
    data = own_rows(loaded.folder, loaded.recipe.data, FIT_SPLIT)
    rows = data.splits.get(FIT_SPLIT)
    if rows is None or len(rows) < 4:
        raise DataError(
            f"{data.name} has {0 if rows is None else len(rows)} {FIT_SPLIT} rows, too few to fit to one half and "
            "report on the other",
            "Give data.validation_file or a larger data.validation_fraction.",
        )
    origin = data.sources[FIT_SPLIT].origin
    scorings = KINDS[loaded.kind].scorings(rows)
    if temperature and scorings[0] in ("tokens", "scores"):
        what = "completions" if scorings[0] == "tokens" else "scores"
        raise ConfigError(
            f"a temperature needs probabilities of classes, options or labels, and {origin} has {what}",
            "Leave out temperature.",
        )
    if tolerance is not None and scorings[0] == "scores":
        raise ConfigError(f"tolerance is {tolerance}, and {origin} has scores, which have no accuracy", "Leave it out.")
    return *halves(rows, data.name), origin


class _Score(Protocol):
    def __call__(self, scale: float, rows: Dataset, calibrators: Mapping[str, Calibrator] | None = None) -> Scored: ...


def _scoring(loaded: LoadedRun, sampler: Sampler, batch_size: int | None) -> _Score:
    """Predictions at a scale and what they are worth, under the same draws at every scale but 0, which is the mean.

    The mean is predicted once for each set of rows: it does not depend on the scale.
    """
    posteriors = active_posteriors(loaded.model)
    trained = [
        posterior.scale.clone()
        if posterior.calibration is None
        else torch.tensor(posterior.calibration["trained_scale"]).to(posterior.scale)
        for posterior in posteriors
    ]

    at_mean: dict[int, list[Any]] = {}

    def score(scale: float, rows: Dataset, calibrators: Mapping[str, Calibrator] | None = None) -> Scored:
        for posterior, eps in zip(posteriors, trained, strict=True):
            posterior.scale.copy_(scale * eps)
        drawn = sampler if scale else None
        predictor = loaded.predictor(drawn, batch_size, calibrators=calibrators)
        return KINDS[loaded.kind].score(replace(predictor, at_mean=at_mean.setdefault(id(rows), [])), rows)

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
    name = next(name for name in ("accuracy", "subset_accuracy", "token_accuracy") if name in curve[0.0])
    least = curve[0.0][name] - tolerance - 1e-12
    return list(takewhile(lambda scale: curve[scale][name] >= least, scales))[-1]
