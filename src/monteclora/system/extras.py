"""Packages that only some people need, and what to say to the others."""

from __future__ import annotations

import importlib.util

from monteclora.errors import ConfigError

__all__ = ["require_gguf"]


def require_gguf(purpose: str) -> None:
    """Raises ConfigError if the package gguf is not installed; ``purpose`` is what needs it, as "reading a.gguf"."""
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(f"{purpose} needs the package gguf", "Run `pip install 'monteclora[gguf]'`.")
