"""Scores as they stand in the data to numbers, and the scale on which they are learned."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from monteclora.config import brief
from monteclora.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

__all__ = ["ScoreScale", "ScoreSet", "describe_scores", "read_score"]

_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")


def read_score(value: Any) -> float:
    """A score as a number.

    Raises:
        ValueError: there is none, or it is no finite number; the message says which.
    """
    match value:
        case bool():
            raise ValueError(f"has the score {str(value).lower()}, expected a number")
        case int() | float():
            found = float(value) if not isinstance(value, int) or abs(value) < 2**1000 else math.inf
        case str() if value.strip():
            text = value.strip()
            try:
                found = float(text)
            except ValueError:
                comma = ", expected a decimal point" if _DECIMAL_COMMA.fullmatch(text) else ", expected a number"
                raise ValueError(f"has the score {brief(text)}{comma}") from None
        case None | str():
            raise ValueError("has no score")
        case _:
            raise ValueError(f"has the score {brief(value)}, expected a number")
    if not math.isfinite(found):
        raise ValueError(
            f"has no score ({found})" if math.isnan(found) else f"has the score {found}, which is infinite"
        )
    return found


class ScoreSet:
    """Scores are their own values; see :class:`monteclora.data.labels.Targets`."""

    @property
    def names(self) -> None:
        """None."""
        return None

    @property
    def type(self) -> pa.DataType:
        """float64."""
        import pyarrow as pa

        return pa.float64()

    def value_of(self, key: float, place: str) -> float:
        """The score itself."""
        return key


@dataclass(frozen=True)
class ScoreScale:
    """Scores are learned as ``(score - centre) / spread``.

    Attributes:
        centre: mean of the training scores, in their unit.
        spread: their standard deviation, above 0.
    """

    centre: float
    spread: float

    @classmethod
    def of(cls, scores: Sequence[float], name: str) -> ScoreScale:
        """The scale of training scores. Raises DataError that names the data where all are equal."""
        import numpy as np

        found = np.asarray(scores, dtype=np.float64)
        centre, spread = float(found.mean()), float(found.std())
        if np.ptp(found) == 0 or not math.isfinite(spread):  # rounding gives equal scores a deviation above 0
            raise DataError(f"all training rows of {name} have the score {found[0]:g}", "Give rows of other scores.")
        return cls(centre, spread)

    def standardised(self, rows: Dataset) -> Dataset:
        """The rows with the scores in the column ``label`` as they are learned."""
        import numpy as np

        if "label" not in rows.column_names:
            return rows
        scores = (np.asarray(rows["label"][:], dtype=np.float64) - self.centre) / self.spread
        return rows.remove_columns("label").add_column("label", scores)


def describe_scores(splits: Mapping[str, Sequence[float]]) -> list[str]:
    """The scores of each split for people."""
    import numpy as np

    notes = []
    for split, values in splits.items():
        found = np.asarray(values, dtype=np.float64)
        notes.append(
            f"{split}: scores from {found.min():g} to {found.max():g}, mean {found.mean():.4g}, standard deviation "
            f"{found.std():.4g}, {len(np.unique(found)):,} different ones"
        )
    return notes
