"""Numbers formatted for a reader."""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["count", "decimals", "duration", "signed", "size"]

MINUS = "\N{MINUS SIGN}"
_SPACE = "\N{NO-BREAK SPACE}"


def decimals(digits: int) -> Callable[[float], str]:
    """A formatter with ``digits`` places after the point; a value that is not finite is called so."""

    def show(value: float) -> str:
        return f"{value:.{digits}f}".replace("-", MINUS) if math.isfinite(value) else "not finite"

    return show


def signed(value: float, digits: int = 3) -> str:
    """``value`` with its sign, for a difference; that of what rounds to zero is a plus."""
    return f"{value:+z.{digits}f}".replace("-", MINUS)


def count(value: float) -> str:
    """A whole number, its thousands apart: 1 234 567."""
    return f"{round(value):,}".replace(",", _SPACE)


def duration(seconds: float) -> str:
    """Seconds as "8.4 s", "48 s", "3 min 20 s" or "1 h 05 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f}{_SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest}{_SPACE}s"
    if minutes < 60:
        return f"{minutes}{_SPACE}min {rest:02d}{_SPACE}s"
    return f"{minutes // 60}{_SPACE}h {minutes % 60:02d}{_SPACE}min"


def size(number_of_bytes: float) -> str:
    """Bytes as kB, MB or GB: powers of 1000."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if number_of_bytes >= scale:
            return f"{number_of_bytes / scale:.{2 if unit == 'GB' else 0}f}{_SPACE}{unit}"
    return f"{number_of_bytes / 1e3:.0f}{_SPACE}kB"
