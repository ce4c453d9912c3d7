"""Dividing and thinning data by a hash of each row's content.

A row's place depends on the seed and on its own content only: the order of the file does not matter, equal
rows stay together, and a subset of 500 rows is part of the subset of 1,000.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from monteclora.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["carve_validation", "content_sha256", "subset"]


def carve_validation(train: Dataset, fraction: float, seed: int, name: str) -> tuple[Dataset, Dataset]:
    """Divide ``train`` into what stays and ``fraction`` of the rows of each label; equal rows are not parted.

    Raises:
        DataError: there are too few rows; ``name`` names the data.
    """
    ranks = _ranks(train, seed, "validation")
    groups: dict[Any, list[int]] = defaultdict(list)
    for index, label in enumerate(train["label"] if "label" in train.column_names else [None] * len(train)):
        groups[label].append(index)
    chosen: set[int] = set()
    for members in groups.values():
        members.sort(key=lambda index: ranks[index])
        cut = min(round(fraction * len(members)), len(members) - 1)
        while cut > 0 and ranks[members[cut - 1]] == ranks[members[cut]]:
            cut -= 1
        chosen.update(members[:cut])
    if not chosen:
        raise DataError(
            f"{name} has {len(train)} rows, too few to set {fraction:.0%} aside for validation",
            "Give data.validation_file or a larger data.validation_fraction.",
        )
    kept = [index for index in range(len(train)) if index not in chosen]
    return train.select(kept), train.select(sorted(chosen))


def subset(rows: Dataset, count: int | None, seed: int) -> Dataset:
    """At most ``count`` rows, in their order; all of them for None."""
    if count is None or count >= len(rows):
        return rows
    ranks = _ranks(rows, seed, "subset")
    return rows.select(sorted(sorted(range(len(rows)), key=lambda index: ranks[index])[:count]))


def content_sha256(rows: Dataset) -> str:
    """The checksum of the rows' content, the same whatever kind of file they came from."""
    digest = hashlib.sha256()
    for row in _canonical_rows(rows):
        digest.update(row + b"\n")
    return digest.hexdigest()


def _ranks(rows: Dataset, seed: int, purpose: str) -> list[bytes]:
    salt = f"{seed} {purpose} ".encode()
    return [hashlib.sha256(salt + row).digest() for row in _canonical_rows(rows)]


def _canonical_rows(rows: Dataset) -> Iterator[bytes]:
    names = sorted(rows.column_names)
    for batch in rows.iter(batch_size=1000):
        for values in zip(*(batch[name] for name in names), strict=True):
            row = dict(zip(names, values, strict=True))
            yield json.dumps(row, sort_keys=True, ensure_ascii=False).encode()
