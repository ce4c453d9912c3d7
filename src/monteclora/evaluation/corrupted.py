"""The same rows as people would send them in a hurry: what a run's metrics become under each corruption."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from monteclora.data.corruption import CORRUPTIONS, STRENGTHS, corrupted_rows
from monteclora.data.kinds import TEXT_KINDS
from monteclora.errors import ConfigError
from monteclora.tasks.kinds import KINDS

if TYPE_CHECKING:
    from datasets import Dataset

    from monteclora.runs.loading import LoadedRun
    from monteclora.tasks.base import Predictor

__all__ = ["TITLES", "check_corruptible", "corrupted_count", "under_corruption"]

TITLES = {"typos": "typos", "words_dropped": "words dropped", "cut": "texts cut", "upper_case": "upper case"}
"""Of the corruptions, for people."""


def check_corruptible(loaded: LoadedRun) -> None:
    """Raises ConfigError for a run whose rows are no texts with labels or scores."""
    if loaded.kind not in TEXT_KINDS:
        raise ConfigError(
            f"{loaded.folder} is a run of {loaded.kind}, and shift corrupts the texts of rows with labels or scores",
            "Leave --shift out.",
        )


def corrupted_count(rows: int, samplers: int) -> int:
    """How many rows a predictor with so many samplers tells :func:`under_corruption` of, by its ``progress``."""
    return rows * samplers * len(CORRUPTIONS) * len(STRENGTHS)


def under_corruption(loaded: LoadedRun, predictor: Predictor, rows: Dataset) -> Sequence[dict[str, Any]]:
    """Metrics of corrupted rows: fitted to clean rows and measured on others (Ovadia et al., NeurIPS 2019).

    Args:
        loaded: the run.
        predictor: as it predicted the clean rows.
        rows: labelled.

    Returns:
        For each corruption and strength ``corruption``, ``strength``, ``changed`` (the share of letters or words), and
        ``point`` and ``posterior`` as an evaluation has them.
    """
    found = []
    for name, (_, shares) in CORRUPTIONS.items():
        for strength, share in zip(STRENGTHS, shares, strict=True):
            scored = KINDS[loaded.kind].score(predictor, corrupted_rows(rows, name, strength))
            posterior = None if scored.posterior is None else dict(scored.posterior)
            about = {"corruption": name, "strength": strength, "changed": share}
            found.append({**about, "point": dict(scored.point), "posterior": posterior})
    return found
