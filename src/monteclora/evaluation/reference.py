"""What a run keeps of its own rows to judge new ones by: features of training rows, and when to abstain."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import ArrayLike

from monteclora.data.encoding import encode
from monteclora.data.splitting import subset
from monteclora.errors import CheckpointError, DataError
from monteclora.metrics.selective import Abstention, abstention_threshold
from monteclora.prediction.novelty import NOVELTY_FILE, Novelty, Seen, look_at, most_rows
from monteclora.prediction.sampler import MEAN, Sampler
from monteclora.runs.calibration import weights_sha256
from monteclora.runs.loading import LoadedRun
from monteclora.runs.run_folder import RunFolder
from monteclora.system.atomic import write_file
from monteclora.tasks import load
from monteclora.tasks.classification import classify

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["ABSTENTION_FILE", "LEVEL", "RISK", "Judge", "abstention_of", "novelty_of", "see"]

ABSTENTION_FILE = "abstention.json"
RISK, LEVEL = 0.1, 0.9

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Judge:
    """Tells of new rows how novel they are, and which answers to abstain from.

    Attributes:
        loaded: the run, a classifier.
        novelty: see :func:`novelty_of`.
        abstention: see :func:`abstention_of`; None where the confidences are calibrated, since the calibrator is fitted
            to the validation rows that the threshold would be chosen on.
    """

    loaded: LoadedRun
    novelty: Novelty
    abstention: Abstention | None

    @classmethod
    def of(
        cls,
        loaded: LoadedRun,
        sampler: Sampler | None,
        seed: int,
        risk: float = RISK,
        level: float = LEVEL,
        calibrated: bool = False,
    ) -> tuple[Judge | None, tuple[str, ...]]:
        """What judges the answers of a run, as far as it has it, and in words what is left out and why.

        Args:
            loaded, sampler, seed, risk, level: see :func:`abstention_of`.
            calibrated: whether a calibrator corrects the confidences.

        Raises:
            CheckpointError: a stored file is damaged.
            ConfigError: ``risk`` or ``level`` is out of range.
        """
        try:
            novelty = novelty_of(loaded)
            if calibrated:
                why = "a calibrator was fitted to the validation rows that its threshold is chosen on"
                return cls(loaded, novelty, None), (f"abstain is left out: {why}",)
            return cls(loaded, novelty, abstention_of(loaded, sampler, seed, risk, level)), ()
        except DataError as error:
            return None, (f"novelty and abstain are left out: {error}",)

    def columns(self, rows: Dataset, confidence: ArrayLike) -> dict[str, list[Any]]:
        """``novelty``, and ``abstain`` where there is a threshold, of rows answered with this confidence, (B,)."""
        found: dict[str, list[Any]] = {"novelty": self.novelty.of(see(self.loaded, rows)).tolist()}
        if self.abstention is not None:
            found["abstain"] = self.abstention.abstains(confidence).tolist()
        return found


def see(loaded: LoadedRun, rows: Dataset) -> Seen:
    """Features and energies of rows of texts; see :func:`monteclora.prediction.novelty.look_at`."""
    encoded = encode(rows, loaded.kind, loaded.tokenizer, loaded.recipe.data.max_length).dataset.to_list()
    with loaded.precision():
        return look_at(loaded.model, encoded, loaded.collate, loaded.recipe.training.eval_batch_size)


def novelty_of(loaded: LoadedRun) -> Novelty:
    """The run's reference for novelty, from its folder, or made of its training and validation rows and stored there.

    Training rows beyond a few MB of features are left out, chosen by their content.

    Raises:
        CheckpointError: the stored file is damaged.
        DataError: the run's rows are gone, or there are no validation rows.
    """
    path = loaded.folder / NOVELTY_FILE
    if path.exists():
        return Novelty.load(path)
    held_out, data = _validation(loaded), load(loaded.recipe.data, ("train",))
    width = see(loaded, held_out.select(range(1))).features.shape[1]
    found = Novelty.fit(see(loaded, subset(data.split("train"), most_rows(width), seed=0)), see(loaded, held_out))
    _store(path, lambda: found.save(path))
    return found


def abstention_of(loaded: LoadedRun, sampler: Sampler | None, seed: int, risk: float, level: float) -> Abstention:
    """The confidence above which answers keep the promise, chosen on validation rows and stored in the run folder.

    What is stored is taken where it was chosen for the same draws of the same weights, risk and level.

    Args:
        loaded: the run.
        sampler: of the draws; None for the mean.
        seed: of the draws.
        risk, level: the promise, see :func:`monteclora.metrics.selective.abstention_threshold`.

    Raises:
        CheckpointError: the stored file is damaged.
        ConfigError: ``risk`` or ``level`` is out of range.
        DataError: the run's rows are gone, or there are no validation rows.
    """
    path = loaded.folder / ABSTENTION_FILE
    how = {
        "sampler": MEAN.name if sampler is None else sampler.name,
        "num_samples": 0 if sampler is None else sampler.num_samples,
        "seed": seed,
        "risk": risk,
        "level": level,
        "weights_sha256": weights_sha256(RunFolder(loaded.folder).adapter),  # the posterior's scale is one of them
    }
    if path.exists():
        stored = _read(path)
        if all(stored.get(name) == value for name, value in how.items()):
            return _abstention(path, stored)
    rows = _validation(loaded)
    predictor = loaded.predictor(sampler)
    (predictions,), _ = classify(predictor, rows, predictor.samplers[-1:])
    confidence, correct = predictions.probs.max(1), predictions.probs.argmax(1) == rows["label"][:]
    found = abstention_threshold(confidence, correct, risk, level)
    # JSON has neither infinity nor NaN: text stands for them
    facts = {
        name: value if not isinstance(value, float) or math.isfinite(value) else str(value)
        for name, value in dataclasses.asdict(found).items()
    }
    _store(path, lambda: write_file(path, (json.dumps({"format": 1, **facts, **how}, indent=2) + "\n").encode()))
    return found


def _store(path: Path, write: Callable[[], None]) -> None:
    """Keep what can be measured again: a run folder that cannot be written to does not stop an answer."""
    try:
        write()
    except CheckpointError as error:
        _log.warning("%s is not kept, and is measured again next time: %s", path.name, error)


def _validation(loaded: LoadedRun) -> Dataset:
    data = load(loaded.recipe.data, ("train", "validation"))
    if "validation" not in data.splits:
        raise DataError(
            f"{loaded.folder} has no validation rows, which novelty and abstention are measured on",
            "Give data.validation_file or a data.validation_fraction above 0, and train again.",
        )
    return data.split("validation")


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error})", "Remove it; it is made again when needed.") from None
    return found


def _abstention(path: Path, stored: dict[str, Any]) -> Abstention:
    try:
        kinds = {"examples": int, "answered": int, "errors": int}
        values: dict[str, Any] = {
            field.name: kinds.get(field.name, float)(stored[field.name]) for field in dataclasses.fields(Abstention)
        }
        return Abstention(**values)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} is damaged ({reason})", "Remove it; it is made again when needed.") from None
