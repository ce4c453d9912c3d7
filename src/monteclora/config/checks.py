"""Checks of arguments that several functions take."""

from __future__ import annotations

from monteclora.errors import ConfigError

__all__ = ["check_at_least_one"]


def check_at_least_one(**values: int | None) -> None:
    """Raises ConfigError that names the first argument below 1; None stands for its default."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}, expected at least 1", "Leave it out for the default.")
