"""What every test runs under: one thread, no network, and no warning that is ours."""

from __future__ import annotations

import os

# read when torch, transformers and tokenizers are first imported, so set before any test module is
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
# a failing example is the same on every machine and in every run, and no machine is too slow
settings.register_profile("monteclora", derandomize=True, deadline=None, database=None)
settings.load_profile("monteclora")


def pytest_configure(config: pytest.Config) -> None:
    """Leave slow tests out unless marks are asked for, nightly ones unless they are named; our warnings are errors."""
    marks = config.option.markexpr or "not slow"
    config.option.markexpr = marks if "nightly" in marks else f"({marks}) and not nightly"
    # those of the libraries below stay warnings
    config.addinivalue_line("filterwarnings", r"error:::monteclora(\.|$)")
