"""Rows as canonical JSON, which checksums are of: keys in order, no character escaped that need not be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

__all__ = ["canonical_batches"]

_ROWS = 10_000
_JSON = json.JSONEncoder(sort_keys=True, ensure_ascii=False)


class _Column(NamedTuple):
    """Values in UTF-8, large_binary, and what stands on both sides of each."""

    values: pa.Array
    around: str


def canonical_batches(rows: Dataset, end: str = "") -> Iterator[pa.Array]:
    """Each row in UTF-8 with ``end`` behind it, in arrays of the type large_binary."""
    import pyarrow as pa
    import pyarrow.compute as pc

    names = sorted(rows.column_names)
    for batch in rows.with_format("arrow").iter(batch_size=_ROWS):
        pieces: list[Any] = []
        before = "{"
        for name in names:
            column = _encoded(batch.column(name))
            pieces += [f"{before}{_JSON.encode(name)}: {column.around}", column.values]
            before = f"{column.around}, "
        pieces += [f"{before.removesuffix(', ')}}}{end}", ""]  # the last is the separator
        yield pc.binary_join_element_wise(
            *(pa.scalar(each.encode(), pa.large_binary()) if isinstance(each, str) else each for each in pieces)
        )


def _encoded(column: pa.ChunkedArray) -> _Column:
    """The values of a column as JSON."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if column.num_chunks and not column.null_count:
        values = column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)
        if pa.types.is_integer(values.type):
            return _Column(values.cast(pa.string()).cast(pa.large_binary()), "")
        if pa.types.is_string(values.type):
            escaped, plain = _escaped_rows(values), values.cast(pa.large_binary())
            if not escaped.any():
                return _Column(plain, '"')
            quote, nothing = (pa.scalar(each, pa.large_binary()) for each in (b'"', b""))
            exact = _as_json(values.filter(pa.array(escaped)))
            quoted = pc.binary_join_element_wise(quote, plain, quote, nothing)
            return _Column(pc.replace_with_mask(quoted, pa.array(escaped), exact), "")
    return _Column(_as_json(column), "")


def _as_json(values: pa.Array | pa.ChunkedArray) -> pa.Array:
    import pyarrow as pa

    return pa.array([_JSON.encode(value).encode() for value in values.to_pylist()], pa.large_binary())


def _escaped_rows(values: pa.StringArray) -> NDArray[np.bool_]:
    """Which texts hold a quote, a backslash or a control character."""
    found = np.zeros(len(values), dtype=bool)
    offsets = np.frombuffer(values.buffers()[1], np.int32)[values.offset : values.offset + len(values) + 1]
    if len(values) and values.buffers()[2] is not None:
        data = np.frombuffer(values.buffers()[2], np.uint8)[offsets[0] : offsets[-1]]
        places = np.flatnonzero((data < 0x20) | (data == ord('"')) | (data == ord("\\"))) + offsets[0]
        found[np.searchsorted(offsets, places, side="right") - 1] = True
    return found
