"""Text files as numbered lines: plain, gzip or Zstandard, in UTF-8 or another encoding."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import IO, cast

from monteclora.errors import DataError

__all__ = ["COMPRESSIONS", "encoding_of", "text_lines"]

COMPRESSIONS = (".gz", ".zst")
_LONGEST_LINE = 2**26  # bytes, of which a small gzip file can hold thousands of millions
_CHUNK = 2**20
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def encoding_of(path: Path, guess: bool) -> str:
    """UTF-16 where a byte-order mark says so, else UTF-8.

    Args:
        path: a text file.
        guess: whether a file that is not UTF-8 is taken for Windows-1252, as spreadsheets write it.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    with _readable(path), _open_binary(path) as file:
        start = file.read(2)
        if start in _UTF16:
            return "utf-16"
        if not guess:
            return "utf-8"
        try:
            decoder.decode(start)
            while chunk := file.read(_CHUNK):
                if not chunk.isascii() or decoder.getstate()[0]:  # decoding takes five times as long as to look
                    decoder.decode(chunk)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return "cp1252"
    return "utf-8"


def text_lines(path: Path, encoding: str = "utf-8") -> Iterator[tuple[int, str]]:
    """Numbered lines, line ends kept, a byte-order mark removed.

    Raises:
        DataError: the file cannot be read or is damaged, or a line is too long, of another encoding or holds a NUL.
    """
    with _readable(path), _open_binary(path) as file:
        lines = _utf8_lines(path, file) if encoding == "utf-8" else _decoded_lines(path, file, encoding)
        for number, line in lines:
            if "\0" in line:
                raise DataError(f"{path}, line {number} holds a NUL byte", "Is this a text file? Save it as UTF-8.")
            yield number, line


def _utf8_lines(path: Path, file: IO[bytes]) -> Iterator[tuple[int, str]]:
    offset = 0
    for number in count(1):
        raw = file.readline(_LONGEST_LINE + 1)
        if not raw:
            return
        _check_length(path, number, len(raw))
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}, line {number}: byte {offset + error.start} is not UTF-8",
                "Save the file as UTF-8.",
            ) from None
        offset += len(raw)
        yield number, line


def _decoded_lines(path: Path, file: IO[bytes], encoding: str) -> Iterator[tuple[int, str]]:
    text = io.TextIOWrapper(file, encoding, newline="\n")
    with text:
        yield from _numbered(path, text, encoding)


def _numbered(path: Path, text: io.TextIOWrapper, encoding: str) -> Iterator[tuple[int, str]]:
    for number in count(1):
        try:
            line = text.readline(_LONGEST_LINE + 1)
        except UnicodeError:
            raise DataError(
                f"{path}, after line {number - 1}: the text is not {encoding}", "Save the file as UTF-8."
            ) from None
        if not line:
            return
        _check_length(path, number, len(line))
        yield number, line.removeprefix("\ufeff") if number == 1 else line


def _check_length(path: Path, number: int, length: int) -> None:
    if length > _LONGEST_LINE:
        raise DataError(f"{path}, line {number} has more than {_LONGEST_LINE:,} bytes", "Write one row a line.")


def _open_binary(path: Path) -> IO[bytes]:
    match path.suffix.lower():
        case ".gz":
            return cast(IO[bytes], gzip.open(path))
        case ".zst":
            import pyarrow as pa

            return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))
    return path.open("rb")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns what goes wrong while a file is read into DataError."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is a damaged gzip file: {error}", "Get the file again.") from None
    except OSError as error:
        if error.strerror:
            raise DataError(f"cannot read {path}: {error.strerror}", "Check the file's permissions.") from None
        reason = str(error).strip().partition("\n")[0]
        raise DataError(f"{path} is a damaged {path.suffix} file: {reason}", "Get the file again.") from None
