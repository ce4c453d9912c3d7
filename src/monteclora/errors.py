"""The error taxonomy. Every error a user can cause carries what to do about it."""

from __future__ import annotations

import re

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DivergenceError",
    "MonteCLoRAError",
    "NotAtHandError",
    "ServerError",
    "UnsafeCodeError",
    "visible",
]


# what a terminal would obey (escape sequences, writing from right to left) or an encoder refuse
_NOT_SHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str, keep: str = "") -> str:
    """Text out of files with what a terminal would obey, or an encoder refuse, as escapes; ``keep`` stays as it is."""
    return _NOT_SHOWN.sub(lambda match: match[0] if match[0] in keep else ascii(match[0])[1:-1], text)


class MonteCLoRAError(Exception):
    """An error with a remedy.

    Args:
        message: what is wrong, naming the file, field or value and what was expected.
        hint: what to do about it, as an imperative sentence.

    ``str(error)`` is one line: the message, then the hint; control characters, which names and values out of files may
    hold, are escaped in it. ``exit_code`` is the status the command line ends with.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.message.rstrip('.')}. {self.hint}" if self.hint else self.message
        return visible(" ".join(text.split()))


class ConfigError(MonteCLoRAError, ValueError):
    """A recipe, option or configuration value is wrong."""


class DataError(MonteCLoRAError, ValueError):
    """A data file, column, row or label is wrong."""


class NotAtHandError(ConfigError, DataError):
    """A model or data set is not on this machine, and cannot be fetched from the hub."""


class CheckpointError(MonteCLoRAError):
    """A run, checkpoint or adapter folder is missing, damaged or of another kind."""


class DivergenceError(MonteCLoRAError):
    """The loss or a gradient became non-finite."""

    exit_code = 3


class ServerError(MonteCLoRAError):
    """A server cannot be reached, or answers what was not asked."""


class UnsafeCodeError(MonteCLoRAError):
    """Loading would run code that came with the model or the data."""
