"""What every test runs under: one thread, no network, and no warning that is ours."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

# read when torch, transformers and tokenizers are first imported, so set before any test module is
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# what is tokenised is cached: by the code as it is now, not as it was in an earlier run of the tests
_models = Path(os.environ.get("MONTECLORA_CACHE") or Path.home() / ".cache" / "monteclora") / "models"
_cache = Path(tempfile.mkdtemp(prefix="monteclora-tests-"))
_models.mkdir(parents=True, exist_ok=True)
(_cache / "models").symlink_to(_models)  # what takes long to make stays
os.environ["MONTECLORA_CACHE"] = str(_cache)
atexit.register(shutil.rmtree, _cache, ignore_errors=True)

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

torch.set_num_threads(1)
# a failing example is the same on every machine and in every run, and no machine is too slow
settings.register_profile("monteclora", derandomize=True, deadline=None, database=None)
settings.load_profile("monteclora")


def pytest_configure(config: pytest.Config) -> None:
    """Leave slow tests out unless marks are asked for, others unless they are named; our warnings are errors."""
    marks = config.option.markexpr or "not slow"
    left_out = [mark for mark in ("nightly", "serving") if mark not in marks]
    config.option.markexpr = " and not ".join([f"({marks})", *left_out])
    # those of the libraries below stay warnings
    config.addinivalue_line("filterwarnings", r"error:::monteclora(\.|$)")
