"""What every method must pass: a method that is registered is tested by this suite without another line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from monteclora.errors import ConfigError
from monteclora.evaluation.run import evaluate
from monteclora.methods import get_method
from monteclora.runs.loading import load_run
from monteclora.runs.run_folder import RunFolder
from monteclora.training import range_test
from monteclora.training.loop import Loop
from monteclora.training.run import train
from monteclora.training.watch import WentWrong
from tests.models import batch_for, bert
from tests.training.conftest import StopAfter, train_until

__all__ = ["MethodSuite"]

Recipe = dict[str, Any]


def quietly(recipe: Recipe) -> Any:
    return train(recipe, progress=False)


def saved(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "adapter").glob("*.safetensors"))}


class MethodSuite:
    """Subclass it with a fixture ``method``: the name of a registered method."""

    @pytest.fixture
    def made(self, method: str, assets: Path, tmp_path: Path) -> Any:
        def make(name: str = "run", **training: Any) -> Recipe:
            return {
                "name": name,
                "output": str(tmp_path / name),
                "model": {"name": str(assets / "bert")},
                "data": {"task": str(assets / "class.jsonl"), "max_length": 24, "validation_fraction": 0.15},
                "method": {"name": method},
                "training": {"epochs": 2, "batch_size": 8, "learning_rate": 1e-2, "logging_every": 3, **training},
            }

        return make

    def test_trains_and_says_what_it_cost(self, made: Any) -> None:
        result = quietly(made())
        events = RunFolder(result.folder).metrics.read()
        losses = [event["loss"] for event in events if event["event"] == "train"]
        assert result.steps == 10
        assert losses[-1] < losses[0]
        assert result.trained_parameters > 0
        assert result.seconds > 0
        assert result.peak_memory_bytes > 0
        assert result.tokens > 0

    def test_evaluates_as_it_validated(self, made: Any) -> None:
        result = quietly(made())
        found = evaluate(result, "validation", num_samples=0, progress=False)
        assert found.point == pytest.approx(dict(result.metrics), abs=1e-5)

    def test_loads_in_a_fresh_process(self, made: Any, tmp_path: Path) -> None:
        result = quietly(made())
        here = evaluate(result, "validation", num_samples=0, progress=False).scored.at_mean.probs
        code = (
            "import sys, json; from monteclora.evaluation.run import evaluate; import tests.methods.registered;"
            f"found = evaluate({str(result.folder)!r}, 'validation', num_samples=0, progress=False);"
            "print(json.dumps(found.scored.at_mean.probs.tolist()))"
        )
        output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        np.testing.assert_allclose(json.loads(output.splitlines()[-1]), here, atol=1e-6)

    def test_resumes_to_the_bit(self, made: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        quietly(made("whole"))
        train_until(monkeypatch, StopAfter(3), made("parts"))
        quietly(made("parts"))
        assert saved(tmp_path / "whole") == saved(tmp_path / "parts")

    def test_a_batch_in_parts_has_the_loss_and_the_gradient_of_the_whole(
        self, made: Any, assets: Path, tmp_path: Path
    ) -> None:
        """Before clipping and before the optimiser, which would hide a wrong scale; without noise of its own."""
        quiet = {
            "monteclora": {"sample_scale": 0.0},
            "peft_monteclora": {"sample_scaler": 0.0, "kl_loss_weight": 0.0},
        }

        folder = shutil.copytree(assets / "bert", tmp_path / "without_dropout")
        config = json.loads((folder / "config.json").read_text())
        config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        (folder / "config.json").write_text(json.dumps(config))

        def first_step(**training: Any) -> dict[str, float]:
            recipe = made(str(training), max_steps=1, **{**training, "logging_every": 1})
            recipe["model"] = {"name": str(folder)}
            recipe["method"] |= quiet.get(recipe["method"]["name"], {})
            (event,) = [e for e in RunFolder(quietly(recipe).folder).metrics.read() if e["event"] == "train"]
            return {name: event[name] for name in ("loss", "grad_norm")}

        whole, parts = first_step(), first_step(micro_batch_size=4)
        assert parts == pytest.approx(whole, rel=1e-4)

    def test_finds_its_learning_rate_without_a_trace(
        self, made: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """The run after a range test is bitwise that of the rate given by hand, whatever state the method keeps."""
        monkeypatch.setattr(range_test, "STEPS_PER_DECADE", 2)
        monkeypatch.setattr(range_test, "MOST_STEPS", 15)
        found = quietly(made("auto", learning_rate="auto", max_steps=6)).learning_rate
        quietly(made("given", learning_rate=found, max_steps=6))
        assert saved(tmp_path / "auto") == saved(tmp_path / "given")

    def test_goes_back_without_a_trace(self, made: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Back at its start, the run is bitwise that of half the rate given by hand."""
        original = Loop.step

        def step(loop: Loop, batches: Any) -> None:
            original(loop, batches)
            if loop.watch is not None and loop.state.step == 4:
                raise WentWrong("planted")

        monkeypatch.setattr(Loop, "step", step)
        quietly(made("back", back_off=1, max_steps=6))
        quietly(made("given", learning_rate=5e-3, max_steps=6))
        assert saved(tmp_path / "back") == saved(tmp_path / "given")

    def test_merges_where_it_can(self, made: Any) -> None:
        loaded = load_run(quietly(made()).folder)
        method = get_method(loaded.recipe.method.name)
        try:
            merged = method.merge(loaded.model)
        except ConfigError:
            return
        batch = {name: value for name, value in batch_for(bert).items() if name != "labels"}
        with torch.no_grad():
            expected = loaded.model(**batch).logits
            torch.testing.assert_close(merged.eval()(**batch).logits, expected, rtol=1e-4, atol=1e-5)
