"""What the tests of every method need."""

from __future__ import annotations

from typing import Any

from monteclora.config import build
from monteclora.methods import Method
from tests.models import llama


def options(method: Method, **values: Any) -> Any:
    return build(method.options, {"name": method.name, **values})


def wrap(method: Method, model: Any = None, kind: str = "causal_lm", seed: int = 0, **values: Any) -> Any:
    return method.wrap(llama() if model is None else model, options(method, **values), kind, seed)
