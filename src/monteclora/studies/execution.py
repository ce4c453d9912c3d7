"""One trial from its claim to its outcome: trained, evaluated, and everything that can go wrong on the way."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping

import numpy as np
import torch

from monteclora.errors import DivergenceError
from monteclora.evaluation.run import EvaluationResult, evaluate
from monteclora.metrics.registry import measure
from monteclora.prediction.predictions import Predictions
from monteclora.runs.manifest import newest_complete
from monteclora.runs.recipe import Recipe, TrainingSpec
from monteclora.runs.result import RunResult
from monteclora.runs.run_folder import RunFolder, RunInUseError
from monteclora.studies.claims import TrialState
from monteclora.studies.folder import Outcome, StudyFolder
from monteclora.studies.plan import Trial
from monteclora.studies.recipe import StudyRecipe
from monteclora.training.run import train

__all__ = ["attempt", "tidy"]

_MOST_DEATHS = 20  # at one step, before a trial counts as what kills its workers


def attempt(folder: StudyFolder, study: StudyRecipe, trial: Trial) -> bool:
    """Take a trial and bring it as far as it goes; gives whether it could be taken.

    Raises:
        KeyboardInterrupt: training was interrupted, after saving; the claim is given back.
    """
    run = RunFolder(trial.recipe.folder)

    def step() -> int:
        found = newest_complete(run.checkpoints)
        return 0 if found is None else found.total_step

    taken = folder.claims.take(trial.id, folder.outcome_file(trial.id).is_file, step)
    if taken is None:
        return False
    token, state = taken
    outcome: Outcome | None = None
    in_use = False
    try:
        if state.deaths > _MOST_DEATHS:
            reason = f"its worker died {state.deaths} times at step {state.step}: killed, or out of memory"
            outcome = Outcome(trial.id, "failed", reason)
        else:
            with folder.claims.heartbeat(trial.id, token):
                outcome = _outcome(study, trial, state)
    except RunInUseError:
        in_use = True  # by a process that lost its claim, as one that was suspended, and goes on all the same
    finally:
        with folder.claims.held(trial.id, token) as mine:
            if mine and outcome is not None:
                folder.write_outcome(outcome)
        folder.claims.release(trial.id, token, state)
    if mine and outcome is not None:
        tidy(study, trial, outcome)
    return not in_use


def _outcome(study: StudyRecipe, trial: Trial, state: TrialState) -> Outcome | None:
    """What came of it; None where it is to be tried again, for a reason that is now in ``state``."""
    try:
        recipe = _fitting(trial.recipe, state)
        run = train(recipe, override=recipe != trial.recipe, progress=False)
    except DivergenceError as error:
        return Outcome(trial.id, "diverged", error.message)
    except RunInUseError:
        raise
    except Exception as error:  # whatever one trial does, the others go on; its reason is shown
        return _retried(study, trial, state, error, _halve_training)
    try:
        result = evaluate(
            run,
            study.split,
            sampler=study.sampler,
            calibrator=study.calibrator,
            batch_size=state.score_batch_size,
            progress=False,
        )
        return _finished(trial, run, result, state)
    except Exception as error:
        return _retried(study, trial, state, error, _halve_evaluation)


def _retried(
    study: StudyRecipe,
    trial: Trial,
    state: TrialState,
    error: Exception,
    halve: Callable[[TrainingSpec, TrialState], bool],
) -> Outcome | None:
    """None where the trial is to be tried again, with smaller passes if memory was short; else that it failed."""
    if _is_out_of_memory(error) and halve(trial.recipe.training, state):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None
    state.failures.append(" ".join(f"{type(error).__name__}: {error}".split())[:500])
    return Outcome(trial.id, "failed", state.failures[-1]) if len(state.failures) > study.retries else None


def _fitting(recipe: Recipe, state: TrialState) -> Recipe:
    """The recipe with the sizes of passes that fit into memory."""
    sizes = {n: v for n in ("micro_batch_size", "eval_batch_size") if (v := getattr(state, n)) is not None}
    return dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, **sizes)) if sizes else recipe


def _is_out_of_memory(error: BaseException | None) -> bool:
    if error is None:
        return False
    refused = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # torch's, on a CPU
    out = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return out or refused or _is_out_of_memory(error.__cause__)


def _halve_training(training: TrainingSpec, state: TrialState) -> bool:
    """Have the next attempt train with half as many rows at once; False where it is one row already.

    So do the evaluations during training, which may have been what did not fit.
    """
    rows = training.batch_size
    now = state.micro_batch_size or training.micro_batch_size or rows
    evaluated = state.eval_batch_size or training.eval_batch_size
    if now == 1 == evaluated:
        return False
    state.micro_batch_size = max(size for size in range(1, max(now // 2, 1) + 1) if rows % size == 0)
    state.eval_batch_size = max(evaluated // 2, 1)
    return True


def _halve_evaluation(training: TrainingSpec, state: TrialState) -> bool:
    """Have the next attempt evaluate half as many rows at once; False where it is one row already.

    The run is finished, and its recipe stays what it was trained with.
    """
    now = state.score_batch_size or state.eval_batch_size or training.eval_batch_size
    if now == 1:
        return False
    state.score_batch_size = now // 2
    return True


def _finished(trial: Trial, run: RunResult, result: EvaluationResult, state: TrialState) -> Outcome:
    halved = state.micro_batch_size
    smaller = halved is not None and halved != trial.recipe.training.micro_batch_size
    notes = [f"out of memory: passes of {halved} rows, gradients accumulated"] if smaller else []
    return Outcome(
        trial=trial.id,
        status="finished",
        metrics=dict(result.posterior or result.point),
        point=dict(result.point),
        validation=dict(run.metrics),
        no_skill=_no_skill(result),
        rows=result.source.rows,
        seconds=run.seconds,
        tokens=run.tokens,
        peak_memory_bytes=run.peak_memory_bytes,
        trained_parameters=run.trained_parameters,
        notes=[*notes, *result.notes],
    )


def _no_skill(result: EvaluationResult) -> Mapping[str, float]:
    """Of a prediction that does not look at the row: class frequencies, or the same for every answer option."""
    found = result.scored.at_mean
    if not isinstance(found, Predictions) or found.labels is None:
        return {}
    if result.kind == "classification":
        classes = found.log_probs.shape[-1]
        frequencies = np.bincount(found.labels, minlength=classes) / len(found.labels)
        return measure("classes", np.tile(frequencies, (len(found.labels), 1)), found.labels)
    options = np.isfinite(found.log_probs[0]).sum(-1)
    return {"accuracy": float((1 / options).mean()), "nll": float(np.log(options).mean())}


def tidy(study: StudyRecipe, trial: Trial, outcome: Outcome) -> None:
    """Remove what the study does not keep of a trial; of a failed one nothing, which is tried again."""
    run = RunFolder(trial.recipe.folder)
    if outcome.status != "failed" and study.keep != "everything":
        shutil.rmtree(run.checkpoints, ignore_errors=True)
        if study.keep == "numbers":
            shutil.rmtree(run.adapter, ignore_errors=True)
