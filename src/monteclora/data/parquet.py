"""Parquet files, read in batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from monteclora.data.table import Row, Table, check_columns, with_rows
from monteclora.errors import DataError

__all__ = ["open_parquet"]


def open_parquet(path: Path) -> Table:
    """Open a Parquet file. Bytes are read as UTF-8, as writers without a text type store them."""
    import pyarrow
    import pyarrow.parquet

    def damaged(error: Exception) -> DataError:
        return DataError(f"{path} is not a whole Parquet file: {_first_line(error)}", "Get the file again.")

    def rows() -> Iterator[Row]:
        number = 0
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=1024):
                    for row in batch.to_pylist():
                        number += 1
                        for name in binary:
                            if row[name] is not None:
                                row[name] = row[name].decode()
                        yield number, row
        except (pyarrow.ArrowException, OSError) as error:
            raise damaged(error) from None
        except (ValueError, OverflowError) as error:  # text that is not UTF-8, dates that Python has not
            raise DataError(
                f"{path}, after row {number}: a value cannot be read: {_first_line(error)}", "Write the file again."
            ) from None

    try:
        schema = pyarrow.parquet.read_schema(path)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise damaged(error) from None
    kinds = (pyarrow.types.is_binary, pyarrow.types.is_large_binary)
    binary = [column.name for column in schema if any(is_kind(column.type) for is_kind in kinds)]
    names = check_columns(str(path), schema.names)
    return with_rows(Table(str(path), names, rows, unit="row"), "has no rows")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
