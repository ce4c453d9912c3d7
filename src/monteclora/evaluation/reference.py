"""What a run keeps of its own rows to judge new ones by: features of training rows, and when to abstain."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monteclora.adapters.rescaling import posterior_scale
from monteclora.adapters.sampler import Posterior
from monteclora.data.encoding import encode
from monteclora.data.splitting import subset
from monteclora.errors import CheckpointError, ConfigError, DataError
from monteclora.evaluation.own_rows import FIT_SPLIT, halves, own_rows
from monteclora.metrics.selective import Abstention, abstention_threshold, check_promise, least_examples
from monteclora.prediction.ensemble import Members
from monteclora.prediction.known_tokens import KnownTokens
from monteclora.prediction.novelty import NOVELTY_FILE, Novelty, Seen, look_at, most_rows, with_pretrained
from monteclora.prediction.sampler import MEAN, Sampler
from monteclora.runs.calibration import weights_sha256
from monteclora.runs.documents import read_document, write_document
from monteclora.runs.loading import LoadedRun
from monteclora.runs.run_folder import RunFolder
from monteclora.tasks import TaskData
from monteclora.tasks.classification import classify
from monteclora.tasks.kinds import KINDS

if TYPE_CHECKING:
    from datasets import Dataset

    from monteclora.tasks.base import Predicted

__all__ = ["ABSTENTION_FILE", "LEVEL", "RISK", "Judge", "abstention_of", "novelty_of", "promise", "see"]

ABSTENTION_FILE = "abstention.json"
RISK, LEVEL = 0.1, 0.9
_ROWS_AT_ONCE = 10_000
_FORMAT = 1
_AGAIN = "Remove it; it is made again when needed."

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Judge:
    """Tells of new rows how novel they are, and which answers to abstain from.

    Attributes:
        loaded: the run, a classifier.
        novelty: see :func:`novelty_of`; None where it was not asked for.
        abstention: see :func:`abstention_of`; None where the confidences are calibrated, since the calibrator is fitted
            to the validation rows that the threshold would be chosen on.
        batch_size: rows per forward pass; None for the recipe's ``training.eval_batch_size``.
    """

    loaded: LoadedRun
    novelty: Novelty | None
    abstention: Abstention | None
    batch_size: int | None = None

    @classmethod
    def of(
        cls,
        loaded: LoadedRun,
        sampler: Sampler | None,
        seed: int,
        risk: float = RISK,
        level: float = LEVEL,
        calibrated: bool = False,
        with_novelty: bool = True,
        batch_size: int | None = None,
    ) -> tuple[Judge | None, tuple[str, ...]]:
        """What judges the answers of a run, as far as it has it, and in words what must be known of it.

        That is what is left out and why, that a promise is not kept, and why nothing can be promised.

        Args:
            loaded, sampler, seed, risk, level: see :func:`abstention_of`.
            calibrated: whether a calibrator corrects the confidences.
            with_novelty: whether to tell how novel rows are; of answers under draws it takes a forward pass more.
            batch_size: rows per forward pass, by default the recipe's ``training.eval_batch_size``.

        Raises:
            CheckpointError: a stored file is damaged.
            ConfigError: ``risk`` or ``level`` is out of range.
        """
        rows = cache(partial(own_rows, loaded.folder, loaded.recipe.data, "train", FIT_SPLIT))
        try:
            novelty = novelty_of(loaded, rows, batch_size) if with_novelty else None
        except DataError as error:
            return None, (f"novelty and abstain are left out: {error}",)
        if calibrated:
            why = "a calibrator was fitted to the validation rows that its threshold is chosen on"
            return cls(loaded, novelty, None, batch_size), (f"abstain is left out: {why}",)
        try:
            found = abstention_of(loaded, sampler, seed, risk, level, rows, batch_size)
        except DataError as error:
            return cls(loaded, novelty, None, batch_size), (f"abstain is left out: {error}",)
        return cls(loaded, novelty, found, batch_size), (*_unpromised(found), *_chosen_on(loaded))

    def columns(self, answered: Predicted) -> dict[str, list[Any]]:
        """``novelty``, and ``abstain`` where there is a threshold, of rows that were answered.

        What the answers' own forward passes showed is used where they were made at the mean by a predictor that looked.
        """
        found: dict[str, list[Any]] = {}
        if self.novelty is not None:
            assert answered.inputs is not None  # a kind with classes hands them over
            seen = _seen(self.loaded, answered.inputs, self.batch_size, self.novelty.needs_pretrained, answered.seen)
            found["novelty"] = self.novelty.of(seen).tolist()
        if self.abstention is not None:
            found["abstain"] = self.abstention.abstains(answered.columns["confidence"]).tolist()
        return found


def promise(loaded: LoadedRun, risk: float | None, level: float | None) -> tuple[float, float]:
    """Risk and level of what is promised of a run's answers, with the defaults for None.

    Raises:
        ConfigError: one is out of range, or asked of a run that is no classifier.
    """
    for name, value in (("risk", risk), ("level", level)):
        if value is not None and not KINDS[loaded.kind].has_classes:
            raise ConfigError(
                f"{name} is {value}, and {loaded.folder} is a run of {loaded.kind}, which never abstains",
                "Leave it out.",
            )
    found = (RISK if risk is None else risk, LEVEL if level is None else level)
    check_promise(*found)
    return found


def see(loaded: LoadedRun, rows: Dataset, batch_size: int | None = None, novelty: Novelty | None = None) -> Seen:
    """What forward passes at the mean show of rows of texts; of an ensemble, the first member's.

    Args:
        loaded: the run.
        rows: with the columns of texts.
        batch_size: rows per forward pass, by default the recipe's ``training.eval_batch_size``.
        novelty: will score what is seen: of an earlier version, it needs the pretrained model's features too.
    """
    encoded = encode(rows, loaded.kind, loaded.tokenizer, loaded.recipe.data.max_length).dataset.to_list()
    return _seen(loaded, encoded, batch_size, novelty is not None and novelty.needs_pretrained)


def _seen(
    loaded: LoadedRun,
    encoded: Sequence[dict[str, Any]],
    batch_size: int | None,
    pretrained: bool,
    seen: Seen | None = None,
) -> Seen:
    """As :func:`see`, of rows in tokens; ``seen`` is what is known of them already."""
    model = loaded.model.members[0] if isinstance(loaded.model, Members) else loaded.model
    size = loaded.recipe.training.eval_batch_size if batch_size is None else batch_size
    with loaded.precision():
        found = look_at(model, encoded, loaded.collate, size) if seen is None else seen
        return with_pretrained(model, found, encoded, loaded.collate, size) if pretrained else found


def novelty_of(loaded: LoadedRun, rows: Callable[[], TaskData] | None = None, batch_size: int | None = None) -> Novelty:
    """The run's reference for novelty, from its folder, or made of its training and validation rows and stored there.

    What is stored is taken where it was measured with the weights that the run has now. Training rows beyond a few MB
    of features are left out, chosen by their content.

    Args:
        loaded: the run.
        rows: loads its training and validation rows, by default :func:`monteclora.evaluation.own_rows.own_rows`; for
            callers that need them again.
        batch_size: rows per forward pass, by default the recipe's ``training.eval_batch_size``.

    Raises:
        CheckpointError: the stored file is damaged.
        DataError: the run's rows are gone or changed, or there are no validation rows.
    """
    path = loaded.first / NOVELTY_FILE
    weights = weights_sha256(RunFolder(loaded.first).adapter, posterior=False)  # what is measured is the mean's
    if path.exists() and (stored := Novelty.load(path)).weights == weights:
        return stored
    data = rows() if rows else own_rows(loaded.folder, loaded.recipe.data, "train", FIT_SPLIT)
    held_out = _validation(loaded, data)
    own, training = see(loaded, held_out, batch_size), data.split("train")
    kept = see(loaded, subset(training, most_rows(own.features.shape[1]), seed=0), batch_size)
    found = Novelty.fit(kept, own, weights, _tokens_of(loaded, training))
    _store(path, lambda: found.save(path))
    return found


def _tokens_of(loaded: LoadedRun, rows: Dataset) -> KnownTokens:
    encoded = encode(rows, loaded.kind, loaded.tokenizer, loaded.recipe.data.max_length).dataset
    batches = encoded.with_format("numpy").iter(_ROWS_AT_ONCE)
    return KnownTokens.of(row for batch in batches for row in batch["input_ids"])


def abstention_of(
    loaded: LoadedRun,
    sampler: Sampler | None,
    seed: int,
    risk: float,
    level: float,
    rows: Callable[[], TaskData] | None = None,
    batch_size: int | None = None,
) -> Abstention:
    """The confidence above which answers keep the promise, chosen on validation rows and stored in the run folder.

    Where ``calibrate`` chose the posterior's scale on one half of the rows, draws are judged by the other half. What is
    stored is taken where it was chosen for the same draws of the same weights, rows, risk and level.

    Args:
        loaded: the run.
        sampler: of the draws; None for the mean.
        seed: of the draws.
        risk, level: the promise, see :func:`monteclora.metrics.selective.abstention_threshold`.
        rows, batch_size: as for :func:`novelty_of`.

    Raises:
        CheckpointError: the stored file is damaged.
        ConfigError: ``risk`` or ``level`` is out of range.
        DataError: the run's rows are gone or changed, or there are no validation rows.
    """
    path = loaded.folder / ABSTENTION_FILE
    halved = sampler is not None and sampler.name == Posterior.name and _scale_was_chosen(loaded)
    how = {
        "sampler": MEAN.name if sampler is None else sampler.name,
        "num_samples": 0 if sampler is None else sampler.num_samples,
        "seed": seed,
        "layers": getattr(sampler, "layers", None),
        "risk": risk,
        "level": level,
        "rows": "the half of the validation rows that did not choose the posterior's scale" if halved else FIT_SPLIT,
        "weights_sha256": loaded.weights_sha256(),  # the posterior's scale is one of them
    }
    stored = read_document(path, _FORMAT, lambda document: _stored(document, how), _AGAIN)
    if stored is not None:
        return stored
    data = rows() if rows else own_rows(loaded.folder, loaded.recipe.data, "train", FIT_SPLIT)
    judged_by = _validation(loaded, data)
    if halved:
        _, judged_by = halves(judged_by, data.name)
    predictor = loaded.predictor(sampler, batch_size)
    (predictions,), _ = classify(predictor, judged_by, predictor.samplers[-1:])
    confidence, correct = predictions.probs.max(1), predictions.probs.argmax(1) == judged_by["label"][:]
    found = abstention_threshold(confidence, correct, risk, level)
    # JSON has neither infinity nor NaN: text stands for them
    facts = {
        name: value if not isinstance(value, float) or math.isfinite(value) else str(value)
        for name, value in dataclasses.asdict(found).items()
    }
    _store(path, lambda: write_document(path, _FORMAT, {**facts, **how}))
    return found


def _store(path: Path, write: Callable[[], None]) -> None:
    """Keep what can be measured again: a run folder that cannot be written to does not stop an answer."""
    try:
        write()
    except CheckpointError as error:
        _log.warning("%s is not kept, and is measured again next time: %s", path.name, error)


def _validation(loaded: LoadedRun, data: TaskData) -> Dataset:
    if FIT_SPLIT not in data.splits:
        raise DataError(
            f"{loaded.folder} has no validation rows, which novelty and abstention are measured on",
            "Give data.validation_file or a data.validation_fraction above 0, and train again.",
        )
    return data.split(FIT_SPLIT)


def _scale_was_chosen(loaded: LoadedRun) -> bool:
    """Whether the scale that the posterior is drawn at was chosen on validation rows, rather than by training."""
    return loaded.has_posterior and "rows_sha256" in posterior_scale(RunFolder(loaded.folder).adapter)


def _stored(document: dict[str, Any], how: Mapping[str, Any]) -> Abstention | None:
    """The threshold of a document; None where it was chosen otherwise. A wrong value raises, which means damage."""
    kinds = {"examples": int, "answered": int, "errors": int}
    values: dict[str, Any] = {
        field.name: kinds.get(field.name, float)(document[field.name]) for field in dataclasses.fields(Abstention)
    }
    known = {"rows": FIT_SPLIT, "layers": None, **document}  # the first documents did not name these
    return Abstention(**values) if all(known.get(name) == value for name, value in how.items()) else None


def _unpromised(found: Abstention) -> tuple[str, ...]:
    """Why every answer is abstained from, in words, where that is so."""
    if found.answered:
        return ()
    promise = f"at most {100 * found.risk:.3g} % wrong answers with a probability of {100 * found.level:.3g} %"
    needed = least_examples(found.risk, found.level)
    if found.examples < needed:
        why = f"{found.examples} validation rows cannot promise {promise}: it takes {needed}, even without an error"
    else:
        why = f"the answers to {found.examples} validation rows are wrong too often to promise {promise}"
    return (f"every answer is abstained from: {why}",)


def _chosen_on(loaded: LoadedRun) -> tuple[str, ...]:
    spec = loaded.recipe.training
    chose = [f"chose the training step (best {spec.best_metric})"] if spec.best_metric is not None else []
    chose += ["fitted the temperature of its head"] if spec.temperature else []
    if not chose:
        return ()
    return (
        f"the threshold of abstain was chosen on the validation rows that {' and '.join(chose)}: "
        "the promised risk is slightly optimistic",
    )
