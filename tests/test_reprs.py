"""What the interactive prompt shows of results: a line, with what one looks for first."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import monteclora
from monteclora.evaluation.calibrate import CalibrationResult
from monteclora.evaluation.generation import GenerationResult
from monteclora.evaluation.judging import Score
from monteclora.evaluation.text import TextModel, TextPredictions
from monteclora.runs.loading import LoadedRun
from monteclora.runs.result import RunResult
from monteclora.studies.study import StudyResult
from tests.models import llama

FOLDER = Path("runs/mine")


def of(kind: type[Any], **values: Any) -> Any:
    """A result with these fields; the others are not shown."""
    found = object.__new__(kind)
    for name, value in values.items():
        object.__setattr__(found, name, value)
    return found


RUN = of(LoadedRun, folder=FOLDER, model=llama())
SHOWN = {
    "RunResult(runs/mine, step 90 of 100, accuracy=0.7123, loss=0.9)": of(
        RunResult, folder=FOLDER, steps=100, kept_step=90, metrics={"accuracy": 0.71234, "loss": 0.9}
    ),
    "StudyResult(runs/mine, 3 of 8 trials done)": of(
        StudyResult, folder=FOLDER, plan=SimpleNamespace(trials=[None] * 8), outcomes=dict.fromkeys("abc"), summaries=()
    ),
    "LoadedRun(runs/mine, LlamaForCausalLM)": RUN,
    "TextModel(runs/mine)": TextModel(RUN),
    "TextPredictions(2 texts: labels, confidence, total, aleatoric, epistemic)": TextPredictions(
        ["a", "b"], ["x", "y"], [0.5, 0.5], [0.7, 0.7], [0.6, 0.6], [0.1, 0.1], None, None
    ),
    "GenerationResult(runs/mine, gsm8k, test, 1319 problems: strict=0.25, flexible=0.5)": of(
        GenerationResult,
        folder=FOLDER,
        task="gsm8k",
        split="test",
        problems=1319,
        scores={"strict": Score(0.25), "flexible": Score(0.5)},
    ),
    "CalibrationResult(runs/mine, factor=8, 150 rows, least NLL)": of(
        CalibrationResult, folder=FOLDER, factor=8.0, rows=(150, 150), criterion="least NLL"
    ),
    "PredictiveDistribution(8 draws, 64 inputs, 3 classes)": monteclora.PredictiveDistribution(torch.ones(8, 64, 3)),
}


@pytest.mark.parametrize("shown", SHOWN)
def test_a_result_is_shown_in_a_line(shown: str) -> None:
    assert repr(SHOWN[shown]) == shown


def test_the_package_lists_its_public_names_alone() -> None:
    assert dir(monteclora) == sorted([*monteclora.__all__, "__version__"])
    assert all(getattr(monteclora, name) is not None for name in monteclora.__all__)
