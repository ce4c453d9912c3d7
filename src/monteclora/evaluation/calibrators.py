"""Calibrators of a run: fitted to its validation rows when they are first asked for, and stored with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monteclora.data.splitting import content_sha256
from monteclora.errors import ConfigError, DataError
from monteclora.evaluation.own_rows import FIT_SPLIT, own_rows
from monteclora.prediction.calibrator import Calibrator
from monteclora.prediction.labels import LabelPredictions
from monteclora.prediction.predictions import Predictions
from monteclora.prediction.registry import CALIBRATORS, NO_CALIBRATOR, check_calibrator
from monteclora.prediction.sampler import MEAN, Sampler
from monteclora.prediction.scores import ScorePredictions
from monteclora.runs.calibration import read_calibration, weights_sha256, write_calibration
from monteclora.runs.loading import LoadedRun
from monteclora.runs.run_folder import RunFolder
from monteclora.tasks.base import Scored
from monteclora.tasks.kinds import KINDS

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["fit_calibrators", "fitted_calibrators"]

_SECTION = "calibrators"


def fitted_calibrators(
    loaded: LoadedRun, name: str | None, sampler: Sampler | None, seed: int, batch_size: int | None = None
) -> tuple[Mapping[str, Calibrator], tuple[str, ...]]:
    """The calibrators of the mean's predictions and of a sampler's, by the sampler's name; also notes, in words.

    What was fitted to the same weights under the same draws is taken from ``calibration.json``, anything else is
    fitted to the validation rows and put there.

    Args:
        loaded: the run.
        name: of the calibrator; None and ``none`` leave predictions as they are.
        sampler: of the draws; None for the mean alone.
        seed: of the draws.
        batch_size: sequences per forward pass.

    Raises:
        ConfigError: there is no such calibrator, or the task has no class or option probabilities.
        DataError: the run has no validation rows, or they changed since it was trained.
    """
    check_calibrator(name or NO_CALIBRATOR)
    if name in (None, NO_CALIBRATOR):
        return {}, ()
    assert name is not None
    if not KINDS[loaded.kind].can_be_calibrated:
        raise ConfigError(
            f"the calibrator {name} needs probabilities of classes, options or labels, and {loaded.folder} has scores",
            "Leave it out.",
        )
    if loaded.is_base or loaded.unfinished:
        what = "the pretrained model" if loaded.is_base else "an unfinished run"
        raise ConfigError(f"the calibrator {name} was asked of {what}", "Calibrate a finished run.")
    samplers = (MEAN,) if sampler is None else (MEAN, sampler)
    kept = _kept(loaded)
    keys = {each.name: _key(name, each, seed, loaded) for each in samplers}
    if not set(keys.values()) <= kept.keys():
        data = own_rows(loaded.folder, loaded.recipe.data, FIT_SPLIT)
        if FIT_SPLIT not in data.splits or not len(data.splits[FIT_SPLIT]):
            raise DataError(
                f"{data.name} has no {FIT_SPLIT} rows to fit the calibrator {name} to",
                "Give data.validation_file or a data.validation_fraction above 0.",
            )
        rows, origin = data.split(FIT_SPLIT), data.sources[FIT_SPLIT].origin
        scored = KINDS[loaded.kind].score(loaded.predictor(sampler, batch_size), rows)
        fit_calibrators(loaded, name, sampler, seed, scored, rows, origin)
        kept = _kept(loaded)
    kind: Any = CALIBRATORS[name]
    found = {each: kind(**kept[key]["state"]) for each, key in keys.items()}
    fit = kept[keys[samplers[-1].name]]
    state = ", ".join(f"{key} {value:.3f}" for key, value in fit["state"].items())
    return found, (f"{state}, fitted to {fit['rows']} {FIT_SPLIT} rows of {fit['origin']}",)


def fit_calibrators(
    loaded: LoadedRun,
    name: str,
    sampler: Sampler | None,
    seed: int,
    scored: Scored,
    rows: Dataset,
    origin: str,
) -> Mapping[str, Calibrator]:
    """Fit calibrators of the mean's predictions and of a sampler's to labelled rows, and store them with the run.

    Args:
        loaded: the run.
        name: of the calibrator.
        sampler: of the draws; None for the mean alone.
        seed: of the draws.
        scored: the uncorrected predictions of the rows, at the mean and by the sampler.
        rows: of the validation split.
        origin: the file or data set that they are from.

    Returns:
        The calibrators by the name of the sampler whose predictions they correct.

    Raises:
        ConfigError: the rows have neither classes nor options.
    """
    found = [(MEAN, scored.at_mean), *([] if sampler is None else [(sampler, scored.predictions)])]
    about = {"split": FIT_SPLIT, "rows": len(rows), "origin": Path(origin).name, "rows_sha256": content_sha256(rows)}
    about["weights_sha256"] = weights_sha256(RunFolder(loaded.first).adapter)
    fits, calibrators = {}, {}
    for each, predictions in found:
        decided = predictions.decisions if isinstance(predictions, LabelPredictions) else predictions
        if not isinstance(decided, Predictions):
            what = "scores" if isinstance(predictions, ScorePredictions) else "completions"
            raise ConfigError(
                f"the calibrator {name} needs probabilities of classes, options or labels, and {origin} has {what}",
                "Leave it out.",
            )
        calibrators[each.name] = CALIBRATORS[name].fit(decided)
        fits[_key(name, each, seed, loaded)] = {"state": dict(calibrators[each.name].state), **about}
    write_calibration(loaded.folder, {**read_calibration(loaded.folder), _SECTION: {**_kept(loaded), **fits}})
    return calibrators


def _key(name: str, sampler: Sampler, seed: int, loaded: LoadedRun) -> str:
    if sampler is MEAN:
        return f"{name}/{sampler.name}"
    if loaded.members:  # the weights that are compared on reading are the first run's alone
        return f"{name}/{sampler.name}/{loaded.weights_sha256()}"
    layers = getattr(sampler, "layers", None)
    where = "" if layers is None else f"/last {layers} blocks"
    return f"{name}/{sampler.name}/{sampler.num_samples} draws/seed {seed}{where}"


def _kept(loaded: LoadedRun) -> dict[str, dict[str, Any]]:
    """What was fitted to the weights that the run has now, by key."""
    weights = weights_sha256(RunFolder(loaded.first).adapter)
    stored = read_calibration(loaded.folder).get(_SECTION, {})
    return {key: fit for key, fit in stored.items() if fit.get("weights_sha256") == weights}
