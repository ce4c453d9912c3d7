"""Tiny models, data and finished runs on disk, for what reads a run folder."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from monteclora.training.run import train
from tests.models import bert, llama
from tests.training.conftest import WORDS, save_tokenizer

LABELS = ("apple", "berry", "cherry")


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def texts(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows whose words tell their label."""
    generator = random.Random(seed)
    rows = []
    for i in range(count):
        words = WORDS[30 * (i % 3) : 30 * (i % 3) + 25]
        rows.append({"text": " ".join(generator.choices(words, k=generator.randint(3, 9))), "label": LABELS[i % 3]})
    return rows


def questions(count: int, seed: int) -> list[dict[str, Any]]:
    """Instructions with two or three options, of one token or several."""
    generator = random.Random(seed)
    rows = []
    for i in range(count):
        options = [["w70", "w71"], ["w72 w73", "w74 w75 w76", "w77"]][i % 2]
        answer = generator.choice(options)
        prompt = " ".join(generator.choices(WORDS[:60], k=generator.randint(3, 20)))
        rows.append({"prompt": prompt, "completion": f"w80 w81 {answer}", "options": options, "answer": answer})
    return rows


def write_assets(folder: Path) -> Path:
    """Folders ``bert`` and ``llama``; ``texts``, ``questions`` and ``pairs``, each with train and test rows."""
    bert().bert.save_pretrained(folder / "bert")
    llama().save_pretrained(folder / "llama")
    save_tokenizer(folder / "bert", classifies=True)
    save_tokenizer(folder / "llama", classifies=False)
    for seed, (split, count) in enumerate({"train": 36, "test": 15}.items()):
        write_rows(folder / f"texts-{split}.jsonl", texts(count, seed))
        rows = questions(count, seed)
        write_rows(folder / f"questions-{split}.jsonl", rows)
        pairs = [{name: row[name] for name in ("prompt", "completion")} for row in rows]
        write_rows(folder / f"pairs-{split}.jsonl", pairs)
    return folder


def tiny_recipe(assets: Path, output: Path, data: str = "texts", method: str = "monteclora") -> dict[str, Any]:
    """A recipe of six steps."""
    return {
        "name": output.name,
        "output": str(output),
        "model": {"name": str(assets / ("bert" if data == "texts" else "llama"))},
        "data": {
            "train_file": str(assets / f"{data}-train.jsonl"),
            "test_file": str(assets / f"{data}-test.jsonl"),
            "max_length": 16,
        },
        "method": {"name": method, "r": 4},
        "training": {"max_steps": 6, "batch_size": 8, "learning_rate": 2e-2, "eval_batch_size": 8},
        "evaluation": {"num_samples": 3},
    }


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_assets(tmp_path_factory.mktemp("assets"))


@pytest.fixture(scope="session")
def trained(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders: ``texts``, ``lora`` (on texts), ``questions`` and ``pairs``. Copy one before changing it."""
    folder = tmp_path_factory.mktemp("runs")
    kinds = {"texts": "texts", "lora": "texts", "questions": "questions", "pairs": "pairs"}
    for name, data in kinds.items():
        train(tiny_recipe(assets, folder / name, data, "lora" if name == "lora" else "monteclora"), progress=False)
    return {name: folder / name for name in kinds}
