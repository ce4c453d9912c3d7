"""The error taxonomy. Every error a user can cause carries what to do about it."""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DivergenceError",
    "MonteCLoRAError",
    "UnsafeCodeError",
]


class MonteCLoRAError(Exception):
    """An error with a remedy.

    Args:
        message: what is wrong, naming the file, field or value and what was expected.
        hint: what to do about it, as an imperative sentence.

    ``str(error)`` is one line: the message, then the hint. ``exit_code`` is the status the command line ends with.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.message.rstrip('.')}. {self.hint}" if self.hint else self.message
        return " ".join(text.split())


class ConfigError(MonteCLoRAError, ValueError):
    """A recipe, option or configuration value is wrong."""


class DataError(MonteCLoRAError, ValueError):
    """A data file, column, row or label is wrong."""


class CheckpointError(MonteCLoRAError):
    """A run, checkpoint or adapter folder is missing, damaged or of another kind."""


class DivergenceError(MonteCLoRAError):
    """The loss or a gradient became non-finite."""

    exit_code = 3


class UnsafeCodeError(MonteCLoRAError):
    """Loading would run code that came with the model or the data."""
