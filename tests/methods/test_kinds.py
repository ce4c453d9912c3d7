"""Every method learns scores and several labels; every sampler and calibrator predicts them, or refuses by name."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from monteclora.errors import ConfigError
from monteclora.evaluation.prediction import predict_file
from monteclora.evaluation.run import evaluate
from monteclora.methods import get_method, list_methods
from monteclora.prediction.registry import SAMPLERS
from monteclora.runs.loading import load_run
from monteclora.training.run import train
from tests.finished_runs import write_rows
from tests.methods.registered import HeadOnly
from tests.training.conftest import WORDS

KINDS = ("regression", "multi_label")
POST_HOC = "monteclora, post hoc"
FAST = ("prompt_tuning", POST_HOC)  # tests/evaluation/test_scores_and_labels.py has lora and monteclora
METHODS = [*(method.name for method in list_methods() if method.name != HeadOnly.name), POST_HOC]


def rows(kind: str, count: int) -> list[dict[str, Any]]:
    """Texts of a word whose number tells the score, or which of two labels there are."""
    numbers = [7 * i % len(WORDS) for i in range(count)]
    targets = [{"score": n / 10} if kind == "regression" else {"labels": ["even", "low"][n % 2 :]} for n in numbers]
    return [{"text": f"{WORDS[n]} {WORDS[n]}", **target} for n, target in zip(numbers, targets, strict=True)]


@pytest.fixture(params=[pytest.param(m, marks=[] if m in FAST else pytest.mark.slow) for m in METHODS])
def method(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(params=KINDS)
def run(request: pytest.FixtureRequest, method: str, assets: Path, tmp_path: Path) -> Path:
    """A finished run of six steps."""
    kind, name = request.param, method.partition(",")[0]
    options = {field.name for field in dataclasses.fields(get_method(name).options)}
    post_hoc = {"mode": "post_hoc", "post_hoc": {"max_steps": 3}} if method == POST_HOC else {}
    recipe = {
        "name": "run",
        "output": str(tmp_path / "run"),
        "model": {"name": str(assets / "bert")},
        "data": {
            "train_file": str(write_rows(tmp_path / "rows.jsonl", rows(kind, 40))),
            "kind": kind,
            "max_length": 16,
        },
        "method": {"name": name, **({"lora_dropout": 0.3} if "lora_dropout" in options else {})},
        "training": {"max_steps": 6, "batch_size": 8, "learning_rate": 1e-2, "eval_batch_size": 8, **post_hoc},
        "evaluation": {"num_samples": 3},
    }
    found = train(recipe, progress=False)
    assert found.metrics == pytest.approx(dict(evaluate(found, "validation", num_samples=0, progress=False).point))
    return found.folder


def refuses(run: Path, monkeypatch: pytest.MonkeyPatch, match: str, **how: Any) -> None:
    """Before anything is computed."""

    def computed(*_: Any) -> None:
        raise AssertionError("the model was called")

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.LayerNorm, "forward", computed)
        with pytest.raises(ConfigError, match=match):
            evaluate(run, "validation", progress=False, **how)
        with pytest.raises(ConfigError, match=match):
            predict_file(run, run.parent / "rows.jsonl", run / "out.parquet", progress=False, **how)


def test_scores_and_labels_of_every_method(run: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_run(run)
    drawn = {name: name == "posterior" and loaded.has_posterior for name in SAMPLERS}
    drawn["mc_dropout"] = any(getattr(module, "p", 0) > 0 for module in loaded.model.modules())
    assert drawn["posterior"] == method.startswith("monteclora")
    predicted = {}
    for sampler in ("mean", *(name for name, is_drawn in drawn.items() if is_drawn)):
        found = evaluate(run, "validation", sampler=sampler, progress=False).scored
        predicted[sampler] = found.predictions
        texts = [{"text": text} for text in found.table["text"].to_pylist()]
        file = write_rows(run.parent / "texts.jsonl", texts)
        written = predict_file(run, file, run / "out.parquet", sampler=sampler, progress=False)
        table = pq.read_table(written.path)
        for name in ("total", "aleatoric", "epistemic"):
            np.testing.assert_allclose(table[name], found.table[name], rtol=1e-4, atol=1e-7)
        epistemic = found.predictions.epistemic
        assert (epistemic > 0).all() if drawn[sampler] else (epistemic == 0).all()
        assert table["prediction"].to_pylist() == (
            pytest.approx(found.table["prediction"].to_pylist(), rel=1e-4)
            if loaded.kind == "regression"
            else found.table["prediction"].to_pylist()
        )
    for sampler, is_drawn in drawn.items():
        if not is_drawn and sampler != "mean":
            match = {"ensemble": "needs two runs", "laplace": f"run of {loaded.kind}"}.get(
                sampler, f"sampler {sampler}"
            )
            refuses(run, monkeypatch, match, sampler=sampler)
    pair = [run, Path(shutil.copytree(run, run.parent / "other"))]
    together = evaluate(pair, "validation", sampler="ensemble", progress=False).scored.predictions
    np.testing.assert_allclose(together.total, predicted["mean"].total, rtol=1e-5)
    if loaded.kind == "regression":
        refuses(run, monkeypatch, "has scores", calibrator="temperature")
        return
    for sampler in predicted:
        plain, corrected = (
            evaluate(run, "validation", sampler=sampler, calibrator=name, progress=False)
            for name in (None, "temperature")
        )
        better = (corrected.posterior or corrected.point)["nll"]
        assert better <= (plain.posterior or plain.point)["nll"] + 1e-6, "on the rows that it was fitted to"
