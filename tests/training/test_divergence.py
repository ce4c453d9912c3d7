"""A step whose loss or gradient is not finite: told with its rows, and stopped or skipped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from monteclora.errors import DivergenceError
from monteclora.posterior import AdapterPosterior, Regulariser
from monteclora.runs.manifest import newest_complete
from monteclora.runs.result import RunResult
from monteclora.runs.run_folder import RunFolder
from monteclora.system.tree import load_tree
from monteclora.training import phases
from monteclora.training.batches import Batch
from monteclora.training.divergence import NonFiniteSteps
from monteclora.training.loop import Loop
from monteclora.training.run import train
from tests.training.conftest import Recipe, StopAfter, quietly, trace, train_until

MakeRecipe = Callable[..., Recipe]
PARTS = {"input": "loss", "loss": "loss", "regulariser": "regulariser", "gradient": "gradient"}


class Planted:
    """Not a number in one part of one batch of given steps; ``batches`` has the rows of every batch, step by step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, part: str, steps: set[int], batch: int = 0) -> None:
        self.part, self.steps, self.batch = part, steps, batch
        self.batches: dict[int, list[list[int]]] = {}
        self.loop: Any = None
        self.rows: list[list[int]] = []
        build, step = phases.assemble, Loop.step

        def build_with_hooks(*args: Any) -> Loop:
            self.loop = loop = build(*args)
            self.batches.clear()
            model: Any = loop.model
            model.get_input_embeddings().register_forward_hook(lambda *call: self.poison("input", call[2]))
            weight = next(p for name, p in model.named_parameters() if "lora_B" in name)
            if weight.requires_grad:
                weight.register_hook(lambda gradient: self.poison("gradient", gradient))
            loop.measures = PoisonedMeasures(loop.measures, self)
            return loop

        def note_rows(loop: Loop, batches: list[Batch]) -> None:
            self.rows = [list(batch.rows) for batch in batches]
            step(loop, batches)

        regulariser = AdapterPosterior.regulariser
        monkeypatch.setattr(phases, "assemble", build_with_hooks)
        monkeypatch.setattr(Loop, "step", note_rows)

        def poisoned(posterior: AdapterPosterior) -> Regulariser:
            found = regulariser(posterior)
            return found._replace(coop=self.poison("regulariser", found.coop))

        monkeypatch.setattr(AdapterPosterior, "regulariser", poisoned)

    @property
    def now(self) -> int:
        step: int = self.loop.state.step
        return step + 1

    def poison(self, part: str, value: Tensor) -> Tensor:
        if part == self.part and self.now in self.steps and self.loop.model.training:
            return value * (float("nan") if len(self.batches[self.now]) == self.batch + 1 else 1.0)
        return value


class PoisonedMeasures:
    """The measures of a run, whose losses go through a :class:`Planted`."""

    def __init__(self, measures: Any, planted: Planted) -> None:
        self.measures = measures
        self.planted = planted

    def __getattr__(self, name: str) -> Any:
        return getattr(self.measures, name)

    def loss(self, *args: Any) -> Tensor:
        seen = self.planted.batches.setdefault(self.planted.now, [])
        seen.append(self.planted.rows[len(seen)])
        return self.planted.poison("loss", self.measures.loss(*args))


def diverged(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "diverged.json").read_text())
    return found


def skipped(folder: Path) -> list[dict[str, Any]]:
    return [event for event in RunFolder(folder).metrics.read() if event["event"] == "skipped"]


