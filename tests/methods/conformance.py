"""What every method must pass: a method that is registered is tested by this suite without another line."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from monteclora.errors import ConfigError
from monteclora.evaluation.prediction import predict_file
from monteclora.evaluation.run import evaluate
from monteclora.methods import get_method
from monteclora.runs.loading import load_run
from monteclora.runs.manifest import newest_complete
from monteclora.runs.result import RunResult
from monteclora.runs.run_folder import RunFolder
from monteclora.training import range_test
from monteclora.training.loop import Loop
from monteclora.training.run import train
from monteclora.training.watch import WentWrong
from tests.models import batch_for, bert

__all__ = ["MethodSuite"]

Recipe = dict[str, Any]


def quietly(recipe: Recipe) -> Any:
    return train(recipe, progress=False)


def saved(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "adapter").glob("*.safetensors"))}


def killed(recipe: Recipe, step: int) -> None:
    """Train in a child that is killed when step ``step`` has changed the weights, before anything of it is saved."""

    def work() -> None:
        original = Loop.step

        def stepped(loop: Loop, *args: Any) -> None:
            before = loop.state.step
            original(loop, *args)
            if before + 1 >= step:
                os.kill(os.getpid(), signal.SIGKILL)

        Loop.step = stepped  # type: ignore[method-assign]
        quietly(recipe)

    child = multiprocessing.get_context("fork").Process(target=work)  # to import everything again takes longer
    child.start()
    child.join(300)
    assert child.exitcode == -signal.SIGKILL


class MethodSuite:
    """Subclass it with a fixture ``method``: the name of a registered method."""

    finished: dict[tuple[str, str], RunResult]
    """Runs that the tests of a method share, by method and kind of task; no test changes them."""

    def __init_subclass__(cls) -> None:
        cls.finished = {}

    @pytest.fixture
    def made(self, method: str, assets: Path, tmp_path: Path) -> Any:
        def make(name: str = "run", kind: str = "class", **training: Any) -> Recipe:
            return {
                "name": name,
                "output": str(tmp_path / name),
                "model": {"name": str(assets / ("bert" if kind == "class" else "llama"))},
                "data": {"task": str(assets / f"{kind}.jsonl"), "max_length": 24, "validation_fraction": 0.15},
                "method": {"name": method},
                "training": {
                    "epochs": 2,
                    "batch_size": 8,
                    "learning_rate": 1e-2,
                    "logging_every": 3,
                    **training,
                },
            }

        return make

    @pytest.fixture
    def run(self, made: Any, method: str, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
        """A classifier of ten steps."""
        return self._finished(made, method, "class", tmp_path_factory)

    @pytest.fixture
    def language_run(self, made: Any, method: str, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
        """A language model of ten steps."""
        return self._finished(made, method, "text", tmp_path_factory)

    def _finished(
        self, made: Callable[..., Recipe], method: str, kind: str, folders: pytest.TempPathFactory
    ) -> RunResult:
        if (method, kind) not in self.finished:
            output = str(folders.mktemp(method) / kind)
            self.finished[method, kind] = quietly({**made(kind=kind, save_every=4), "output": output})
        return self.finished[method, kind]

    def test_trains_and_says_what_it_cost(self, run: RunResult) -> None:
        result = run
        events = RunFolder(result.folder).metrics.read()
        losses = [event["loss"] for event in events if event["event"] == "train"]
        assert result.steps == 10
        assert losses[-1] < losses[0]
        assert result.trained_parameters > 0
        assert result.seconds > 0
        assert result.peak_memory_bytes > 0
        assert result.tokens > 0

    def test_evaluates_as_it_validated(self, run: RunResult) -> None:
        found = evaluate(run, "validation", num_samples=0, progress=False)
        assert found.point == pytest.approx(dict(run.metrics), abs=1e-5)

    def test_predicts_a_file(self, run: RunResult, assets: Path, tmp_path: Path) -> None:
        """Each row as an evaluation does, whatever its order in the file."""
        whole = evaluate(run, "train", num_samples=0, progress=False)
        texts = [row["text"] for row in reversed(whole.scored.table.to_pylist())]
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        written = predict_file(run, file, tmp_path / "out.parquet", num_samples=0, progress=False)
        table = pq.read_table(written.path)
        assert table["text"].to_pylist() == texts
        expected = whole.scored.at_mean.probs.max(1)[::-1]
        np.testing.assert_allclose(table["confidence"].to_numpy(), expected, atol=1e-5)

    def test_trains_a_language_model(self, language_run: RunResult) -> None:
        found = evaluate(language_run, "validation", num_samples=0, progress=False)
        assert found.point == pytest.approx(dict(language_run.metrics), abs=1e-5)
        before, after = (
            evaluate(language_run, "train", num_samples=0, base=base, progress=False).point for base in (True, False)
        )
        assert after["nll"] < before["nll"]

    def test_a_language_model_predicts_a_file(self, language_run: RunResult, tmp_path: Path) -> None:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps({"prompt": f"w{i} w{i + 1}"}) + "\n" for i in range(3)))
        written = predict_file(
            language_run, file, tmp_path / "out.parquet", num_samples=0, max_new_tokens=3, progress=False
        )
        table = pq.read_table(written.path)
        assert table["prompt"].to_pylist() == ["w0 w1", "w1 w2", "w2 w3"]
        assert all(isinstance(text, str) for text in table["completion"].to_pylist())
        assert all(0 < value <= 1 for value in table["confidence"].to_pylist())

    def test_loads_in_a_fresh_process(self, run: RunResult) -> None:
        result = run
        here = evaluate(result, "validation", num_samples=0, progress=False).scored.at_mean.probs
        code = (
            "import sys, json; from monteclora.evaluation.run import evaluate; import tests.methods.registered;"
            f"found = evaluate({str(result.folder)!r}, 'validation', num_samples=0, progress=False);"
            "print(json.dumps(found.scored.at_mean.probs.tolist()))"
        )
        output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        np.testing.assert_allclose(json.loads(output.splitlines()[-1]), here, atol=1e-6)

    def test_resumes_to_the_bit_after_a_kill(self, run: RunResult, made: Any, tmp_path: Path) -> None:
        killed(made("parts", save_every=4), step=7)
        checkpoint = newest_complete(RunFolder(tmp_path / "parts").checkpoints)
        assert checkpoint is not None
        assert checkpoint.total_step == 4
        assert RunFolder(tmp_path / "parts").finished is None
        quietly(made("parts", save_every=4))
        assert saved(run.folder) == saved(tmp_path / "parts")

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

    def test_merges_where_it_can(self, run: RunResult) -> None:
        loaded = load_run(run.folder)
        method = get_method(loaded.recipe.method.name)
        try:
            merged = method.merge(loaded.model)
        except ConfigError:
            return
        batch = {name: value for name, value in batch_for(bert).items() if name != "labels"}
        with torch.no_grad():
            expected = loaded.model(**batch).logits
            torch.testing.assert_close(merged.eval()(**batch).logits, expected, rtol=1e-4, atol=1e-5)
