import re
from dataclasses import replace

from monteclora.reports.results import Evaluation
from monteclora.reports.sections import summary, warnings

UNFINISHED = "interrupted at step 120 of 400"


def test_the_summary_states_the_difference_with_its_interval(runs):
    reference, comparison, cost = summary(runs)
    assert re.fullmatch(r"LoRA: accuracy 0\.\d{3}, NLL \d\.\d{3} nats and ECE 0\.\d{3} on 200 examples\.", reference)
    change = (runs[1].evaluation.nll - runs[0].evaluation.nll).mean()
    assert f"a change of \N{MINUS SIGN}{-change:.3f} (95 % interval \N{MINUS SIGN}" in comparison
    assert cost == (
        "MonteCLoRA took 1.25 times the training time and 1.10 times the peak memory of LoRA (each trained once, so "
        "other work on the machine counts)."
    )


def test_runs_on_different_examples_have_no_paired_interval(runs):
    shorter = Evaluation.of([[0.9, 0.1], [0.2, 0.8]], [0, 1])
    _, comparison, _ = summary([runs[0], replace(runs[1], evaluation=shorter)])
    assert "interval" not in comparison


def test_repetitions_are_summarised_by_method(runs):
    repeated = [replace(run, name=f"{run.name}, seed {seed}") for run in runs for seed in (0, 1)]
    sentences = summary(repeated)
    assert [sentence.partition(":")[0] for sentence in sentences] == ["LoRA", "MonteCLoRA"]
    assert all("on average over 2 runs" in sentence for sentence in sentences)


def test_one_run_is_compared_with_nothing(runs):
    assert len(summary(runs[:1])) == 1


def test_an_unfinished_run_finds_nothing(runs):
    plain, bayesian = runs
    assert len(summary([plain, replace(bayesian, status=UNFINISHED)])) == 1
    assert summary([replace(plain, status=UNFINISHED), bayesian]) == []


def test_an_unfinished_run_is_warned_of_by_name(runs):
    plain, bayesian = runs
    assert warnings(runs) == []
    (warning,) = warnings([plain, replace(bayesian, status=UNFINISHED)])
    assert warning.startswith(f"MonteCLoRA: {UNFINISHED}.")


def test_costs_that_were_not_measured_are_not_compared(runs):
    plain, bayesian = runs
    unmeasured = replace(bayesian, seconds=None, peak_bytes=None)
    assert len(summary([plain, unmeasured])) == 2
