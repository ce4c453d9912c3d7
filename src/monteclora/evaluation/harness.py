"""Tasks of lm-evaluation-harness, on a model as it is in memory: adapter, posterior and precision stay in place."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from monteclora.data.encoding import Encoder
from monteclora.errors import ConfigError
from monteclora.prediction.sampler import MEAN
from monteclora.runs.loading import load_run
from monteclora.runs.result import RunResult
from monteclora.system.quiet import quiet_libraries
from monteclora.system.randomness import preserved_generators
from monteclora.tasks import get_task

__all__ = ["HarnessResult", "harness"]

# of the harness's own gsm8k; judging is the same, the question is asked as it was in training
_GSM8K = {
    "task": "gsm8k",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "{{completion}}",
    "num_fewshot": 0,
    "filter_list": [
        {
            "name": "strict-match",
            "filter": [{"function": "regex", "regex_pattern": "#### (\\-?[0-9\\.\\,]+)"}, {"function": "take_first"}],
        },
        {
            "name": "flexible-extract",
            "filter": [
                {"function": "regex", "group_select": -1, "regex_pattern": "(-?[$0-9.,]{2,})|(-?[0-9]+)"},
                {"function": "take_first"},
            ],
        },
    ],
    "metric_list": [
        {
            "metric": "exact_match",
            "aggregation": "mean",
            "higher_is_better": True,
            "ignore_case": True,
            "ignore_punctuation": False,
            "regexes_to_ignore": [",", "\\$", "(?s).*#### ", "\\.$"],
        }
    ],
}


@dataclass(frozen=True)
class HarnessResult:
    """What the harness measured.

    Attributes:
        results: under each draw (one entry at the mean), metrics by task.
        samples: likewise, each task's questions with the model's responses.
        num_samples: posterior draws, 0 for the mean.
    """

    results: tuple[Mapping[str, Mapping[str, Any]], ...]
    samples: tuple[Mapping[str, Sequence[Mapping[str, Any]]], ...]
    num_samples: int


def harness(
    run: str | Path | RunResult,
    tasks: Sequence[str],
    *,
    include: str | Path | None = None,
    limit: int | None = None,
    num_samples: int = 0,
    seed: int = 0,
    batch_size: int | None = None,
    base: bool = False,
) -> HarnessResult:
    """Evaluate a run with lm-evaluation-harness (``pip install "monteclora[harness]"``).

    The harness seeds the global generators; they are afterwards as they were before.

    Args:
        run: a run folder of a language model, or what ``train`` gave.
        tasks: ``gsm8k`` of this package's data, asked as in training; or tasks of the harness: names, or paths of YAML
            files.
        include: a folder with YAML files of tasks, to be looked in instead of the harness's own.
        limit: at most this many questions of each task, the first ones.
        num_samples: posterior draws, each of which is measured by itself; 0 for the mean.
        seed: of the draws.
        batch_size: sequences per forward pass; by default the recipe's ``training.eval_batch_size``.
        base: the pretrained model, without the adapter.

    Raises:
        CheckpointError: not a run, or an unfinished one.
        ConfigError: the harness is not installed, does not know a task, or cannot get its data.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            f"lm-evaluation-harness is not available ({error})", 'Install it with pip install "monteclora[harness]".'
        ) from None
    loaded = load_run(run.folder if isinstance(run, RunResult) else run, base=base)
    loaded.check_single("the harness")
    if loaded.kind != "causal_lm":
        raise ConfigError(f"{loaded.folder} trained a classifier", "The harness measures language models.")
    drawn = loaded.sampler(num_samples=num_samples, seed=seed)
    predictor, sampler = loaded.predictor(drawn, batch_size), drawn or MEAN
    found: list[dict[str, dict[str, Any]]] = []
    with (
        preserved_generators(),
        quiet_libraries(),
        _quiet(),
        _local(loaded.recipe.data.local_folder, loaded.tokenizer, tasks) as (named, local),
    ):
        # reading the harness's own thousands of files takes a minute
        own = include is None and any(not name.endswith((".yaml", ".yml")) for name in named)
        manager = TaskManager(include_path=str(include) if include else None, include_defaults=own)
        about = {"pretrained": loaded.model, "tokenizer": loaded.tokenizer, "batch_size": predictor.batch_size}
        # ours are asked as in training, template included; the harness asks its own as it does
        parts = [(named, HFLM(**about), bool(loaded.tokenizer.chat_template)), (local, _asking(HFLM)(**about), False)]
        for draw in range(sampler.num_samples):
            found.append({"results": {}, "samples": {}})
            for questions, wrapped, templated in parts:
                if not questions:
                    continue
                with _as_our_errors(tasks), predictor.precision(), sampler.draw(loaded.model, draw):
                    measured = simple_evaluate(
                        model=wrapped,
                        tasks=questions,
                        limit=limit,
                        task_manager=manager,
                        apply_chat_template=templated,
                        bootstrap_iters=0,
                    )
                for part, gathered in found[-1].items():
                    gathered.update(measured[part])
    return HarnessResult(
        results=tuple(each["results"] for each in found),
        samples=tuple(each["samples"] for each in found),
        num_samples=0 if drawn is None else drawn.num_samples,
    )


@contextmanager
def _as_our_errors(tasks: Sequence[str]) -> Iterator[None]:
    """Raise ConfigError for what the harness cannot run."""
    try:
        yield
    except (KeyError, OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"the harness cannot run {', '.join(tasks)}: {reason}",
            "Give names that `lm_eval ls tasks` shows, or the paths of YAML files; data of its own tasks come from the "
            "hub.",
        ) from error


def _asking(base: Any) -> Any:
    """The harness's model class, asking in the very tokens that training and :mod:`monteclora.evaluation.generation`
    have before an answer: plain texts in, without the harness's own rules for templates and special tokens."""

    class AsTrained(base):
        def tok_batch_encode(
            self,
            strings: Sequence[str],
            padding_side: str = "left",
            left_truncate_len: int | None = None,
            truncation: bool = False,
        ) -> tuple[Tensor, Tensor]:
            """Token ids and mask of prompts, shape (B, T)."""
            longest = left_truncate_len or self.max_length
            encoder = Encoder(self.tokenizer)
            ids = [encoder.prompt({"prompt": text}, longest)[0] for text in strings]
            batch = self.tokenizer.pad({"input_ids": ids}, padding_side=padding_side, return_tensors="pt")
            return batch["input_ids"], batch["attention_mask"]

    return AsTrained


@contextmanager
def _local(
    folder: Path | None, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[str]
) -> Iterator[tuple[list[str], list[dict[str, Any]]]]:
    """The tasks that the harness finds by itself, and those whose questions are this package's, from ``folder``."""
    named = [task for task in tasks if task != "gsm8k"]
    if len(named) == len(tasks):
        yield named, []
        return
    generation = get_task("gsm8k").generation
    assert generation is not None
    with tempfile.TemporaryDirectory() as place:
        rows = [
            {"prompt": problem.prompt, "completion": problem.reference}
            for problem in generation.problems("test", folder)
        ]
        path = Path(place) / "test.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        files = {"data_files": {"test": str(path)}, "cache_dir": place}
        longest = min(generation.max_new_tokens, tokenizer.model_max_length // 2)  # the question needs room too
        until = {"until": [], "do_sample": False, "max_gen_toks": longest}
        yield named, [{**_GSM8K, "dataset_kwargs": files, "generation_kwargs": until}]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's warnings about models that are given rather than named."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
