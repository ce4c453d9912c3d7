"""Libraries that keep their reports and progress bars to themselves."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from transformers.utils import logging as transformers_logging

__all__ = ["quiet_libraries"]


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Let the libraries tell errors only; what matters of their warnings is checked or measured by the caller."""
    # bitsandbytes warns of every cast of an 8-bit layer's input
    quantization = logging.getLogger("bitsandbytes")
    level = quantization.level
    quantization.setLevel(logging.ERROR)
    verbosity, bars = transformers_logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            # peft and transformers deprecate each other's names
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|accelerate")
            yield
    finally:
        quantization.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()
