"""A study's trials as an Optuna study, which optuna-dashboard and Optuna's own plots read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from monteclora.errors import ConfigError
from monteclora.metrics.registry import Metric
from monteclora.studies.folder import Outcome
from monteclora.studies.plan import Plan, Trial
from monteclora.studies.summary import primary_metric

__all__ = ["check_storage", "export_to_optuna"]

_OURS = "monteclora_study"  # marks a study in Optuna's storage that may be written anew


def check_storage(storage: str, name: str) -> None:
    """Find out before anything is run whether a study can be exported later.

    Args:
        storage: a URL that Optuna takes, as in ``sqlite:///study.db``.
        name: of the study.

    Raises:
        ConfigError: Optuna is missing, the storage cannot be used, or it has a study of that name that is not ours.
    """
    with _optuna(storage) as optuna:
        _check_ours(optuna, storage, name)


def export_to_optuna(storage: str, plan: Plan, outcomes: Mapping[str, Outcome]) -> int:
    """Write the trials that are done as an Optuna study of the same name, in place of an earlier export.

    Arm, seed and the values of the grid's keys are parameters, the leading metric is the value. A diverged trial is
    pruned and a failed one has failed, both without a value; everything else of an outcome is in the user attributes.

    Returns:
        How many trials were written.

    Raises:
        ConfigError: as :func:`check_storage`.
    """
    metric = primary_metric(plan, outcomes)
    trials = [trial for trial in plan.trials if trial.id in outcomes]
    with _optuna(storage) as optuna:
        name = plan.study.name
        if _check_ours(optuna, storage, name):
            optuna.delete_study(study_name=name, storage=storage)
        direction = "maximize" if metric.greater_is_better else "minimize"
        study = optuna.create_study(study_name=name, storage=storage, direction=direction)
        study.set_user_attr(_OURS, str(plan.study.folder))
        study.set_user_attr("metric", metric.name)
        distributions = _distributions(optuna, [_parameters(trial) for trial in trials])
        study.add_trials([_frozen(optuna, trial, outcomes[trial.id], metric, distributions) for trial in trials])
    return len(trials)


@contextmanager
def _optuna(storage: str) -> Iterator[Any]:
    try:
        import optuna
        import sqlalchemy
    except ImportError:
        raise ConfigError("--optuna needs Optuna", "Run `pip install 'monteclora[optuna]'`.") from None
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield optuna
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError, ImportError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"cannot use {storage}: {reason}", "Give a URL such as sqlite:///study.db.") from None
    finally:
        optuna.logging.set_verbosity(level)


def _check_ours(optuna: Any, storage: str, name: str) -> bool:
    """Whether an earlier export is there. Raises ConfigError for another study of the same name."""
    if name not in optuna.get_all_study_names(storage):
        return False
    if _OURS not in optuna.load_study(study_name=name, storage=storage).user_attrs:
        raise ConfigError(
            f"{storage} has a study {name} that was not exported from here", "Choose another storage, or rename one."
        )
    return True


def _parameters(trial: Trial) -> dict[str, Any]:
    values = {"arm": trial.arm, **trial.conditions, **trial.settings, "seed": trial.seed}
    plain = (type(None), bool, int, float, str)
    return {key: value if isinstance(value, plain) else json.dumps(value) for key, value in values.items()}


def _distributions(optuna: Any, parameters: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A range for numbers, on a logarithmic scale where they span a factor of ten; else the values that there are."""
    found = {}
    for key in dict.fromkeys(key for of_trial in parameters for key in of_trial):
        values = [of_trial[key] for of_trial in parameters if key in of_trial]
        kinds = {type(value) for value in values}
        if not kinds <= {int, float} or not all(map(math.isfinite, values)):
            found[key] = optuna.distributions.CategoricalDistribution(list(dict.fromkeys(values)))
            continue
        low, high = min(values), max(values)
        kind = optuna.distributions.IntDistribution if kinds == {int} else optuna.distributions.FloatDistribution
        found[key] = kind(low, high, log=low > 0 and high >= 10 * low)
    return found


def _frozen(optuna: Any, trial: Trial, outcome: Outcome, metric: Metric, distributions: Mapping[str, Any]) -> Any:
    parameters = _parameters(trial)
    value = outcome.metrics.get(metric.name)
    states = optuna.trial.TrialState
    state = {"diverged": states.PRUNED, "failed": states.FAIL}.get(outcome.status, states.COMPLETE)
    if state == states.COMPLETE and (value is None or not math.isfinite(value)):
        state = states.FAIL  # of a task without this metric: Optuna has no finished trial without a value
    complete = state == states.COMPLETE
    attributes = {
        "trial": trial.id,
        "status": outcome.status,
        "reason": outcome.reason,
        **outcome.metrics,
        **{f"mean_{name}": number for name, number in outcome.point.items()},
        **{f"validation_{name}": number for name, number in outcome.validation.items()},
        "seconds": outcome.seconds,
        "tokens": outcome.tokens,
        "notes": list(outcome.notes),
    }
    found = optuna.trial.create_trial(
        state=state,
        value=value if complete else None,
        params=parameters,
        distributions={key: distributions[key] for key in parameters},
        user_attrs=attributes,
    )
    found.datetime_start = found.datetime_complete - timedelta(seconds=outcome.seconds)
    return found
