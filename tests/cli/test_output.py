"""What every command has in common: JSON, streams of any encoding, completion, and hints that are true."""

import ast
import io
import json
import re
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from cyclopts import App

import monteclora
from monteclora.cli.app import _at_home, app, main
from monteclora.evaluation.text import TextModel, TextPredictions
from monteclora.runs.begin import describe_folder
from monteclora.runs.recipe import load_recipe
from monteclora.runs.recipe_reference import recipe_keys
from tests.finished_runs import texts, write_rows

SOURCES = Path(monteclora.__file__).parent
# options of other programs, and of accelerate's launcher, that hints and commands name
FOREIGN = {
    "--enable-lora", "--lora", "--lora-init-without-apply", "--lora-modules", "--max-logprobs", "--max-lora-rank",
    "--no-deps", "--porcelain", "--fsdp_offload_params", "--fsdp_version", "--use_fsdp", "--constraint",
}  # fmt: skip


def commands(of: App = app, prefix: tuple[str, ...] = ()):
    """Every command with its words."""
    for name, command in of.resolved_commands().items() if hasattr(of, "resolved_commands") else of._commands.items():
        if name.startswith("-"):
            continue
        command = command.resolve() if hasattr(command, "resolve") else command
        if command.default_command is not None:
            yield (*prefix, name), command
        yield from commands(command, (*prefix, name))


def options(command: App) -> set[str]:
    return {name for argument in command.assemble_argument_collection() for name in argument.names}


def test_every_command_has_json():
    found = dict(commands())
    assert len(found) >= 20
    assert [words for words, command in found.items() if "--json" not in options(command)] == []


def strings(tree: ast.AST):
    """The texts of a program but for docstrings and names in ``__all__``, f-strings with a gap for each value."""
    parts = {id(value) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for value in node.values}
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts | docs:
            yield node.value


def test_hints_name_commands_and_options_that_exist():
    """In every text of the package: ``--option``, and ``monteclora verb``."""
    found = dict(commands())
    verbs = {words[0] for words in found}
    known = {"--help", "--version", "--debug", "--install-completion", "--KEY", *FOREIGN}
    for command in found.values():
        known |= options(command)
    known |= {f"--{key.name}" for key in recipe_keys()} | {"--key", "--training.seed"}
    wrong, seen = [], 0
    for path in sorted(SOURCES.rglob("*.py")):
        for text in strings(ast.parse(path.read_text())):
            for option in re.findall(r"(?<![\w\0<!-])--[A-Za-z][\w.-]*\w", text):
                seen += 1
                if option not in known and "--{" not in text and not option.startswith("--series"):
                    wrong.append(f"{path.name}: {option} in {text[:80]!r}")
            for verb in re.findall(r"(?:`|: |Run )monteclora ([a-z]+)\b", text):
                seen += 1
                if verb not in verbs:
                    wrong.append(f"{path.name}: monteclora {verb} in {text[:80]!r}")
    assert wrong == []
    assert seen > 40


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_stream_that_cannot_write_a_text_never_fails_a_command(trained, encoding, tmp_path, monkeypatch):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    strange = "w1 漢字 😀 \x1b[31m"
    for more in ([], ["--json"]):
        assert main(["predict", str(trained["texts"]), "--text", strange, *more]) == 0
    assert main(["train", str(trained["texts"] / "recipe.yaml")]) == 0  # finished: the verdict alone
    assert main(["list", "tasks"]) == 0
    assert main(["train", "no-such-漢.yaml"]) == 2
    for stream in streams:
        stream.flush()
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams)
    assert "\x1b" not in out
    document = json.loads(out[out.index("{") : out.index("\n}") + 2])
    assert document["answers"][0]["text"] == strange
    assert "no-such-\\u6f22.yaml" in err


