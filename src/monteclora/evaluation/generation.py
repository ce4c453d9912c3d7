"""A run writes answers to a task's questions, and they are judged."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from monteclora.config.checks import check_at_least_one
from monteclora.data.encoding import Encoder
from monteclora.errors import ConfigError, UnsafeCodeError
from monteclora.evaluation.answers import Answers, Slot
from monteclora.metrics.intervals import bootstrap_interval
from monteclora.metrics.pass_at_k import pass_at_k
from monteclora.prediction.forward import batches
from monteclora.prediction.generation import Decoding, complete
from monteclora.runs.calibration import weights_sha256
from monteclora.runs.documents import read_document, write_document
from monteclora.runs.loading import LoadedRun, load_run
from monteclora.runs.recipe import recipe_sha256
from monteclora.runs.result import RunResult
from monteclora.runs.run_folder import RunFolder
from monteclora.system.atomic import replacing
from monteclora.system.devices import usable_cores
from monteclora.system.progress import progress_bar
from monteclora.system.quiet import quiet_libraries
from monteclora.system.sandbox import require_sandbox
from monteclora.tasks import Task, get_task
from monteclora.tasks.base import Predictor
from monteclora.tasks.generation import Problem, Verdict

__all__ = ["GENERATION_FILE", "GenerationResult", "Score", "generate"]

GENERATION_FILE = "generation.json"
ANSWERS_FOLDER = "answers"
_FORMAT = 1
_KS = (1, 10, 100)
_MOST_JUDGES = 8  # at once


@dataclass(frozen=True)
class Score:
    """The mean over problems, and its 95 % bootstrap interval over them (None for a single problem)."""

    mean: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class GenerationResult:
    """What the answers of a run are worth.

    Attributes:
        folder: of the run.
        task: whose questions were answered.
        split: of them.
        problems: how many.
        num_samples: posterior draws, 0 for the mean.
        samples: answers to each problem under each draw.
        scores: by metric: the share of right answers by each of the task's criteria, and ``pass@k`` where there are k
            answers to a problem and one criterion.
        answers: the file with every answer and its verdict.
        seconds: it took.
        notes: what a reader of the numbers must know, in words.
    """

    folder: Path
    task: str
    split: str
    problems: int
    num_samples: int
    samples: int
    scores: Mapping[str, Score]
    answers: Path
    seconds: float
    notes: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """Everything, for JSON."""
        found = asdict(self)
        return {**found, "folder": str(self.folder), "answers": str(self.answers), "notes": list(self.notes)}


def generate(
    run: str | Path | RunResult,
    task: str | None = None,
    split: str = "test",
    *,
    num_samples: int = 0,
    seed: int = 0,
    samples: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_new_tokens: int | None = None,
    rows: int | None = None,
    batch_size: int | None = None,
    base: bool = False,
    allow_code_execution: bool = False,
    progress: bool = True,
) -> GenerationResult:
    """Have a run answer the questions of a task, and judge the answers.

    Answers are appended to a file in the run folder as they come: the same call goes on where an earlier one stopped.

    Args:
        run: a run folder of a language model, or what ``train`` gave.
        task: with generated answers (gsm8k, humaneval); by default the one the run was trained on.
        split: of the task.
        num_samples: posterior draws; each answers every question. 0 takes the posterior's mean.
        seed: of draws and sampling.
        samples: answers to each question under each draw; more than one needs a temperature.
        temperature: of sampling; 0 takes the most probable tokens.
        top_p: of sampling.
        max_new_tokens: most tokens of an answer; by default the task's.
        rows: at most so many questions, chosen by their content: the same ones for every run.
        batch_size: questions per forward pass; by default the recipe's ``training.eval_batch_size``.
        base: have the pretrained model answer, without the adapter.
        allow_code_execution: let judging run programs that the model wrote; see :mod:`monteclora.system.sandbox` for
            what protects this machine and what does not.
        progress: whether to draw a progress bar on standard error.

    Raises:
        CheckpointError: not a run, an unfinished one, or a file of answers is damaged.
        ConfigError: an argument does not fit the run or the task.
        DataError: the split is missing or wrong.
        UnsafeCodeError: judging would run programs, and that is not allowed or cannot be confined.
    """
    check_at_least_one(rows=rows, samples=samples, max_new_tokens=max_new_tokens)
    if samples > 1 and not temperature:
        raise ConfigError(
            f"samples is {samples} at temperature 0, which gives one answer", "Set a temperature, as 0.8."
        )
    loaded = load_run(run.folder if isinstance(run, RunResult) else run, base=base)
    loaded.check_single("generation")
    asked = _asked(loaded, task, allow_code_execution)
    assert asked.generation is not None
    longest = asked.generation.max_new_tokens if max_new_tokens is None else max_new_tokens
    decoding = Decoding(longest, temperature, top_p)
    drawn = loaded.sampler(num_samples=num_samples, seed=seed)
    predictor = loaded.predictor(drawn, batch_size)
    draws = 0 if drawn is None else drawn.num_samples
    folder = Path(loaded.recipe.data.folder) if loaded.recipe.data.folder else None
    problems = _chosen(asked.generation.problems(split, folder), rows)
    started = time.perf_counter()
    about = {
        "format": _FORMAT,
        "recipe": recipe_sha256(loaded.recipe),
        "model": "base" if base else "adapter",
        # training on and calibrating change them without changing the recipe
        "weights_sha256": None if base else weights_sha256(RunFolder(loaded.folder).adapter),
        "task": asked.name,
        "split": split,
        "problems": hashlib.sha256("\0".join(problem.prompt for problem in problems).encode()).hexdigest(),
        "num_samples": draws,
        "seed": seed,
        **asdict(decoding),
    }
    answers = Answers(loaded.folder / ANSWERS_FOLDER, f"{asked.name}-{split}", about)
    notes = _answer(loaded, predictor, problems, answers, decoding, samples, seed, progress)
    slots = sorted((p, d, a) for p in range(len(problems)) for d in range(max(draws, 1)) for a in range(samples))
    verdicts = _judge(asked, problems, answers, slots, progress)
    table = answers.path.with_suffix(".parquet")
    _write_table(table, problems, answers, verdicts)
    result = GenerationResult(
        folder=loaded.folder,
        task=asked.name,
        split=split,
        problems=len(problems),
        num_samples=draws,
        samples=samples,
        scores=_scores(len(problems), verdicts),
        answers=table,
        seconds=time.perf_counter() - started,
        notes=(*notes, *_counted(verdicts)),
    )
    _keep(result, {**about, "samples": samples})
    return result


def _asked(loaded: LoadedRun, name: str | None, allow_code_execution: bool) -> Task:
    """The task to be answered. Raises before any model is run."""
    if loaded.kind != "causal_lm":
        raise ConfigError(f"{loaded.folder} trained a classifier, which writes no answers", "Use monteclora evaluate.")
    if name is None and loaded.recipe.data.task is None:
        raise ConfigError("the run was trained on own files, whose answers nothing judges", "Name a task.")
    task = get_task(name or str(loaded.recipe.data.task))
    if task.generation is None:
        raise ConfigError(
            f"answers to {task.name} are not generated", "Use monteclora evaluate, or gsm8k or humaneval."
        )
    if task.generation.runs_code:
        if not allow_code_execution:
            raise UnsafeCodeError(
                f"judging answers to {task.name} runs programs that the model wrote",
                "Allow it with --allow-code-execution; the documentation says what the sandbox protects against.",
            )
        require_sandbox()
    return task


def _chosen(problems: list[Problem], count: int | None) -> list[Problem]:
    if count is None or count >= len(problems):
        return problems
    ranks = [hashlib.sha256(problem.prompt.encode()).digest() for problem in problems]
    return [problems[i] for i in sorted(sorted(range(len(problems)), key=lambda i: ranks[i])[:count])]


def _answer(
    loaded: LoadedRun,
    predictor: Predictor,
    problems: list[Problem],
    answers: Answers,
    decoding: Decoding,
    samples: int,
    seed: int,
    progress: bool,
) -> tuple[str, ...]:
    """Have every question answered that has no answer yet; says what was truncated."""
    sampler = predictor.samplers[-1]
    room = _room(loaded) - decoding.max_new_tokens
    if room < 2:
        raise ConfigError(
            f"max_new_tokens is {decoding.max_new_tokens}, and the model reads {_room(loaded)} tokens", "Ask for fewer."
        )
    encoder = Encoder(loaded.tokenizer)
    encoded = [encoder.prompt({"prompt": problem.prompt}, room) for problem in problems]
    total = len(problems) * sampler.num_samples * samples
    with quiet_libraries(), progress_bar(f"{loaded.recipe.name}: answers", total, progress) as advance:
        advance(len([slot for slot in answers.texts if slot[2] < samples]))
        for draw in range(sampler.num_samples):
            slots = [
                (problem, draw, answer)
                for answer in range(samples)
                for problem in range(len(problems))
                if (problem, draw, answer) not in answers.texts
            ]
            rows = [
                {"input_ids": encoded[slot[0]][0], "attention_mask": [1] * len(encoded[slot[0]][0])} for slot in slots
            ]
            for indices in batches(rows, predictor.batch_size):
                seeds = [_seed(seed, slots[i]) for i in indices]
                with predictor.precision(), sampler.draw(loaded.model, draw):
                    texts = complete(loaded.model, loaded.tokenizer, [rows[i] for i in indices], decoding, seeds)
                answers.add({slots[i]: text for i, text in zip(indices, texts, strict=True)})
                advance(len(indices))
    cut = sum(is_cut for _, is_cut in encoded)
    return (f"{cut} of {len(problems)} questions were truncated to {room} tokens",) if cut else ()


def _room(loaded: LoadedRun) -> int:
    """How many tokens the model reads."""
    config: Any = getattr(loaded.model, "config", None)
    positions = getattr(config, "max_position_embeddings", None) or loaded.tokenizer.model_max_length
    return int(min(positions, loaded.tokenizer.model_max_length))


def _seed(seed: int, slot: Slot) -> int:
    text = " ".join(map(str, (seed, *slot)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def _judge(
    task: Task, problems: list[Problem], answers: Answers, slots: list[Slot], progress: bool
) -> dict[Slot, Verdict]:
    generation = task.generation
    assert generation is not None
    with (
        progress_bar(f"{task.name}: judged", len(slots), progress) as advance,
        # judging may take two processes and has a limit of wall-clock time
        ThreadPoolExecutor(min(usable_cores(), _MOST_JUDGES)) as pool,
    ):

        def verdict(slot: Slot) -> Verdict:
            found = generation.judge(problems[slot[0]], answers.texts[slot])
            advance(1)
            return found

        return dict(zip(slots, pool.map(verdict, slots), strict=True))


def _counted(verdicts: Mapping[Slot, Verdict]) -> list[str]:
    """What verdicts say of how they came about, each with the number of answers."""
    counts = Counter(note for verdict in verdicts.values() for note in verdict.notes)
    return [f"{count} of {len(verdicts)} answers: {note}" for note, count in counts.items()]


def _scores(problems: int, verdicts: Mapping[Slot, Verdict]) -> dict[str, Score]:
    first = next(iter(verdicts.values()))
    found: dict[str, Score] = {}
    for name in first.correct:
        right: list[list[bool]] = [[] for _ in range(problems)]
        for slot, verdict in verdicts.items():
            right[slot[0]].append(verdict.correct[name])
        if len(first.correct) > 1:
            found[name] = _score([float(np.mean(each)) for each in right])
            continue
        for k in (k for k in _KS if k <= len(right[0])):
            found[f"pass@{k}"] = _score([pass_at_k(len(each), sum(each), k) for each in right])
    return found


def _score(values: list[float]) -> Score:
    if len(values) < 2:
        return Score(values[0])
    interval = bootstrap_interval(values, seed=0)
    return Score(interval.mean, interval.low, interval.high)


def _write_table(path: Path, problems: list[Problem], answers: Answers, verdicts: Mapping[Slot, Verdict]) -> None:
    rows = [
        {
            **dict(zip(("problem", "draw", "answer"), slot, strict=True)),
            "prompt": problems[slot[0]].prompt,
            "text": answers.texts[slot],
            "extracted": verdict.extracted,
            "reason": verdict.reason,
            "reference": problems[slot[0]].reference,
            **verdict.correct,
        }
        for slot, verdict in verdicts.items()
    ]
    with replacing(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows), temporary)


def _keep(result: GenerationResult, about: Mapping[str, Any]) -> None:
    """Put the result into the run's ``generation.json``, in the place of an earlier one with the same settings."""
    path = result.folder / GENERATION_FILE
    results = read_document(path, _FORMAT, _results) or []
    kept = [each for each in results if each.get("about") != dict(about)]
    write_document(path, _FORMAT, {"results": [*kept, {"about": dict(about), **result.facts()}]})


def _results(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [dict(each) for each in document["results"]]
