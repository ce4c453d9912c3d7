"""Runs beside each other: numbers against numpy by hand, and every way to show them."""

import json
import shutil
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from monteclora import evaluate
from monteclora.adapters.rescaling import rescale_posterior
from monteclora.cli import main
from monteclora.errors import CheckpointError, DataError
from monteclora.metrics.registry import METRICS
from monteclora.reports.comparison import RESAMPLES, compare_runs
from monteclora.reports.comparison_tables import latex, markdown, plain
from monteclora.reports.scored_rows import ScoredRows
from monteclora.runs.records import EVALUATION_FILE, PREDICTIONS_FILE, read_evaluations


@pytest.fixture
def copied(trained, tmp_path):
    def copy(name, to=None):
        return shutil.copytree(trained[name], tmp_path / (to or name))

    return copy


def renamed(folder, **changes):
    """Another recipe with the same predictions."""
    recipe = (folder / "recipe.yaml").read_text()
    for before, after in changes.items():
        assert before in recipe
        recipe = recipe.replace(before, after)
    (folder / "recipe.yaml").write_text(recipe)
    return folder


def sure_of_the_label(folder, share):
    """Have a run predict the label of each row, with this probability."""
    evaluate(folder, "test", num_samples=0, progress=False)
    table = pq.read_table(folder / PREDICTIONS_FILE)
    names = [field.name for field in table.schema.field("probabilities").type]
    rows = [{n: share if n == label else (1 - share) / 2 for n in names} for label in table["label"].to_pylist()]
    place = table.column_names.index("probabilities")
    table = table.set_column(place, "probabilities", pa.array(rows, table.schema.field("probabilities").type))
    pq.write_table(table, folder / PREDICTIONS_FILE)
    return folder


def test_values_and_differences_are_those_of_a_bootstrap_by_hand(copied):
    runs = [copied("texts"), copied("lora")]
    comparison = compare_runs(runs, "test", seed=3, progress=False)
    assert [each.label for each in comparison.compared] == ["monteclora", "lora"]
    results = [evaluate(run, "test", progress=False) for run in runs]
    for result, row in zip(results, comparison.compared, strict=True):
        for name, value in (result.posterior or result.point).items():
            assert row.values[name].value == pytest.approx(value, abs=1e-9)
    found = [result.scored.predictions for result in results]
    nll = [-np.log(each.probs[np.arange(15), each.labels]) for each in found]
    generator = np.random.default_rng(3)
    draws = np.array([[each[chosen].mean() for each in nll] for chosen in _resamples(generator, 15)])
    first, second = comparison.compared
    np.testing.assert_allclose((first.values["nll"].low, first.values["nll"].high), _ends(draws[:, 0]), atol=1e-9)
    difference = second.differences["nll"]
    assert difference.value == pytest.approx((nll[1] - nll[0]).mean(), abs=1e-9)
    np.testing.assert_allclose((difference.low, difference.high), _ends(draws[:, 1] - draws[:, 0]), atol=1e-9)
    assert first.differences == {}


def _resamples(generator, rows):
    return [generator.integers(0, rows, rows) for _ in range(RESAMPLES)]


def _ends(draws):
    return np.percentile(draws, [2.5, 97.5])


@pytest.mark.parametrize("classes", [2, 4])
def test_what_is_counted_equals_the_metric(classes):
    """Also where classes are missing among labels or predictions."""
    generator = np.random.default_rng(classes)
    for rows in (2, 5, 300):
        probs = generator.dirichlet(np.ones(classes), rows)
        for labels in (generator.integers(0, classes, rows), np.zeros(rows, dtype=np.int64)):
            scored = ScoredRows("classes", (probs, labels))
            for name in ("mcc", "f1"):
                assert scored.measure(name) == pytest.approx(METRICS[name].functions["classes"](probs, labels))


