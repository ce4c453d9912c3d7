"""Whatever lies in an adapter's folder, loading ends well or in one line, and runs nothing."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import monteclora
from monteclora.adapters import storage
from monteclora.errors import MonteCLoRAError
from tests.adapters.test_storage import rewrite
from tests.old_files import FIXTURES, base_model

WEIGHTS, CONFIG, POSTERIOR = "adapter_model.safetensors", "adapter_config.json", "posterior.safetensors"
Damage = Callable[[Path], object]


def configured(**fields: Any) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return damage


def weighing(change: Callable[[Tensor], Tensor]) -> Damage:
    """The first weight replaced."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        name = min(tensors)
        tensors[name] = change(tensors[name]).contiguous()
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def documented(change: Callable[[dict[str, Any], dict[str, Tensor]], object]) -> Damage:
    """The posterior's document or tensors replaced, with the checksum that belongs to them."""
    return lambda folder: rewrite(folder / POSTERIOR, change)


class _Program:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(_Program()))


CASES: dict[str, tuple[Damage, str]] = {
    "no configuration": (lambda folder: (folder / CONFIG).unlink(), CONFIG),
    "configuration that is no text": (lambda folder: (folder / CONFIG).write_bytes(b"\xff{"), "is damaged"),
    "configuration that is a list": (lambda folder: (folder / CONFIG).write_text("[]"), "is damaged"),
    "another kind of adapter": (configured(peft_type="IA3"), "expected LORA"),
    "an unknown kind of adapter": (configured(peft_type="XYZ"), "expected LORA"),
    "rank that is a word": (configured(r="x"), "cannot be loaded"),
    "rank beyond all memory": (configured(r=10**9), "adapter"),
    "targets that the model lacks": (configured(target_modules=["nothing"]), "nothing"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), WEIGHTS),
    "weights cut off": (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:900]),
        "cannot be loaded",
    ),
    "weights not finite": (weighing(lambda tensor: tensor * torch.nan), "not finite"),
    "weights of another shape": (weighing(lambda tensor: tensor[:, :-1]), "cannot be loaded"),
    "pickle": (pickled, "a pickle"),
    "posterior not finite": (documented(lambda _, tensors: tensors["rho"].fill_(torch.nan)), "not finite"),
    "posterior without fields": (documented(lambda document, _: document.pop("layers")), "not a posterior"),
    "posterior without format": (documented(lambda document, _: document.pop("format")), "not a posterior"),
    "layers of another kind": (documented(lambda document, _: document.update(layers=[1])), "not a posterior"),
    "components that are a word": (
        documented(lambda document, _: document["config"].update(num_components="x")),
        "posterior",
    ),
    "seed that is a word": (documented(lambda document, _: document.update(seed="x")), "not a posterior"),
}


@pytest.mark.parametrize("case", CASES)
def test_ends_in_one_line(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "adapter"
    shutil.copytree(FIXTURES / "2026-11" / "adapter-llama", folder)
    with safetensors.safe_open(folder / POSTERIOR, framework="pt") as file:
        document, checksum = storage._sealed(file.metadata())
    envelope = json.dumps({"document": document, "sha256": checksum})  # as it is written today
    save_file(load_file(folder / POSTERIOR), folder / POSTERIOR, metadata={"monteclora": envelope})
    damage, told = CASES[case]
    model = base_model("llama")
    before = set(model.state_dict())
    damage(folder)
    with pytest.raises(MonteCLoRAError, match=told) as caught:
        monteclora.from_pretrained(model, str(folder))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value) or told == "nothing"
    assert set(model.state_dict()) == before
    assert not Path("ran").exists()


def test_the_undamaged_one_loads() -> None:
    model = monteclora.from_pretrained(base_model("llama"), str(FIXTURES / "2026-11" / "adapter-llama"))
    assert next(iter(model.base_model.posteriors)).rho.isfinite().all()
