"""Dividing and thinning data by a hash of each row's content.

A row's place depends on the seed and on its own content only: the order of the file does not matter, equal
rows stay together, and a subset of 500 rows is part of the subset of 1,000.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from monteclora.data.canonical import canonical_batches
from monteclora.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["carve_validation", "content_ranks", "content_sha256", "shared_inputs", "subset"]


def carve_validation(
    train: Dataset, fraction: float, seed: int, name: str, groups: Sequence[str] = ()
) -> tuple[Dataset, Dataset]:
    """Divide ``train`` into what stays and ``fraction`` of the rows of each label; equal rows are not parted.

    Where labels have too few rows each for that, ``fraction`` of all rows are chosen, and every label keeps one.

    Args:
        train: the rows.
        fraction: of them.
        seed: chooses them.
        name: of the data, for messages.
        groups: of each row; rows of a group are not parted, and labels then not heeded.

    Raises:
        DataError: there are too few rows or groups.
    """
    if groups:
        chosen = _whole_groups(groups, fraction, seed)
    else:
        labels = train["label"][:] if "label" in train.column_names else []
        if not labels or not isinstance(labels[0], int):  # scores, or several labels of a row: all rows alike
            labels = [None] * len(train)
        ranks = content_ranks(train, seed, "validation")
        by_label: dict[Any, list[int]] = defaultdict(list)
        for index, label in enumerate(labels):
            by_label[label].append(index)
        members = [sorted(rows, key=lambda index: ranks[index]) for rows in by_label.values()]
        chosen = {index for rows in members for index in _first_of(rows, round(fraction * len(rows)), ranks)}
        if not chosen:
            spare = sorted((index for rows in members for index in rows[:-1]), key=lambda index: ranks[index])
            few = set(spare[: round(fraction * len(train))])
            counts = [sum(index in few for index in rows) for rows in members]
            chosen = {i for rows, n in zip(members, counts, strict=True) for i in _first_of(rows, n, ranks)}
    if not chosen:
        what = f"{len(set(groups))} groups" if groups else f"{len(train)} rows"
        raise DataError(
            f"{name} has {what}, too few to set {fraction:.0%} aside for validation",
            "Give data.validation_file or a larger data.validation_fraction.",
        )
    kept = [index for index in range(len(train)) if index not in chosen]
    return train.select(kept), train.select(sorted(chosen))


def _first_of(rows: Sequence[int], count: int, ranks: Sequence[bytes]) -> Sequence[int]:
    """At most this many of the rows in their order, never all, and equal ones only together."""
    cut = min(count, len(rows) - 1)
    while cut > 0 and ranks[rows[cut - 1]] == ranks[rows[cut]]:
        cut -= 1
    return rows[:cut]


def _whole_groups(groups: Sequence[str], fraction: float, seed: int) -> set[int]:
    """The rows of groups in the order of their hash, until these are enough; one group stays."""
    members: dict[str, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    ordered = sorted(members, key=lambda group: hashlib.sha256(f"{seed} group {group}".encode()).digest())
    chosen: set[int] = set()
    for group in ordered[:-1]:
        if len(chosen) + len(members[group]) / 2 > fraction * len(groups):
            break
        chosen.update(members[group])
    return chosen


def shared_inputs(train: Dataset, other: Dataset) -> int:
    """How many rows of ``other`` have texts, or a prompt, that stand in ``train`` too."""
    known = set(_inputs(train))
    return sum(each in known for each in _inputs(other))


def _inputs(rows: Dataset) -> Iterator[int]:
    names = [name for name in ("text", "text_pair", "prompt", "messages") if name in rows.column_names]
    for batch in rows.select_columns(names or rows.column_names).iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            yield hash(str(values))


def subset(rows: Dataset, count: int | None, seed: int) -> Dataset:
    """At most ``count`` rows, in their order; all of them for None."""
    if count is None or count >= len(rows):
        return rows
    ranks = content_ranks(rows, seed, "subset")
    return rows.select(sorted(sorted(range(len(rows)), key=lambda index: ranks[index])[:count]))


def content_sha256(rows: Dataset) -> str:
    """The checksum of the rows' content, the same whatever kind of file they came from."""
    digest = hashlib.sha256()
    for lines in canonical_batches(rows, end="\n"):
        offsets = np.frombuffer(lines.buffers()[1], np.int64)
        digest.update(memoryview(lines.buffers()[2])[: offsets[len(lines)]])
    return digest.hexdigest()


def content_ranks(rows: Dataset, seed: int, purpose: str) -> list[bytes]:
    """A hash of each row's content with the seed and a purpose: sorting by it is a shuffle that content decides."""
    salt = f"{seed} {purpose} ".encode()
    return [hashlib.sha256(salt + row).digest() for batch in canonical_batches(rows) for row in batch.to_pylist()]
