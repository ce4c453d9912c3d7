"""One run from its claim to the outcomes of its trials: trained once, evaluated for each, and all that can go wrong."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch

from monteclora.errors import DivergenceError
from monteclora.evaluation.result import EvaluationResult
from monteclora.evaluation.run import evaluate_loaded
from monteclora.metrics.registry import measure
from monteclora.prediction.predictions import Predictions
from monteclora.runs.loading import LoadedRun, load_run
from monteclora.runs.manifest import newest_complete
from monteclora.runs.recipe import Recipe, TrainingSpec
from monteclora.runs.result import RunResult, learning_rate_found
from monteclora.runs.run_folder import RunFolder, RunInUseError
from monteclora.studies.claims import TrialState
from monteclora.studies.folder import Outcome, StudyFolder
from monteclora.studies.plan import Trial
from monteclora.studies.recipe import StudyRecipe
from monteclora.training.run import train

__all__ = ["attempt", "tidy"]

_MOST_DEATHS = 20  # at one step, before a trial counts as what kills its workers


def attempt(folder: StudyFolder, study: StudyRecipe, trials: Sequence[Trial]) -> bool:
    """Take the trials of one run and bring them as far as they go; gives whether they could be taken.

    Raises:
        KeyboardInterrupt: training was interrupted, after saving; the claim is given back.
    """
    name, run = trials[0].run, RunFolder(trials[0].recipe.folder)
    files = [folder.outcome_file(trial.id) for trial in trials]

    def step() -> int:
        newest = [newest_complete(part.checkpoints) for part in run.members or (run,)]
        return sum(found.total_step for found in newest if found is not None)

    taken = folder.claims.take(name, lambda: all(file.is_file() for file in files), step)
    if taken is None:
        return False
    token, state = taken
    left = [trial for trial, file in zip(trials, files, strict=True) if not file.is_file()]
    mine, in_use = True, False
    try:
        with folder.claims.heartbeat(name, token):
            for outcome in _outcomes(study, left, state):
                with folder.claims.held(name, token) as mine:
                    if not mine:
                        break
                    folder.write_outcome(outcome)
    except RunInUseError:
        in_use = True  # by a process that lost its claim, such as one that was suspended, and continues all the same
    finally:
        mine = folder.claims.release(name, token, state) and mine
    if mine:
        tidy(folder, study, trials)
    return not in_use


def _outcomes(study: StudyRecipe, trials: Sequence[Trial], state: TrialState) -> Iterator[Outcome]:
    """What came of a run's trials; those that are missing are to be tried again, for a reason that is now in ``state``.

    If one run fails, the others continue; its reason is shown.
    """
    first = trials[0].recipe
    if state.deaths > _MOST_DEATHS:
        reason = f"its worker died {state.deaths} times at step {state.step}: killed, or out of memory"
        yield from (Outcome(trial.id, "failed", reason) for trial in trials)
        return
    try:
        recipe = _fitting(first, state)
        run = train(recipe, override=recipe != first, progress=False)
    except DivergenceError as error:
        yield from (Outcome(trial.id, "diverged", error.message) for trial in trials)
        return
    except RunInUseError:
        raise
    except Exception as error:
        yield from _given_up(study, {trial.id: error for trial in trials}, first.training, state, _halve_training)
        return
    errors: dict[str, Exception] = {}
    loaded: LoadedRun | None = None
    for trial in trials:
        try:
            loaded = loaded or load_run(run.folder)
            outcome = _finished(trial, run, _evaluated(study, trial, loaded, state.score_batch_size), state)
        except Exception as error:
            errors[trial.id] = error
        else:
            yield outcome
    if errors:
        yield from _given_up(study, errors, first.training, state, _halve_evaluation)


def _evaluated(study: StudyRecipe, trial: Trial, loaded: LoadedRun, batch_size: int | None) -> EvaluationResult:
    return evaluate_loaded(
        dataclasses.replace(loaded, recipe=dataclasses.replace(loaded.recipe, evaluation=trial.recipe.evaluation)),
        study.split,
        sampler=trial.sampler,
        calibrator=trial.calibrator,
        batch_size=batch_size,
        progress=False,
    )


def _given_up(
    study: StudyRecipe,
    errors: Mapping[str, Exception],
    training: TrainingSpec,
    state: TrialState,
    halve: Callable[[TrainingSpec, TrialState], bool],
) -> list[Outcome]:
    """The trials that failed for good; none where they are to be tried again, with smaller passes if memory was short.

    Args:
        study: says how often.
        errors: of one attempt, by trial.
        training: of the run.
        state: of the run; is changed.
        halve: the passes that were too large.
    """
    if any(map(_is_out_of_memory, errors.values())) and halve(training, state):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return []
    reasons = {trial: " ".join(f"{type(e).__name__}: {e}".split())[:500] for trial, e in errors.items()}
    state.failures.append(next(iter(reasons.values())))
    if len(state.failures) <= study.retries:
        return []
    return [Outcome(trial, "failed", reason) for trial, reason in reasons.items()]


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
    rate = learning_rate_found(run.learning_rate, run.range_test_steps, run.back_offs)
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
        notes=[*notes, *([f"learning rate {rate}"] if rate else []), *result.notes],
        seconds_per_row=result.cost[result.sampler]["seconds"] / result.source.rows,
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


def tidy(folder: StudyFolder, study: StudyRecipe, trials: Sequence[Trial]) -> None:
    """Remove what the study does not keep of a run, once all its trials are done; of a failed one nothing.

    A failed one is tried again.
    """
    if study.keep == "everything":
        return
    outcomes = [folder.outcome(trial.id) for trial in trials]
    if all(outcome is not None and outcome.status != "failed" for outcome in outcomes):
        run = RunFolder(trials[0].recipe.folder)
        for part in run.members or (run,):
            shutil.rmtree(part.checkpoints, ignore_errors=True)
            if study.keep == "numbers":
                shutil.rmtree(part.adapter, ignore_errors=True)