# -- stopping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, pytest.param(4, marks=pytest.mark.slow), 7])
@pytest.mark.parametrize("planted", PARTS)
def test_stopped_within_the_step_and_told_with_its_rows(
    planted: str, step: int, recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nan = Planted(monkeypatch, planted, {step})
    with pytest.raises(DivergenceError, match=f"the {PARTS[planted]} is not finite at step {step};") as caught:
        quietly(recipe(save_every=1, eval_every=20))
    assert caught.value.exit_code == 3
    facts = diverged(tmp_path / "run")
    (rows,) = nan.batches[step]
    assert (facts["step"], facts["part"], [row["row"] for row in facts["rows"]]) == (step, PARTS[planted], rows)
    assert str(rows[0]) in str(caught.value)
    assert all(row["text"].startswith("[CLS] w") for row in facts["rows"])
    assert max(nan.batches) == step
    checkpoint = newest_complete(tmp_path / "run/checkpoints")
    assert (checkpoint.step if checkpoint else 0) == step - 1
    if checkpoint:
        tensors = load_file(checkpoint.path / "adapter_model.safetensors")
        tensors |= load_file(checkpoint.path / "training_state.safetensors")
        assert all(tensor.isfinite().all() for tensor in tensors.values() if tensor.is_floating_point())


@pytest.mark.parametrize(("planted", "culprits"), [("loss", [1]), ("input", [1]), ("gradient", [0, 1])])
def test_which_of_the_accumulated_batches(
    planted: str, culprits: list[int], recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A gradient is known once they are added up; a loss is each batch's own."""
    nan = Planted(monkeypatch, planted, {2}, batch=1)
    with pytest.raises(DivergenceError, match="at step 2;"):
        quietly(recipe(micro_batch_size=4))
    assert len(nan.batches[2]) == 2
    expected = [row for number in culprits for row in nan.batches[2][number]]
    assert [row["row"] for row in diverged(tmp_path / "run")["rows"]] == expected


def test_the_rows_are_those_of_the_data(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also where one that is too long was left out before them."""
    lines = [{"prompt": "w1", "completion": "w2 " * (12 if number == 1 else 3)} for number in range(9)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = recipe(kind="causal_lm", batch_size=2, epochs=1, non_finite="skip")
    made["data"] = {
        "task": str(tmp_path / "text.jsonl"),
        "validation_fraction": 0,
        "max_length": 10,
        "truncation": "drop",
    }
    Planted(monkeypatch, "gradient", {1, 2, 3, 4})
    quietly(made)
    rows = [row for event in skipped(tmp_path / "run") for row in event["rows"]]
    assert sorted(rows) == [0, 2, 3, 4, 5, 6, 7, 8]


def test_a_run_that_goes_on_forgets_the_divergence(
    recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        Planted(patch, "loss", {4})
        with pytest.raises(DivergenceError):
            quietly(recipe(save_every=1))
    quietly(recipe(save_every=1))
    assert not (tmp_path / "run/diverged.json").exists()


# -- skipping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("planted", PARTS)
@pytest.mark.parametrize("micro", [pytest.param(8, marks=pytest.mark.slow), 4])
def test_a_skipped_step_changes_nothing(
    planted: str, micro: int, recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nan = Planted(monkeypatch, planted, {4}, batch=8 // micro - 1)
    made = recipe(non_finite="skip", micro_batch_size=micro, save_every=1, logging_every=2, max_steps=5, eval_every=20)
    result = quietly(made)
    states = [tmp_path / f"run/checkpoints/checkpoint-{step}" for step in (3, 4, 5)]
    weights = [load_file(folder / "adapter_model.safetensors") for folder in states]
    moments = [load_tree(folder / "training_state")["optimizer"]["state"] for folder in states]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[1][name], weights[2][name]) for name in weights[0])
    for one, other in zip(moments[0].values(), moments[1].values(), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in ("step", "exp_avg", "exp_avg_sq"))
    (event,) = skipped(tmp_path / "run")
    wanted = nan.batches[4] if planted == "gradient" else nan.batches[4][-1:]
    assert event == {
        "event": "skipped",
        "phase": "cooperative",
        "step": 4,
        "part": PARTS[planted],
        "rows": [row for batch in wanted for row in batch],
    }
    assert result.skipped_steps == 1
    assert (tmp_path / "run/metrics.jsonl").read_text().count("NaN") == 0
    assert not (tmp_path / "run/diverged.json").exists()


def test_no_mean_counts_a_skipped_step(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: dict[str, Any] = {"non_finite": "skip", "max_steps": 4, "eval_every": 20}
    with monkeypatch.context() as patch:
        Planted(patch, "loss", {4})
        quietly(recipe(name="single", logging_every=1, **made))
        quietly(recipe(name="means", logging_every=4, **made))
    with monkeypatch.context() as patch:
        Planted(patch, "loss", {1, 2, 3, 4})
        quietly(recipe(name="none", logging_every=2, **made))

    def logged(name: str) -> list[dict[str, Any]]:
        return [event for event in RunFolder(tmp_path / name).metrics.read() if event["event"] == "train"]

    single, (mean,) = logged("single"), logged("means")
    assert [event["step"] for event in single] == [1, 2, 3]
    for key in ("loss", "objective"):
        assert mean[key] == pytest.approx(sum(event[key] for event in single) / 3, rel=1e-6)
    assert logged("none") == []


def test_too_many_in_a_row_stop_the_run(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = {"non_finite": "skip", "max_skipped": 2, "eval_every": 20}
    with monkeypatch.context() as patch:
        Planted(patch, "loss", {2, 3, 5, 6, 8, 9})
        assert quietly(recipe(name="never", **options)).skipped_steps == 6
    Planted(monkeypatch, "loss", {2, 4, 5, 6, 7})
    with pytest.raises(DivergenceError, match="not finite at step 6 after 2 skipped steps"):
        quietly(recipe(**options))
    assert [event["step"] for event in skipped(tmp_path / "run")] == [2, 4, 5]


def test_resuming_between_skipped_steps(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """How many there were in a row is part of the checkpoint."""
    options = {"non_finite": "skip", "max_skipped": 2, "micro_batch_size": 4}
    with monkeypatch.context() as patch:
        Planted(patch, "loss", {1, 5, 6, 8})
        whole = quietly(recipe(name="whole", **options))
        train_until(monkeypatch, StopAfter(5), recipe(name="parts", **options))
        parts: RunResult = quietly(recipe(name="parts", **options))
    assert parts.skipped_steps == whole.skipped_steps == 4
    assert trace(tmp_path / "whole") == trace(tmp_path / "parts")
    Planted(monkeypatch, "loss", {5, 6, 7})
    train_until(monkeypatch, StopAfter(5), recipe(name="three", **options))
    with pytest.raises(DivergenceError, match="at step 7 after 2"):
        quietly(recipe(name="three", **options))


def test_a_stopped_run_may_go_on_by_skipping(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy changes no result that there is: it does not make another recipe."""
    Planted(monkeypatch, "gradient", {4})
    with pytest.raises(DivergenceError, match="non_finite: skip"):
        quietly(recipe(save_every=1))
    result = train(recipe(save_every=1), [("training.non_finite", "skip")], progress=False)
    assert (result.steps, result.skipped_steps) == (10, 1)


def test_steps_are_counted_over_phases(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    met = []
    monkeypatch.setattr(NonFiniteSteps, "met", lambda self, state, *args: met.append((self.first_step, state.step + 1)))
    Planted(monkeypatch, "loss", {2})
    quietly(recipe(mode="post_hoc", max_steps=3, post_hoc={"max_steps": 2}))
    assert met == [(0, 2), (3, 2)]