def test_check_escapes_control_characters_and_says_whose_the_folder_is(assets, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{**row, "text": f"{row['text']} \x1b[31m"} for row in texts(24, 0)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    model = shutil.copytree(assets / "bert", tmp_path / "bert")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    words = tokenizer["model"]["vocab"]
    words["\x1b[31m"] = words.pop("w40")
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {{name: {model}}}\ndata: {{task: {file}, max_length: 16}}\n"
        "method: {name: lora}\ntraining: {max_steps: 1}\n"
    )
    assert main(["check", str(recipe)]) == 0
    out, _ = capsys.readouterr()
    assert "runs/r (new)" in out
    assert "the process itself" in out
    assert r" \x1b[31m" in out
    assert "\x1b" not in out


def test_a_completion_is_printed_on_one_line_without_control_characters(trained, monkeypatch, capsys):
    found = TextPredictions(["w1"], ["a\x1b[31m\nb"], [0.5], [0.7], [0.7], [0.0], None, None)
    monkeypatch.setattr(TextModel, "predict", lambda *_, **__: found)
    assert main(["predict", str(trained["pairs"]), "--text", "w1"]) == 0
    assert capsys.readouterr().out == "a\\x1b[31m b, confidence 0.500, uncertainty 0.700 nats (0.000 epistemic)\n"


def test_help_of_train_lists_the_keys_of_a_recipe(capsys):
    for verb in ("train", "check"):
        assert main([verb, "--help"]) == 0
        out, _ = capsys.readouterr()
        assert all(f"--{key.name} " in out for key in recipe_keys())
    assert main(["evaluate", "--help"]) == 0
    assert "--training.learning_rate" not in capsys.readouterr()[0]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_the_commands(shell):
    script = app.generate_completion(shell=shell, prog_name="monteclora")
    assert all(verb in script for verb in ("evaluate", "predict", "calibrate"))


def test_the_home_folder_in_an_option_that_shells_leave(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["recipes", "copy", "helpdesk-minilm-lora", "~/copied.yaml"]) == 0
    assert (tmp_path / "copied.yaml").is_file()
    given = ["predict", "run", "--text", "~/x", "--text=~/x"]
    assert _at_home(given) == given  # texts
    file = write_rows(tmp_path / "rows.jsonl", texts(60, 0))
    assert main(["new", str(file), "--out=~/made.yaml", "--method", "lora"]) == 0
    assert (tmp_path / "made.yaml").is_file()
    capsys.readouterr()


def test_a_pipeline_takes_a_merged_export_without_a_warning(trained, tmp_path, capsys, caplog):
    from transformers import pipeline

    assert main(["export", str(trained["texts"]), "--format", "merged", "--out", str(tmp_path / "merged")]) == 0
    expected = monteclora.load(trained["texts"]).predict(["w1 w2"], num_samples=0)
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # torch's own, at import
        (found,) = pipeline("text-classification", str(tmp_path / "merged"), device="cpu")("w1 w2")
    assert (found["label"], found["score"]) == (expected.labels[0], pytest.approx(expected.confidence[0], abs=1e-5))
    said = capsys.readouterr()
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert not re.search("warn|newly initialized|not used", said.err, re.IGNORECASE)


def test_whose_a_run_folder_is(trained, tmp_path):
    recipe = load_recipe(trained["lora"] / "recipe.yaml")
    assert describe_folder(recipe) == "a finished run of this recipe: there is nothing left to train"
    other = replace(recipe, training=replace(recipe.training, learning_rate=1.0))
    assert "which differs in training.learning_rate: training refuses it" in describe_folder(other)
    copied = shutil.copytree(trained["lora"], tmp_path / "run")
    shutil.rmtree(copied / "adapter")
    step = recipe.training.max_steps
    mine = replace(recipe, output=str(copied))
    assert describe_folder(mine) == f"an unfinished run of this recipe: training resumes it at step {step}"
    (copied / "recipe.yaml").write_text("model: [")
    assert "a run that cannot be read" in describe_folder(mine)
    (copied / "recipe.yaml").unlink()
    assert "is no run: training refuses it" in describe_folder(mine)
    assert describe_folder(replace(recipe, output=str(tmp_path / "none"))) == "new"
    assert "trained elsewhere" in describe_folder(replace(recipe, output=str(trained["lora"] / "adapter")))
