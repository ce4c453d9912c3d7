"""The benchmarks are scripts in a folder of their own, which import each other by name."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from tests.training.conftest import assets  # noqa: F401
