"""Every kind of task by name. A new kind is a file in this folder and a line here."""

from __future__ import annotations

from collections.abc import Mapping

from monteclora.data.kinds import Kind
from monteclora.tasks.base import TaskKind
from monteclora.tasks.causal_lm import CausalLM
from monteclora.tasks.classification import Classification
from monteclora.tasks.multi_label import MultiLabel
from monteclora.tasks.regression import Regression

__all__ = ["KINDS"]

KINDS: Mapping[Kind, TaskKind] = {
    kind.name: kind for kind in (Classification(), CausalLM(), Regression(), MultiLabel())
}
