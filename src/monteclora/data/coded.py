"""Many values of which few are different."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

__all__ = ["Coded"]


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
