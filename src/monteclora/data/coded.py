"""Many values of which few are different."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

__all__ = ["Coded", "distinct"]


class Coded(Sequence[Any]):
    """Values of which there are few: each once, and the place of each row's among them."""

    def __init__(self, values: Sequence[Any], codes: Any) -> None:
        self.values, self.codes = values, codes

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: Any) -> Any:
        return self.values[self.codes[index]]

    def __iter__(self) -> Iterator[Any]:
        return map(self.values.__getitem__, self.codes.tolist())


def distinct(values: Iterable[Any]) -> set[Any]:
    """The different ones among values; of coded ones without a look at each."""
    return set(values.values if isinstance(values, Coded) else values)