def test_nothing_is_best_inside_the_interval(copied):
    """A run beside itself under another recipe: no difference, and nobody wins."""
    one, other = copied("lora"), renamed(copied("lora", "other"), **{"learning_rate: 0.02": "learning_rate: 0.03"})
    comparison = compare_runs([one, other], "test", progress=False)
    assert [each.label for each in comparison.compared] == [f"lora ({one})", f"lora ({other})"]
    difference = comparison.compared[1].differences["nll"]
    assert (difference.value, difference.low, difference.high, difference.excludes_zero) == (0.0, 0.0, 0.0, False)
    assert not any(each.best for each in comparison.compared)
    for text in (markdown(comparison), latex(comparison), plain(comparison)):
        assert "**" not in text
        assert "textbf" not in text
        assert "(best)" not in text


def test_what_is_better_by_more_than_the_rows_explain_is_marked(copied, tmp_path, capsys):
    sure = sure_of_the_label(copied("texts"), 0.98)
    unsure = sure_of_the_label(copied("lora"), 0.9)
    comparison = compare_runs([unsure, sure], "test", progress=False)
    best = {each.label: each.best for each in comparison.compared}
    assert best["monteclora"] >= {"nll", "brier", "ece"}
    assert best["lora"] == frozenset()
    assert "accuracy" not in best["monteclora"]  # both are right everywhere
    assert comparison.compared[1].differences["nll"].excludes_zero
    assert "**0.020 [0.020, 0.020]**" in markdown(comparison)
    assert r"\textbf{0.020 [0.020, 0.020]}" in latex(comparison)
    words = ["report", str(unsure), str(sure), "--split", "test"]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert "(best)" in shown.out
    assert "note: intervals resample the evaluated rows" in shown.err
    assert main([*words, "--format", "markdown", "--out", str(tmp_path / "table.md")]) == 0
    assert (tmp_path / "table.md").read_text() == markdown(comparison)
    assert main([*words, "--format", "html", "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "Better than all others by more than the choice of rows explains: monteclora in NLL" in page
    assert "monteclora report" in page
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [row["label"] for row in facts["compared"]] == ["lora", "monteclora"]


def test_every_stored_evaluation_is_a_row_and_seeds_are_one(copied):
    one, other = copied("lora"), renamed(copied("lora", "other"), **{"seed: 0\nensemble": "seed: 1\nensemble"})
    for run in (one, other):
        evaluate(run, "test", calibrator="temperature", progress=False)
    evaluate(one, "test", progress=False)
    evaluate(other, "test", progress=False)
    comparison = compare_runs([one, other], "test", progress=False)
    assert [each.label for each in comparison.compared] == ["lora", "lora + temperature"]
    assert [len(each.runs) for each in comparison.compared] == [2, 2]
    assert any("differ in their seed alone" in note for note in comparison.notes)


@pytest.mark.parametrize("split", [None, "test"])
def test_an_evaluation_that_is_stored_stays_as_it_is(copied, split):
    first, later = copied("texts"), copied("lora")
    evaluate(first, "test", num_samples=64, progress=False)
    stored = read_evaluations(first)
    predictions = (first / PREDICTIONS_FILE).read_bytes()
    assert compare_runs([first, later], split, progress=False).split == "test"
    assert read_evaluations(first) == stored
    assert stored["test"]["adapter"]["num_samples"] == 64
    assert (first / PREDICTIONS_FILE).read_bytes() == predictions
    assert set(read_evaluations(later)["test"]) == {"adapter"}


def rescaled(folder, factor):
    rescale_posterior(folder / "adapter", factor, {})
    return folder


def test_an_evaluation_of_another_scale_is_made_anew_and_not_kept(copied):
    changed, other = copied("texts"), copied("lora")
    before = evaluate(changed, "test", num_samples=3, seed=7, progress=False)
    evaluate(changed, "test", calibrator="temperature", progress=False)
    stored = read_evaluations(changed)
    compare = partial(compare_runs, [changed, other], "test", progress=False)
    same = compare()
    assert [each.label for each in same.compared] == ["monteclora", "monteclora + temperature", "lora"]
    rescaled(changed, 30.0)
    found = compare()
    assert read_evaluations(changed) == stored
    expected = evaluate(
        shutil.copytree(changed, changed.parent / "again"), "test", num_samples=3, seed=7, progress=False
    )
    assert found.compared[0].values["nll"].value == pytest.approx(expected.posterior["nll"], abs=1e-9)
    assert expected.posterior["nll"] != pytest.approx(before.posterior["nll"], abs=1e-6)
    assert [each.label for each in found.compared] == ["monteclora", "lora"]
    notes = "\n".join(found.notes)
    assert f"{changed}: its weights or the posterior's scale changed since it was evaluated" in notes
    assert f"{changed} (adapter+temperature) is left out" in notes
    assert "changed since" not in "\n".join(same.notes)


def test_an_evaluation_of_some_rows_is_made_anew_where_others_have_all(copied):
    part, whole = copied("texts"), copied("lora")
    evaluate(part, "test", rows=7, progress=False)
    (alone,) = compare_runs([part], "test", progress=False).compared
    assert alone.runs == (part,)
    assert compare_runs([part], "test", progress=False).rows == 7
    found = compare_runs([part, whole], "test", progress=False)
    assert found.rows == 15
    assert any("it was evaluated on 7 of 15 test rows; it was evaluated anew" in note for note in found.notes)
    assert read_evaluations(part)["test"]["adapter"]["rows"] == 7
    evaluate(whole, "test", rows=7, progress=False)  # the same rows for both, as they were asked for
    assert compare_runs([part, whole], "test", progress=False).rows == 7


def test_an_evaluation_that_names_no_weights_is_taken_with_a_note(copied):
    run = copied("lora")
    evaluate(run, "test", progress=False)
    path = run / EVALUATION_FILE
    document = json.loads(path.read_text())
    for name in ("weights_sha256", "split_rows"):
        del document["splits"]["test"]["adapter"][name]
    path.write_text(json.dumps(document))
    found = compare_runs([run], "test", progress=False)
    assert any("did not note the weights" in note for note in found.notes)


def test_the_split_is_that_of_the_first_runs_own_evaluation(copied):
    first, later = copied("pairs"), copied("pairs", "later")
    evaluate(first, "validation", progress=False)
    evaluate(first, "test", base=True, progress=False)
    comparison = compare_runs([first, later], progress=False)
    assert comparison.split == "validation"
    assert [each.runs for each in comparison.compared] == [(first, later)]
    assert set(read_evaluations(later)) == {"validation"}


@pytest.mark.parametrize("split", [None, "test"])
def test_a_run_of_which_the_base_model_alone_was_evaluated_is_evaluated(copied, split):
    runs = [copied("pairs"), copied("pairs", "later")]
    for run in runs:
        evaluate(run, "test", base=True, progress=False)
        assert set(read_evaluations(run)["test"]) == {"base"}
    comparison = compare_runs(runs, split, progress=False)
    assert (comparison.split, [each.runs for each in comparison.compared]) == ("test", [tuple(runs)])


@pytest.mark.parametrize("name", ["questions", "pairs"])
def test_options_and_completions_are_compared_too(copied, name):
    run = copied(name)
    result = evaluate(run, "test", progress=False)
    (row,) = compare_runs([run], "test", progress=False).compared
    for metric, value in (result.posterior or result.point).items():
        assert row.values[metric].value == pytest.approx(value, rel=1e-6)
        assert row.values[metric].low <= row.values[metric].value <= row.values[metric].high or metric == "ece"


def test_what_cannot_be_compared_is_refused(copied):
    texts, questions = copied("texts"), copied("questions")
    with pytest.raises(DataError, match="were evaluated on different test rows"):
        compare_runs([texts, questions], "test", progress=False)
    (texts / PREDICTIONS_FILE).unlink()
    with pytest.raises(CheckpointError, match="has no predictions of test by adapter"):
        compare_runs([texts], "test", progress=False)
    assert main(["report", str(texts), "--out", "page.html"]) == 2
