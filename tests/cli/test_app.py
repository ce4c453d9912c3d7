"""Every way a command can end, and what it then leaves on standard output and standard error."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

import monteclora
from monteclora.cli import main
from monteclora.config import dump
from monteclora.errors import DivergenceError
from monteclora.runs.recipe import load_recipe
from monteclora.training.interruption import TrainingInterrupted
from tests.finished_runs import tiny_recipe, write_rows

VERBS = ("demo", "recipes", "check", "train", "evaluate", "predict", "export", "list", "doctor")


def in_a_process(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(Path(monteclora.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False, **options
    )


@pytest.fixture
def run_main(capfd, monkeypatch, tmp_path):
    """Runs the command line in an empty folder; gives status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        capfd.readouterr()
        status = main([str(word) for word in words])
        out, err = capfd.readouterr()
        return status, out, err

    return run


@pytest.fixture
def recipe_file(assets, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(dump(load_recipe(tiny_recipe(assets, tmp_path / "run"))))
    return path


def one_line(text):
    (line,) = (line for line in text.splitlines() if not line.startswith("note: "))
    assert "Traceback" not in line
    return line


# help


def test_help_names_every_verb(run_main):
    status, out, err = run_main("--help")
    assert (status, err) == (0, "")
    assert all(f" {verb} " in out for verb in VERBS)
    assert run_main()[1] == out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(run_main, verb):
    status, out, err = run_main(verb, "--help")
    assert (status, err) == (0, "")
    assert f"Usage: monteclora {verb}" in out


def test_version(run_main):
    assert run_main("--version") == (0, f"{monteclora.__version__}\n", "")


def test_help_and_lists_load_nothing_heavy():
    """A table of names must not wait for torch."""
    script = """
import sys
from monteclora.cli import main
for words in (["--help"], ["train", "--help"], ["list", "tasks"], ["list", "methods"], ["list", "models"], ["recipes"]):
    assert main(words) == 0
heavy = {"torch", "transformers", "peft", "datasets", "pandas", "matplotlib", "sklearn", "numpy", "pyarrow"}
print("loaded:", sorted(heavy & set(sys.modules)))
"""
    found = in_a_process("-c", script)
    assert found.stdout.endswith("loaded: []\n"), found.stderr


def test_the_package_runs_as_a_module():
    found = in_a_process("-m", "monteclora", "evalute", "run")
    assert found.returncode == 2
    assert found.stdout == ""
    assert 'Did you mean "evaluate"?' in one_line(found.stderr)


def test_a_reader_that_has_enough_is_no_error():
    environment = {**os.environ, "PYTHONPATH": str(Path(monteclora.__file__).parents[1])}
    pipe = f'"{sys.executable}" -m monteclora recipes show helpdesk-minilm-lora | head -c 1'
    found = subprocess.run(["bash", "-c", pipe], env=environment, capture_output=True, text=True, check=False)
    assert (found.stdout, found.stderr) == ("#", "")


# wrong usage


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["trian", "x.yaml"], 'Did you mean "train"?'),
        (["list", "taks"], 'Did you mean "tasks"?'),
        (["evaluate", "run", "--splt", "test"], "Did you mean --split?"),
        (["evaluate"], "RUN"),
        (["evaluate", "run", "--rows", "many"], "many"),
        (["export", "run"], "--format"),
        (["export", "run", "--format", "onnx"], "onnx"),
        (["train", "helpdesk-minilm-lora", "extra"], "unexpected argument 'extra'"),
        (["train", "helpdesk-minilm-lora", "--seed"], "--seed has no value"),
        (["train", "helpdesk-minilm-lora", "--training.learning_rat", "1"], "did you mean training.learning_rate"),
        (["train", "helpdesk-minilm-lora", "--training.learning_rate=fast"], "training.learning_rate"),
        (["train", "helpdesk-minilm-lorra"], "Did you mean helpdesk-minilm-lora?"),
        (["train", "missing.yaml"], "cannot read missing.yaml"),
        (["check", "helpdesk-minilm-lora", "--method.nam=lora"], "did you mean method.name"),
        (["recipes", "show", "helpdesk-minilm"], "Did you mean helpdesk-minilm-lora?"),
        (["evaluate", "missing"], "does not exist"),
        (["evaluate", "."], "is not a run. Give a folder that `monteclora train` made."),
        (["predict", ".", "rows.csv"], "is not a run"),
        (["predict", ".", "rows.csv", "--out", "rows.xlsx"], "Name it with one of .parquet, .jsonl."),
        (["predict", ".", "rows.csv", "--text", "w1"], "both rows.csv and --text are given. Give texts or a file"),
        (["predict", ".", "--text", "w1", "--keep", "id"], "--keep is for a file, and --text is given"),
        (["predict", "."], "there is nothing to predict. Give a file, or texts"),
        (["predict", ".", "rows.csv", "--keep", "total"], "the predictions have a column 'total' of their own"),
        (["export", ".", "--format", "merged"], "is not a run"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_usage_is_told_in_one_line(run_main, words, says):
    status, out, err = run_main(*words)
    assert (status, out) == (2, "")
    assert says in one_line(err)
    assert err.startswith("error: ")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["--data.text_columns=[body]"], ("has no column 'body'; it has text, label", "Set data.text_columns")),
        (["--data.label_names=[apple, berry]"], ("the label 'cherry' is not among", "list every label")),
        (["--data.train_file={folder}/empty.jsonl"], ("empty.jsonl is empty", "Give a file with rows.")),
        (["--data.train_file={folder}/nowhere.jsonl"], ("there is no file", "Check the path")),
        (["--method.target_modules=[qery]"], ("names 'qery'", "Nearest: query")),
        (["--model.name=./nowhere"], ("there is no model at ./nowhere", "Check the path")),
        (["--model.name=minilmm"], ("cannot load the model minilmm", "Did you mean minilm?")),
        (["--data.max_length=4096"], ("max_length is 4096, the model reads at most 48", "Set a smaller")),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
