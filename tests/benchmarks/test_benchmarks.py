"""Every benchmark runs on a tiny model and says what it should; none of its numbers is a claim about time."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from dataclasses import replace

import common
import gradient_variance
import loading
import loop
import memory
import numpy as np
import paper_scale
import pytest
import report
import results
import step_time
import timing
import torch
from common import KINDS, Setting

import prediction
from tests.models import batch_for, bert, llama

SETTING = Setting("smollm2", "2x5", r=2)
CPU = torch.device("cpu")


@pytest.fixture
def base():
    return llama(max_position_embeddings=128).requires_grad_(False)


def test_clones_share_the_weights_and_take_different_adapters(base):
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    models = {kind: common.build(kind, base, SETTING) for kind in KINDS}
    weight = base.model.layers[0].mlp.up_proj.weight
    for kind, model in models.items():
        assert any(parameter is weight for parameter in model.parameters()), kind
        common.training_step(kind, model, common.batch_of(base, SETTING), SETTING)()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    # the frozen base trains nothing, and yet its backward pass reaches the embeddings
    assert not any(parameter.requires_grad for parameter in models["base"].parameters())


def test_noise_that_does_not_fit_is_refused_with_its_size(base):
    cells = sum(p.numel() for n, p in common.build("lora", base, SETTING).named_parameters() if "lora_A" in n)
    needed = 4 * 150 * SETTING.num_components * cells
    assert common.peft_noise_bytes(base, SETTING) == needed
    assert common.refusal("peft_monteclora", base, SETTING, 2.0 * needed) is None
    assert "pre-drawn noise" in common.refusal("peft_monteclora", base, SETTING, 2.0 * needed - 2)
    assert common.refusal("shared", base, SETTING, 0.0) is None


def test_names_tell_settings_apart():
    settings = [*common.usual_settings(), *step_time.FACTORS, *memory.SETTINGS]
    assert len({setting.name for setting in settings}) == len(set(settings))
    assert replace(SETTING, dtype="bf16", checkpointing=True).name == "smollm2-2x5-r2-bf16-checkpointing"


def test_rounds_alternate_in_rotating_order():
    seen = []
    steps = {label: lambda label=label: seen.append(label) for label in "abc"}
    times = timing.alternate(steps, CPU, rounds=4, before=lambda: None)
    rounds = ["".join(seen[i : i + 3]) for i in range(0, len(seen), 3)]
    # two rounds of warm-up first
    assert rounds == ["abc", "acb", "abc", "acb", "cab", "cba"]
    assert {len(values) for values in times.values()} == {4}


def test_ratios_are_taken_round_by_round():
    times = {"lora": [1.0, 2.0, 4.0], "shared": [1.1, 2.2, 4.4], "alone": [1.0, 1.0, 1.0]}
    found = timing.compare(times, {"shared": "lora"})
    assert found["shared"]["ratio"] == pytest.approx(1.1)
    assert found["shared"]["ratio_low"] == pytest.approx(1.1)
    assert found["shared"]["min_ratio"] == pytest.approx(1.1)
    assert found["shared"]["median_ms"] == pytest.approx(2200.0)
    assert "ratio" not in found["alone"]


@pytest.mark.parametrize("change", [{}, {"checkpointing": True}, {"dtype": "bf16"}, {"targets": "qkv"}])
def test_step_time(base, change):
    setting = replace(SETTING, **change)
    kinds = KINDS if not change else ("lora", "shared", "per_example")
    found = step_time.measure(base, step_time.of_kinds(kinds, setting), rounds=1)
    assert set(found["rows"]) == set(kinds)
    assert found["rows"]["lora"]["ratio"] == 1.0
    assert found["left_out"] == {}
    json.dumps(found)


def test_the_sweep_has_every_n_beside_one_lora():
    methods = step_time.sweep(["lora", "shared"])
    assert list(methods) == ["lora", *(f"shared N={n}" for n in (1, 4, 16, 64, 256))]
    assert methods["shared N=256"][1].num_components == 256


def test_a_failure_of_the_compared_variant_is_a_result_and_one_of_ours_is_not():
    def fails() -> None:
        raise RuntimeError("linalg.cholesky: no\nmore")

    assert step_time._failure("peft_monteclora", fails) == "fails with RuntimeError: linalg.cholesky: no"
    with pytest.raises(RuntimeError):
        step_time._failure("shared", fails)


def test_peak_memory_sees_what_training_takes(base):
    wide = replace(SETTING, size="64x64")
    assert memory.peak("lora", base, wide)["above_base_mb"] > 1.0
    peaks = {"lora": {"peak_mb": 10.0, "above_base_mb": 4.0}, "shared": {"peak_mb": 11.0, "above_base_mb": 5.0}}
    found = memory.measure(SETTING, ("lora", "shared"), 1, base, peaks.__getitem__)
    assert found["rows"]["shared"]["ratio"] == pytest.approx(1.1)
    assert found["rows"]["shared"]["above_base_ratio"] == pytest.approx(1.25)


def test_loading(base, tmp_path):
    found = loading.measure(base, SETTING, loading.KINDS, tmp_path, rounds=1)
    rows = found["rows"]
    assert set(rows) == {f"{what}, {kind}" for what in ("wrapping", "loading") for kind in loading.KINDS}
    assert rows["loading, shared"]["adapter_model_bytes"] == pytest.approx(
        rows["loading, lora"]["adapter_model_bytes"], rel=0.02
    )
    assert rows["loading, shared"]["posterior_bytes"] > 0
    assert "posterior_bytes" not in rows["loading, lora"]


def test_prediction(base):
    found = prediction.measure_evaluation(base, SETTING, rounds=1)
    assert found["references"]["merged"] == "base"
    assert {"lora", "shared", "base", "merged"} <= set(found["rows"])
    draws = prediction.measure_posterior(base, SETTING, draws=2, rounds=1)
    assert len(draws["rows"]) == 3


def test_draws_of_the_last_block_take_the_operations_that_the_formula_says():
    base = bert(num_hidden_layers=4).requires_grad_(False)
    found = prediction.measure_layers(base, Setting("minilm", "2x9", r=2), layers=1, draws=8, rounds=1)["rows"]
    last = found["8 draws of the last 1 blocks"]
    assert last["ideal"] == 0.75 + 8 / 4
    # the pooler and the head see every draw
    assert last["ideal"] < last["operations"] < 1.15 * last["ideal"]


def test_gradient_variance_falls_with_the_batch_where_noise_is_per_example():
    model = bert().requires_grad_(False)
    batch = batch_for(bert, rows=4)
    found = gradient_variance.measure_noise(model, SETTING, batch, [batch], pairs=12)["rows"]
    beside = found["lora_B, per_example beside one alone"]
    assert beside["factor_low"] < 4.0 < beside["factor_high"]
    assert found["lora_B, shared"]["factor"] == 1.0


def test_the_closed_form_has_no_variance_of_its_own():
    model = bert().requires_grad_(False)
    batch = batch_for(bert, rows=2)
    found = gradient_variance.measure_regulariser(model, SETTING, batch, [], pairs=3)["rows"]
    assert found["eta, regulariser alone, expected"]["variance"] == 0.0
    assert found["eta, regulariser alone, sampled"]["variance"] > 0.0


def test_pairs_estimate_the_trace_of_the_covariance():
    parameter = torch.nn.Parameter(torch.zeros(3))
    generator = torch.Generator().manual_seed(0)

    def loss() -> torch.Tensor:
        return (parameter * torch.randn(3, generator=generator) * torch.tensor([1.0, 2.0, 3.0])).sum()

    found = gradient_variance.pair_variances(loss, {"all": [parameter]}, 1000)
    assert found["all"].mean() == pytest.approx(14.0, rel=0.1)


def test_derived_numbers_are_the_counted_ones():
    plan = paper_scale.Plan("small", 4, tuple(paper_scale._PROJECTIONS))
    derived, counted = paper_scale.derive(plan, 8), paper_scale.count(plan)
    for name, value in counted.items():
        assert derived[name] == value, name
    for name, pair in paper_scale.check_small(plan).items():
        assert pair["counted"] == pytest.approx(pair["derived"], rel=0.01), name


def test_finished_cases_are_not_measured_again(tmp_path, capsys):
    calls = []

    def case() -> dict[str, object]:
        calls.append(time.time())
        return {"rows": {"lora": {"ratio": 1.0}}}

    args = Namespace(out=tmp_path, only="small*", list=False, device="cpu", threads=None)
    for _ in range(2):
        results.run_cases("step_time", {"small-1": case, "large": case}, args)
    assert len(calls) == 1
    assert [record["case"] for record in results.read_results(tmp_path, "step_time")] == ["small-1"]
    machine = results.read_results(tmp_path, "step_time")[0]["machine"]
    assert set(machine["packages"]) == {"torch", "transformers", "peft"}
    assert "| lora | 1 |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no case matches"):
        results.run_cases("step_time", {"large": case}, args)


def test_the_report_keeps_what_was_written_by_hand(tmp_path):
    row = {"median_ms": 10.0, "min_ms": 9.0, "rounds": 3, "ratio": 1.0}
    row |= {"ratio_low": 0.9, "ratio_high": 1.1, "min_ratio": 1.0}
    peaks = {"peak_mb": 5.0, "above_base_mb": 1.0, "ratio": 1.0, "above_base_ratio": 1.0}
    common_part = {"load": 0.0, "machine": results.machine()}
    reason = {"peft_monteclora": "too large"}
    records = {
        "step_time": {"case": "minilm-32x32", "rows": {"lora": row, "shared": row}, "left_out": reason, **common_part},
        "memory": {"case": "minilm-32x128", "rows": {"lora": peaks}, **common_part},
        "loading": {"case": "minilm", "rows": {"wrapping, lora": row}, **common_part},
    }
    for name, record in records.items():
        (tmp_path / "results" / name).mkdir(parents=True)
        (tmp_path / "results" / name / "one.json").write_text(json.dumps(record), encoding="utf-8")
    readme = tmp_path / "README.md"
    report.write(tmp_path / "results", readme)
    start, end = results.markers("what was tried")
    text = readme.read_text(encoding="utf-8")
    assert "minilm-32x32, peft MonteCLoRA: too large" in text
    readme.write_text(text.replace(f"{start}\n", f"{start}\nmuch\n"), encoding="utf-8")
    first = (tmp_path / report.PICTURE).read_bytes()
    report.write(tmp_path / "results", readme)
    assert results.between(readme.read_text(encoding="utf-8"), "what was tried") == "much"
    assert readme.read_text(encoding="utf-8").count(end) == 1
    assert (tmp_path / report.PICTURE).read_bytes() == first
    before = readme.read_bytes()
    (tmp_path / "results" / "memory" / "one.json").unlink()
    with pytest.raises(SystemExit, match="no results for Peak memory"):
        report.write(tmp_path / "results", readme)
    assert readme.read_bytes() == before


def test_the_bootstrap_interval_of_a_mean_has_its_known_width():
    values = np.random.default_rng(1).normal(3.0, 1.0, 400)
    low, high = timing.bootstrap(values, lambda sample: sample.mean(1))
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)


@pytest.mark.parametrize(("model", "kind"), [("bert", "classification"), ("llama", "causal_lm")])
def test_the_loop_and_a_bare_one_alternate_on_rows_of_one_length(assets, model, kind, tmp_path, monkeypatch):
    size = loop.Size(str(assets / model), kind, 2, 12)
    monkeypatch.setattr(loop, "_WARMUP", 1)
    times = loop.alternating(size, 3, tmp_path)
    assert {name: len(values) for name, values in times.items()} == {"run": 3, "bare": 3, "again": 3}
    assert all(value > 0 for values in times.values() for value in values)
    made = loop.recipe_of(size, 1, tmp_path)
    assert {len(ids) for ids in loop.prepare_data(made).train["input_ids"]} == {12}
