"""One quick pass over the bytes of a text file: whether a fast reader must see in it what the line-exact one sees.

Fast readers forgive what the line-exact ones refuse by line: other encodings, stray quotes, objects that share a line.
A file that may hold any of these is left to the line-exact reader; a wrong alarm costs time alone.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["plain_lines", "quotes_of_plain_csv"]

_CHUNK = 2**20  # bytes, which stay in the processor's cache while they are looked at several times
_LONGEST_LINE = 2**22  # bytes
_QUOTE, _LINE_FEED, _RETURN, _OPEN, _CLOSE = b'"\n\r{}'


def _whole_lines(path: Path, is_utf8: bool = False) -> Iterator[bytes]:
    """Pieces of the file, of whole lines; the byte-order mark is left out.

    Raises:
        UnicodeDecodeError: the file is not UTF-8, where that is not known yet.
        ValueError: it holds a NUL, a carriage return that ends no line, or a line too long to be sure of.
    """
    with path.open("rb") as file:
        mark = file.read(len(codecs.BOM_UTF8))
        start = b"" if mark == codecs.BOM_UTF8 else mark
        while chunk := start + file.read(_CHUNK):
            start = b""
            rest = file.readline(_LONGEST_LINE)
            if not (is_utf8 or (chunk.isascii() and rest.isascii())):
                (chunk + rest).decode()
            chunk += rest
            if len(rest) >= _LONGEST_LINE or b"\0" in chunk or (b"\r" in chunk and _has_lone_return(chunk)):
                raise ValueError("bytes that need a closer look")
            yield chunk


def _has_lone_return(text: bytes) -> bool:
    """Whether a carriage return is not followed by a line feed; several times as fast as two calls of ``count``."""
    data = np.frombuffer(text, np.uint8)
    returns = data == _RETURN
    pairs = returns[:-1] & (data[1:] == _LINE_FEED)
    return bool(np.count_nonzero(returns) != np.count_nonzero(pairs))


def quotes_of_plain_csv(path: Path, delimiter: str) -> bool | None:
    """Whether there are quotes in a file in UTF-8; None where it needs a closer look.

    It does where it has a NUL or a lone carriage return, or a quote that does not open, close or double another: one
    stands behind a delimiter, a line end or a quote where it opens, and before one where it closes.
    """
    around = np.zeros(256, dtype=bool)
    around[list(f'"\n\r{delimiter}'.encode())] = True
    inside = quoted = False
    try:
        for text in _whole_lines(path, is_utf8=True):
            if b'"' not in text:
                if inside:
                    return None  # a field that may be longer than the other reader takes
                continue
            quoted = True
            found = _after_quotes(b"\n" + text + b"\n", inside, around)
            if found is None:
                return None
            inside = found
    except ValueError:
        return None
    return None if inside else quoted


def _after_quotes(text: bytes, inside: bool, around: NDArray[np.bool_]) -> bool | None:
    """Whether the end of the text is inside quotes, as its beginning is; None where a quote is beside other bytes."""
    data = np.frombuffer(text, np.uint8)
    places = np.flatnonzero(data == _QUOTE)
    opening = (np.arange(len(places)) % 2 == 0) ^ inside
    if not (around[data[places[opening] - 1]].all() and around[data[places[~opening] + 1]].all()):
        return None
    return bool(inside ^ (len(places) % 2 == 1))


def plain_lines(path: Path) -> int | None:
    """How many lines the file has, all of which begin with { and end with }; None where it is not such a file in UTF-8.

    No line break can then be inside of an object: there would be a comma on one side of it.
    """
    lines = 0
    try:
        for text in _whole_lines(path):
            data = np.frombuffer(text if text.endswith(b"\n") else text + b"\n", np.uint8)
            ends = np.flatnonzero(data == _LINE_FEED)
            starts = np.concatenate([[0], ends[:-1] + 1])
            last = ends - 1
            if b"\r" in text:
                last = last - (data[last] == _RETURN)
            if not ((data[starts] == _OPEN).all() and (data[last] == _CLOSE).all()):
                return None
            lines += len(last)
    except ValueError:  # also what is not UTF-8
        return None
    return lines
