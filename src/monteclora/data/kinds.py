"""The kinds of task that rows can be for."""

from typing import Literal

__all__ = ["Kind"]

Kind = Literal["classification", "causal_lm"]
