"""What a run keeps of its own rows to judge new ones by: features of training rows, and when to abstain."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

__all__ = ["ABSTENTION_FILE", "abstention_of", "novelty_of", "see"]

ABSTENTION_FILE = "abstention.json"


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
    found.save(path)
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
    write_file(path, (json.dumps({"format": 1, **facts, **how}, indent=2) + "\n").encode())
    return found


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
