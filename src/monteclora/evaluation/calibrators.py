"""Calibrators of a run: fitted to its validation rows when they are first asked for, and stored with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monteclora.errors import ConfigError, DataError
from monteclora.prediction.calibrator import Calibrator
from monteclora.prediction.predictions import Predictions
from monteclora.prediction.registry import CALIBRATORS, NO_CALIBRATOR, check_calibrator
from monteclora.prediction.sampler import MEAN, Sampler
from monteclora.runs.calibration import read_calibration, weights_sha256, write_calibration
from monteclora.runs.loading import LoadedRun
from monteclora.runs.run_folder import RunFolder
from monteclora.tasks import load
from monteclora.tasks.kinds import KINDS

__all__ = ["FIT_SPLIT", "fitted_calibrators"]

FIT_SPLIT = "validation"
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
        DataError: the run has no validation rows.
    """
    check_calibrator(name or NO_CALIBRATOR)
    if name in (None, NO_CALIBRATOR):
        return {}, ()
    assert name is not None
    if loaded.is_base or loaded.unfinished:
        what = "the pretrained model" if loaded.is_base else "an unfinished run"
        raise ConfigError(f"the calibrator {name} was asked of {what}", "Calibrate a finished run.")
    samplers = (MEAN,) if sampler is None else (MEAN, sampler)
    known = dict(read_calibration(loaded.folder))
    weights = weights_sha256(RunFolder(loaded.folder).adapter)
    kept = {key: fit for key, fit in known.get(_SECTION, {}).items() if fit.get("weights_sha256") == weights}
    keys = {each.name: _key(name, each, seed) for each in samplers}
    if not set(keys.values()) <= kept.keys():
        fits = _fit(loaded, name, sampler, batch_size)
        kept |= {keys[each]: {**fit, "weights_sha256": weights} for each, fit in fits.items()}
        write_calibration(loaded.folder, {**known, _SECTION: kept})
    kind: Any = CALIBRATORS[name]
    found = {each: kind(**kept[key]["state"]) for each, key in keys.items()}
    fit = kept[keys[samplers[-1].name]]
    state = ", ".join(f"{key} {value:.3f}" for key, value in fit["state"].items())
    return found, (f"{state}, fitted to {fit['rows']} {FIT_SPLIT} rows of {fit['origin']}",)


def _key(name: str, sampler: Sampler, seed: int) -> str:
    return f"{name}/{sampler.name}" + ("" if sampler is MEAN else f"/{sampler.num_samples} draws/seed {seed}")


def _fit(loaded: LoadedRun, name: str, sampler: Sampler | None, batch_size: int | None) -> dict[str, dict[str, Any]]:
    """State and rows of the calibrator for each sampler."""
    data = load(loaded.recipe.data, (FIT_SPLIT,))
    if FIT_SPLIT not in data.splits or not len(data.splits[FIT_SPLIT]):
        raise DataError(
            f"{data.name} has no {FIT_SPLIT} rows to fit the calibrator {name} to",
            "Give data.validation_file or a data.validation_fraction above 0.",
        )
    scored = KINDS[loaded.kind].score(loaded.predictor(sampler, batch_size), data.split(FIT_SPLIT))
    source, fits = data.sources[FIT_SPLIT], {}
    found = {MEAN.name: scored.at_mean, **({} if sampler is None else {sampler.name: scored.predictions})}
    for each, predictions in found.items():
        if not isinstance(predictions, Predictions):
            raise ConfigError(
                f"the calibrator {name} needs probabilities of classes or options, and {data.name} has completions",
                "Leave it out.",
            )
        state = dict(CALIBRATORS[name].fit(predictions).state)
        fits[each] = {
            "state": state,
            "split": FIT_SPLIT,
            "rows": source.rows,
            "origin": Path(source.origin).name,
            "rows_sha256": source.sha256,
        }
    return fits
