"""Tiny models and data on disk, and runs of them that take a second."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from monteclora.runs.result import RunResult
from monteclora.runs.run_folder import RunFolder
from monteclora.training import phases
from monteclora.training.interruption import Interruption
from monteclora.training.run import train
from tests.models import END, PAD, VOCABULARY, bert, llama

WORDS = [f"w{i}" for i in range(VOCABULARY - 4)]
TIMES = ("seconds", "tokens_per_second", "peak_memory_bytes")
Recipe = dict[str, Any]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


def save_tokenizer(folder: Path, *, classifies: bool) -> None:
    vocabulary = {"[PAD]": 0, "[END]": 1, "[CLS]": 2, "[UNK]": 3} | {word: i + 4 for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if classifies:
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[END]", unk_token="[UNK]", model_max_length=48
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model folders ``bert``, ``llama`` and ``wide``; ``class.jsonl`` and ``text.jsonl`` with 44 rows each."""
    folder = tmp_path_factory.mktemp("assets")
    bert(hidden_dropout_prob=0.1).bert.save_pretrained(folder / "bert")
    llama().save_pretrained(folder / "llama")
    llama(hidden_size=64, intermediate_size=64).save_pretrained(folder / "wide")  # blocks of 4-bit weights are of 64
    save_tokenizer(folder / "bert", classifies=True)
    save_tokenizer(folder / "llama", classifies=False)
    save_tokenizer(folder / "wide", classifies=False)
    generator = random.Random(0)

    def text(words: list[str]) -> str:
        return " ".join(generator.choices(words, k=generator.randint(3, 12)))

    halves = WORDS[:40], WORDS[40:80]
    rows = [{"text": text(halves[i % 2]), "label": i % 2} for i in range(44)]
    (folder / "class.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"prompt": text(WORDS), "completion": text(halves[i % 2])} for i in range(44)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return folder


@pytest.fixture
def recipe(assets: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """Makes a recipe of 10 steps: two epochs of 38 rows, the last batch of each ragged."""

    def make(
        kind: str = "classification",
        method: str = "monteclora",
        *,
        name: str = "run",
        method_options: dict[str, Any] | None = None,
        **training: Any,
    ) -> Recipe:
        classifies = kind == "classification"
        return {
            "name": name,
            "output": str(tmp_path / name),
            "model": {"name": str(assets / ("bert" if classifies else "llama"))},
            "data": {
                "task": str(assets / ("class.jsonl" if classifies else "text.jsonl")),
                "max_length": 24,
                "validation_fraction": 0.15,
            },
            "method": {"name": method, "lora_dropout": 0.1, "r": 4, **(method_options or {})},
            "training": {
                "epochs": 2,
                "batch_size": 8,
                "learning_rate": 1e-2,
                "logging_every": 3,
                "keep_checkpoints": 100,
                **training,
            },
        }

    return make


class StopAfter(Interruption):
    """A request to stop that comes in while step ``step`` of this session is done."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.left = step

    def agreed(self, device: torch.device) -> bool:
        self.left -= 1
        return self.left <= 0


def train_until(monkeypatch: pytest.MonkeyPatch, interruption: Interruption, recipe: Recipe) -> None:
    """Train until the request comes in."""

    @contextmanager
    def signals(acknowledgement: str) -> Iterator[Interruption]:
        yield interruption

    with monkeypatch.context() as patch:
        patch.setattr(phases, "stop_on_signals", signals)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, progress=False)


def quietly(recipe: Recipe) -> RunResult:
    return train(recipe, progress=False)


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def adapter_content(folder: Path) -> dict[str, Any]:
    """Everything in the adapter's files; the order of a file's metadata is not fixed, so bytes are not compared."""
    content: dict[str, Any] = {}
    for path in (folder / "adapter").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            content[path.name] = (file.metadata(), {name: t.numpy().tobytes() for name, t in tensors.items()})
    return content


def trace(folder: Path) -> dict[str, Any]:
    """Everything about a run that must not depend on how often it was interrupted."""
    run = RunFolder(folder)
    last = max(run.checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    state = json.loads((last / "training_state.json").read_text())
    return {
        "adapter": adapter_content(folder),
        "optimizer": (last / "training_state.safetensors").read_bytes(),
        "state": without_times(state),
        "metrics": without_times(run.metrics.read()),
    }


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Words w0, w1, ... and a chat template, made here: nothing is fetched."""
    words = {f"w{number}": number + 2 for number in range(VOCABULARY - 2)}
    inner = Tokenizer(models.WordLevel({"<pad>": PAD, "<end>": END, **words}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", unk_token="<pad>")
    made.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    return made
