"""The kinds of task that rows can be for."""

from typing import Literal

__all__ = ["TEXT_KINDS", "Kind"]

Kind = Literal["classification", "causal_lm", "regression", "multi_label"]

TEXT_KINDS: frozenset[Kind] = frozenset(("classification", "regression", "multi_label"))
"""Those whose rows are texts, with a label, a score or several labels each; the others' are prompts to complete."""
