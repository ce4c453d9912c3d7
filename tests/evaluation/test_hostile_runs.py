"""Whatever is in a run folder that a user gives, it loads or one line says which file is wrong."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save, save_file

from monteclora.cli import main
from monteclora.errors import MonteCLoRAError, UnsafeCodeError
from monteclora.runs.loading import load_run
from tests.old_files import FIXTURES, run_assets

Change = Callable[[Path], Any]
RUNS = FIXTURES / "2026-11"
WEIGHTS, POSTERIOR = "adapter/adapter_model.safetensors", "adapter/posterior.safetensors"


class Bomb:
    """Leaves a trace when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


def written(name: str, content: str | bytes) -> Change:
    def change(run: Path) -> None:
        (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def without(name: str) -> Change:
    def change(run: Path) -> None:
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()

    return change


def cut(name: str, keep: float) -> Change:
    def change(run: Path) -> None:
        content = (run / name).read_bytes()
        (run / name).write_bytes(content[: int(keep * len(content))])

    return change


def edited(name: str, *path: str | int, value: Any) -> Change:
    """A JSON document with one value replaced."""

    def change(run: Path) -> None:
        document = json.loads((run / name).read_text())
        place = document
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        (run / name).write_text(json.dumps(document))

    return change


def weights(change_one: Callable[[torch.Tensor], torch.Tensor], part: str = "lora_A") -> Change:
    def change(run: Path) -> None:
        tensors = load_file(run / WEIGHTS)
        name = next(name for name in tensors if part in name)
        save_file({**tensors, name: change_one(tensors[name]).contiguous()}, run / WEIGHTS)

    return change


def posterior(change_one: Callable[[torch.Tensor], torch.Tensor], part: str = "rho") -> Change:
    """A sidecar that its own checksum says is whole."""

    def change(run: Path) -> None:
        with safetensors.safe_open(run / POSTERIOR, framework="pt") as file:
            document = file.metadata()["monteclora"]
            tensors = {name: file.get_tensor(name) for name in ("rho", "eta", "scale")}
        tensors[part] = change_one(tensors[part]).contiguous()
        content = b"".join(tensor.numpy().tobytes() for tensor in tensors.values())
        metadata = {"monteclora": document, "sha256": hashlib.sha256(document.encode() + content).hexdigest()}
        (run / POSTERIOR).write_bytes(save(tensors, metadata))

    return change


def other_adapter(name: str) -> Change:
    return lambda run: shutil.copyfile(RUNS / "adapter-llama" / Path(name).name, run / name)


def spoiled(tensor: torch.Tensor) -> torch.Tensor:
    return torch.full_like(tensor, torch.nan)


def replaced_by_pickle(run: Path) -> None:
    (run / WEIGHTS).unlink()
    (run / "adapter/adapter_model.bin").write_bytes(pickle.dumps(Bomb()))


def replaced_by_folder(name: str) -> Change:
    def change(run: Path) -> None:
        without(name)(run)
        (run / name).mkdir()

    return change


def replaced_by_pipe(name: str) -> Change:
    def change(run: Path) -> None:
        without(name)(run)
        os.mkfifo(run / name)

    return change


LINE = '{"event": "train", "phase": "train", "step": 1}\n'
HOSTILE: dict[str, tuple[Change, str]] = {
    "recipe missing": (without("recipe.yaml"), "has no recipe.yaml"),
    "recipe empty": (written("recipe.yaml", ""), "recipe.yaml: model is missing"),
    "recipe garbled": (written("recipe.yaml", b"\xff\xfe\0name"), "recipe.yaml is not UTF-8 at byte 0"),
    "recipe of objects": (
        written("recipe.yaml", "name: !!python/object:os.x {}\n"),
        "!!python/object:os.x is not allowed",
    ),
    "recipe of a path": (
        written("recipe.yaml", "name: ../../x\nmodel: {name: a}\ndata: {task: b}\nmethod: {name: lora}\n"),
        "name is '../../x', expected a plain file name",
    ),
    "recipe a folder": (replaced_by_folder("recipe.yaml"), "has no recipe.yaml"),
    "environment missing": (without("environment.json"), "cannot read run/environment.json"),
    "environment garbled": (written("environment.json", b"\xff{"), "cannot read run/environment.json"),
    "environment a list": (written("environment.json", "[]"), "environment.json is damaged"),
    "environment without data": (written("environment.json", "{}"), "environment.json is damaged (KeyError: 'data')"),
    "environment of no task": (
        edited("environment.json", "data", "kind", value="regression"),
        "environment.json is damaged",
    ),
    "labels of numbers": (
        edited("environment.json", "data", "label_names", value=[1, 2, 3]),
        "environment.json is damaged",
    ),
    "labels missing": (edited("environment.json", "data", "label_names", value=None), "environment.json is damaged"),
    "labels twice": (
        edited("environment.json", "data", "label_names", value=["a", "a", "b"]),
        "environment.json is damaged",
    ),
    "labels too few": (
        edited("environment.json", "data", "label_names", value=["a", "b"]),
        "adapter_model.safetensors",
    ),
    "environment that is a pipe": (replaced_by_pipe("environment.json"), "environment.json"),
    "metrics that are a pipe": (replaced_by_pipe("metrics.jsonl"), "the run run is not finished"),
    "configuration that is a pipe": (replaced_by_pipe("adapter/adapter_config.json"), "no adapter_config.json"),
    "weights that are a pipe": (replaced_by_pipe("adapter/adapter_model.safetensors"), "no adapter_model"),
    "metrics garbled": (written("metrics.jsonl", "{\n" + LINE), "metrics.jsonl, line 1 is not JSON"),
    "metrics of no text": (written("metrics.jsonl", b"\xff\xfe\n"), "run/metrics.jsonl, line 1 is not JSON"),
    "metrics of lists": (written("metrics.jsonl", "[]\n"), "run/metrics.jsonl, line 1 is not an event"),
    "metrics of nothing": (written("metrics.jsonl", "{}\n"), "run/metrics.jsonl, line 1 is not an event"),
    "splits garbled": (edited("environment.json", "data", "splits", value={"train": 1}), "environment.json is damaged"),
    "metrics cut": (written("metrics.jsonl", LINE), "the run run is not finished"),
    "adapter missing": (without("adapter"), "the run run is not finished"),
    "adapter empty": (replaced_by_folder("adapter"), "run/adapter has no adapter_model.safetensors"),
    "weights missing": (without(WEIGHTS), "has no adapter_model.safetensors"),
    "weights empty": (written(WEIGHTS, b""), "adapter_model.safetensors"),
    "weights of a huge header": (written(WEIGHTS, b"\xff" * 7 + b"\0{}"), "adapter_model.safetensors"),
    "weights of another model": (other_adapter(WEIGHTS), "does not fit the recipe"),
    "weights of other shapes": (weights(lambda t: t[:, :-1]), "adapter_model.safetensors"),
    "weights that are not finite": (weights(spoiled), "run/adapter: "),
    "a head that is not finite": (weights(spoiled, "classifier"), "run/adapter: "),
    **{f"weights cut at {k}": (cut(WEIGHTS, k), "adapter_model.safetensors") for k in (0.01, 0.5, 0.999)},
    "configuration missing": (without("adapter/adapter_config.json"), "has no adapter_config.json"),
    "configuration garbled": (written("adapter/adapter_config.json", b"\xff{"), "adapter_config.json is damaged"),
    "configuration a list": (written("adapter/adapter_config.json", "[]"), "adapter_config.json is damaged"),
    "configuration nested": (written("adapter/adapter_config.json", "[" * 100_000), "adapter_config.json is damaged"),
    "another method": (
        edited("adapter/adapter_config.json", "peft_type", value="IA3"),
        "the peft_type 'IA3', expected LORA",
    ),
    "a method of no name": (edited("adapter/adapter_config.json", "peft_type", value=["../x"]), "expected LORA"),
    "posterior missing": (without(POSTERIOR), "has no posterior.safetensors"),
    "posterior cut": (cut(POSTERIOR, 0.9), "posterior.safetensors"),
    "posterior empty": (written(POSTERIOR, b""), "posterior.safetensors"),
    "posterior of another model": (other_adapter(POSTERIOR), "posterior.safetensors does not fit this model"),
    "posterior of other shapes": (posterior(lambda t: t[:-1]), "posterior.safetensors: rho is"),
    "posterior of integers": (posterior(lambda t: t.int()), "posterior.safetensors: rho is"),
    "posterior that is not finite": (posterior(spoiled, "eta"), "not finite"),
    "a pickle in place of the weights": (replaced_by_pickle, "run/adapter has adapter_model.bin in place of"),
}


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    with run_assets(tmp_path):
        shutil.copytree(RUNS / "run-finished", "run")
        yield Path("run")


@pytest.mark.parametrize("case", HOSTILE)
def test_a_broken_run_is_told_in_one_line(run: Path, case: str) -> None:
    change, part = HOSTILE[case]
    change(run)
    with pytest.raises(MonteCLoRAError) as caught:
        load_run(run)
    text = str(caught.value)
    assert part in text
    assert text.splitlines() == [text]
    assert caught.value.hint
    assert len(text) < 800
    assert not Path("ran").exists()


def test_a_pickle_is_never_read(run: Path) -> None:
    """Neither in place of the weights nor beside them."""
    (run / "adapter/adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    assert load_run(run).has_posterior
    (run / WEIGHTS).unlink()
    with pytest.raises(UnsafeCodeError, match="a pickle, which can run any program"):
        load_run(run)
    model = Path("model")
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    (model / "model.safetensors").unlink()
    shutil.copytree(RUNS / "run-finished", "again")
    with pytest.raises(MonteCLoRAError, match=r"cannot load the model \./model"):
        load_run("again")
    assert not Path("ran").exists()


MANIFEST = "checkpoints/checkpoint-3/manifest.json"
CHECKPOINTS: dict[str, Change] = {
    "manifest missing": without(MANIFEST),
    "manifest garbled": written(MANIFEST, b"\xff"),
    "manifest a list": written(MANIFEST, "[]"),
    "manifest of a later format": edited(MANIFEST, "format", value=1000),
    "manifest of files elsewhere": edited(MANIFEST, "files", value={"../../recipe.yaml": {"bytes": 1, "sha256": ""}}),
    "manifest of no files": edited(MANIFEST, "files", value=None),
    "manifest of unknown fields": edited(MANIFEST, "more", value=1),
    "weights cut": cut("checkpoints/checkpoint-3/adapter_model.safetensors", 0.9),
    "a name that is no number": lambda run: (run / "checkpoints/checkpoint-3").rename(run / "checkpoints/checkpoint-x"),
    "no folder": without("checkpoints"),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_broken_checkpoint_is_passed_over(tmp_path: Path, case: str) -> None:
    with run_assets(tmp_path):
        shutil.copytree(RUNS / "run-unfinished", "run")
        CHECKPOINTS[case](Path("run"))
        with pytest.raises(MonteCLoRAError, match="the unfinished run run has no checkpoint yet"):
            load_run("run", allow_unfinished=True)


@pytest.mark.parametrize("case", ["recipe garbled", "environment a list", "weights cut at 0.5", "posterior cut"])
@pytest.mark.parametrize(
    "verb", [["evaluate", "run"], ["predict", "run", "train.jsonl"], ["export", "run", "--format", "merged"]]
)
def test_the_command_line_ends_with_2(run: Path, capfd: pytest.CaptureFixture[str], case: str, verb: list[str]) -> None:
    change, part = HOSTILE[case]
    change(run)
    assert main(verb) == 2
    out, err = capfd.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert part in line