@pytest.mark.parametrize("verb", ["train", "check"])
def test_bad_input_is_told_in_one_line(run_main, recipe_file, verb, changes, says):
    write_rows(recipe_file.parent / "empty.jsonl", [])
    words = [change.format(folder=recipe_file.parent) for change in changes]
    status, out, err = run_main(verb, recipe_file, *words)
    assert (status, out) == (2, "")
    line = one_line(err)
    assert all(part in line for part in says), line


def test_a_label_out_of_range_is_told_with_its_line(run_main, recipe_file, assets, tmp_path):
    rows = [{"text": "w1 w2", "label": i % 3} for i in range(20)] + [{"text": "w1", "label": 7}]
    file = write_rows(tmp_path / "numbers.jsonl", rows)
    words = [f"--data.train_file={file}", "--data.test_file=null", "--data.label_names=[a, b, c]"]
    status, _, err = run_main("train", recipe_file, *words)
    assert status == 2
    assert "numbers.jsonl, line 21: the label '7' is not among the 3 labels a, b, c" in one_line(err)


# how else a command may end


@pytest.fixture
def raising(monkeypatch, run_main):
    """Runs a verb that raises an error."""

    def run(error, *words):
        def fail():
            raise error

        monkeypatch.setattr("monteclora.cli.recipes.bundled_recipes", fail)
        return run_main("recipes", *words)

    return run


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (OSError(28, "No space left on device"), 1, "error: No space left on device"),
        (PermissionError(13, "Permission denied", "runs/x"), 1, "error: runs/x: Permission denied"),
        (
            DivergenceError("the loss is not finite at step 3", "Lower it."),
            3,
            "error: the loss is not finite at step 3.",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
        (TrainingInterrupted("runs/x is saved at step 5"), 130, "interrupted: runs/x is saved at step 5"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_what_the_user_can_mend_ends_without_a_traceback(raising, error, status, says):
    found, out, err = raising(error)
    assert (found, out) == (status, "")
    assert one_line(err).startswith(says)


def test_an_unexpected_error_leaves_its_traceback_in_a_file(raising, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    status, _, err = raising(RuntimeError("a bug\nof two lines"))
    assert status == 1
    assert "unexpected RuntimeError: a bug of two lines" in one_line(err)
    (log,) = tmp_path.glob("monteclora-*.log")
    assert str(log) in err
    assert "Traceback" in log.read_text()


def test_debug_shows_the_traceback(raising, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    status, _, err = raising(RuntimeError("a bug"), "--debug")
    assert status == 1
    assert "Traceback" in err
    assert not list(tmp_path.glob("monteclora-*.log"))


def test_a_diverging_run_ends_with_3(run_main, recipe_file):
    status, out, err = run_main("train", recipe_file, "--training.learning_rate=1e30", "--training.max_grad_norm=null")
    assert (status, out) == (3, "")
    assert err.splitlines()[-1].startswith("error: the ")
    assert "not finite" in err
    assert "Traceback" not in err


# the verbs on a tiny run


def test_train_evaluate_predict_and_export(run_main, recipe_file, tmp_path):
    run = tmp_path / "run"
    status, out, err = run_main("train", recipe_file)
    assert status == 0
    assert f"monteclora evaluate {run}" in out
    assert "validation" in err  # progress

    status, out, err = run_main("train", recipe_file, "--json")
    assert status == 0
    assert json.loads(out)["adapter"] == str(run / "adapter")
    assert "is finished: nothing to train" in " ".join(err.split())

    status, out, err = run_main("evaluate", run)
    assert (status, err) == (0, "")
    assert "accuracy" in out
    assert "posterior, 3 draws" in out

    status, out, _ = run_main("evaluate", run, "--split", "validation", "--num-samples", 0, "--json")
    facts = json.loads(out)
    assert (status, facts["split"], facts["posterior"]) == (0, "validation", None)

    write_rows(tmp_path / "new.jsonl", [{"text": "w1 w2"}, {"text": "w40"}])
    status, out, err = run_main("predict", run, "new.jsonl", "--seed", 3)
    assert status == 0
    assert "every answer is abstained from: 3 validation rows cannot promise" in " ".join(err.split())
    assert out == "written: new-predictions.parquet (2 rows, 3 posterior draws each)\n"
    assert (tmp_path / "new-predictions.parquet").is_file()

    status, out, err = run_main("evaluate", run, "--ood", "new.jsonl")
    assert (status, err) == (0, "")
    assert "accuracy at coverage 0.8: " in out
    assert "telling new.jsonl (2 rows) from the split" in out
    assert all(score in out for score in ("entropy", "mutual information", "maximum logit", "novelty"))

    status, out, err = run_main("predict", run, "--text", "w1 w2", "--text", "w40", "--seed", 3)
    assert status == 0
    assert "every answer is abstained from" in " ".join(err.split())
    rows = pq.read_table(tmp_path / "new-predictions.parquet").to_pylist()
    assert [line.split(",")[0] for line in out.splitlines()] == [row["prediction"] for row in rows]
    assert all(f"confidence {row['confidence']:.3f}" in line for row, line in zip(rows, out.splitlines(), strict=True))
    for arguments in (["new.jsonl"], ["--text", "w1 w2"]):
        status, _, err = run_main("predict", run, *arguments, "--risk", "1.5")
        assert status == 2
        assert "risk is 1.5; expected a value between 0 and 1" in err
        status, _, err = run_main("predict", run, *arguments, "--risk", 0.25, "--level", 0.8)
        assert status == 0
        assert "cannot promise at most 25 % wrong answers with a probability of 80 %" in " ".join(err.split())

    status, out, _ = run_main("predict", run, "--text", "w1 w2", "--text", "w40", "--seed", 3, "--json")
    answers = json.loads(out)["answers"]
    assert [answer["text"] for answer in answers] == ["w1 w2", "w40"]
    for name in ("confidence", "total", "epistemic", "novelty", "abstain"):
        assert [answer[name] for answer in answers] == pytest.approx([row[name] for row in rows], abs=1e-5)

    status, out, _ = run_main("export", run, "--format", "samples", "--num-samples", 2)
    assert (status, out.split()) == (0, [str(run / "samples" / f"sample-{i}") for i in range(2)])
    everywhere = load_file(run / "samples" / "sample-0" / "adapter_model.safetensors")
    recipe = run / "recipe.yaml"
    before = recipe.read_text()
    recipe.write_text(re.sub(r"\blayers: null", "layers: 1", before))
    assert run_main("export", run, "--format", "samples", "--num-samples", 1)[0] == 0
    last = load_file(run / "samples" / "sample-0" / "adapter_model.safetensors")
    differ = {name for name, value in everywhere.items() if not torch.equal(value, last[name])}
    assert differ, "the recipe has the last block drawn alone, as predict does"
    assert all("layer.0." in name for name in differ)
    recipe.write_text(before)

    status, out, _ = run_main("export", run, "--format", "merged", "--json")
    assert (status, json.loads(out)) == (0, {"written": [str(run / "merged")]})
    assert (run / "merged" / "config.json").is_file()
    assert (run / "merged" / "tokenizer.json").is_file()

    status, out, _ = run_main("export", run, "--format", "adapter", "--json")
    (published,) = json.loads(out)["written"]
    assert status == 0
    assert "## Metrics" in (Path(published) / "README.md").read_text()
    assert run_main("export", run, "--format", "adapter", "--num-samples", 2)[0] == 2
    status, _, err = run_main("push", run, "tickets")
    assert (status, "is no owner/name" in err) == (2, True)
    status, _, err = run_main("export", run, "--format", "gguf")
    assert status == 2
    assert "GGUF adapters were checked for LlamaForCausalLM, not for BertForSequenceClassification" in one_line(err)


def test_overrides_take_both_forms_and_negative_numbers(run_main, recipe_file):
    words = ["--training.max_steps", 1, "--data.seed=3", "--json", "--name", "other"]
    status, out, _ = run_main("train", recipe_file, *words)
    assert (status, json.loads(out)["steps"]) == (0, 1)
    status, _, err = run_main("train", recipe_file, "--seed", -1)
    assert status == 2
    assert "seed is -1, expected at least 0" in one_line(err)


def test_lora_has_no_samples_to_export(run_main, trained):
    status, out, err = run_main("export", trained["lora"], "--format", "samples")
    assert (status, out) == (2, "")
    assert "has no posterior to draw from" in one_line(err)


@pytest.mark.parametrize("method", ["prompt_tuning", "full"])
def test_what_a_method_does_decides_whether_its_run_can_be_merged(run_main, recipe_file, tmp_path, method):
    status, _, err = run_main("train", recipe_file, "--method.name", method, "--training.max_steps", 1)
    assert status == 0, err
    status, out, err = run_main("export", tmp_path / "run", "--format", "merged")
    if method == "full":
        assert (status, out.strip()) == (0, str(tmp_path / "run" / "merged"))
        assert (tmp_path / "run" / "merged" / "model.safetensors").is_file()
    else:
        assert (status, out) == (2, "")
        assert "the method prompt_tuning cannot be merged" in one_line(err)
        assert not (tmp_path / "run" / "merged").exists()


def test_a_language_model_is_exported_for_llama_cpp(run_main, trained, tmp_path):
    out = tmp_path / "gguf"
    status, written, _ = run_main("export", trained["questions"], "--format", "gguf", "--num-samples", 1, "--out", out)
    assert (status, written.split()) == (0, [str(out / "mean.gguf"), str(out / "sample-0.gguf")])
    status, _, err = run_main("export", trained["lora"], "--format", "gguf", "--num-samples", 1)
    assert status == 2
    assert "has no posterior to draw from" in one_line(err)


def test_tokens_and_their_page(run_main, trained, tmp_path):
    file, page = write_rows(tmp_path / "in.jsonl", [{"prompt": "w1 w2"}]), tmp_path / "page.html"
    words = ["predict", trained["questions"], file, "--out", tmp_path / "out.jsonl", "--max-new-tokens", 4]
    status, out, _ = run_main(*words, "--tokens", "--answers", 2, "--page", page)
    assert (status, out.splitlines()[-1]) == (0, f"page: {page}")
    (row,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert 1 <= len(row["tokens"]) <= 4
    assert len(row["answers"]) == 2
    assert "shade-10" in page.read_text()
    status, out, _ = run_main(
        "predict", trained["questions"], "--text", "w1 w2", "--tokens", "--max-new-tokens", 4, "--answers", 2
    )
    assert status == 0
    assert "agreement" in out.splitlines()[0]
    assert len(out.splitlines()) == 1 + len(row["tokens"])
    for line, token in zip(out.splitlines()[1:], row["tokens"], strict=True):
        assert line.startswith(f"  {token['text']!r} ")
        assert f"uncertainty {token['total']:.3f} nats" in line
    for wrong, message in (
        (["--page", page], "Add --tokens"),
        (["--tokens", "--page", tmp_path / "page.txt"], "Name it with .html"),
    ):
        status, _, err = run_main(*words, *wrong)
        assert status == 2
        assert message in one_line(err)
    status, _, err = run_main("predict", trained["texts"], "--text", "w1", "--tokens")
    assert status == 2
    assert "is a classifier, which writes no tokens" in one_line(err)


def test_an_unfinished_run_says_so(run_main, trained, tmp_path):
    run = shutil.copytree(trained["texts"], tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    status, _, err = run_main("evaluate", run)
    assert status == 2
    assert "is not finished" in one_line(err)
    status, out, _ = run_main("evaluate", run, "--allow-unfinished")
    assert status == 0
    assert "unfinished: stopped at step 6" in out


def test_check_shows_rows_and_costs_and_writes_nothing(run_main, recipe_file, tmp_path):
    status, out, _ = run_main("check", recipe_file)
    assert status == 0
    assert "6 steps" in out
    assert "-> " in out
    assert not (tmp_path / "run").exists()
    status, out, _ = run_main("check", recipe_file, "--json")
    assert json.loads(out)["steps"] == 6


def test_recipes_can_be_shown_copied_and_trained_from_the_copy(run_main, tmp_path):
    _, listed, _ = run_main("recipes", "--json")
    names = [recipe["name"] for recipe in json.loads(listed)]
    assert "helpdesk-minilm-lora" in names
    _, shown, _ = run_main("recipes", "show", names[0])
    assert run_main("recipes", "copy", names[0])[1] == f"{names[0]}.yaml\n"
    copied = (tmp_path / f"{names[0]}.yaml").read_text()
    assert copied.rstrip() == shown.rstrip()
    status, _, err = run_main("recipes", "copy", names[0])
    assert status == 2
    assert "exists. Give another name, or remove it." in one_line(err)
    assert run_main("recipes", "copy", names[0], "mine.yaml")[0] == 0


def test_lists_are_for_people_and_machines(run_main, monkeypatch, tmp_path):
    (tmp_path / "mrpc").mkdir()
    (tmp_path / "mrpc" / "train.jsonl.gz").touch()
    monkeypatch.setenv("MONTECLORA_DATA", str(tmp_path))
    tasks = {task["name"]: task for task in json.loads(run_main("list", "tasks", "--json")[1])}
    assert tasks["helpdesk"]["where"] == "bundled"
    assert tasks["mrpc"]["where"] == "MONTECLORA_DATA"
    assert tasks["mrpc"]["splits"] == ["train"]
    assert tasks["rte"]["where"] == "the hub"
    for what in ("tasks", "methods", "models"):
        named = [entry["name"] for entry in json.loads(run_main("list", what, "--json")[1])]
        _, table, _ = run_main("list", what)
        assert all(name in table for name in named)
