"""A run writes answers to a task's questions, and they are judged."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monteclora.config.checks import check_at_least_one
from monteclora.data.encoding import Encoder
from monteclora.errors import ConfigError, UnsafeCodeError
from monteclora.evaluation.answer_scores import errors_told
from monteclora.evaluation.answers import Answers, Slot
from monteclora.evaluation.judging import Score, counted_notes, judge, scores, write_verdicts
from monteclora.prediction.ensemble import ENSEMBLE
from monteclora.prediction.forward import batches
from monteclora.prediction.generation import Decoding, complete
from monteclora.runs.calibration import weights_sha256
from monteclora.runs.determining import recipe_sha256
from monteclora.runs.documents import read_document, write_document
from monteclora.runs.ensemble import folders_of, load_ensemble
from monteclora.runs.loading import LoadedRun, load_run
from monteclora.runs.result import RunResult
from monteclora.runs.run_folder import RunFolder
from monteclora.system.progress import progress_bar
from monteclora.system.quiet import quiet_libraries
from monteclora.system.sandbox import require_sandbox
from monteclora.tasks import Task, get_task
from monteclora.tasks.base import Predictor
from monteclora.tasks.generation import Problem

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

__all__ = ["GENERATION_FILE", "GenerationResult", "generate"]

GENERATION_FILE = "generation.json"
ANSWERS_FOLDER = "answers"
_FORMAT = 1


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
        error_detection: the AUROC of wrong against right first answers by criterion and score, see
            :func:`monteclora.evaluation.answer_scores.errors_told`; None where it was not asked for.
        readers: the other runs whose models read the answers for it.
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
    error_detection: Mapping[str, Mapping[str, float]] | None = None
    readers: tuple[Path, ...] = ()

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={score.mean:.4g}" for name, score in self.scores.items())
        return f"GenerationResult({self.folder}, {self.task}, {self.split}, {self.problems} problems: {shown})"

    def facts(self) -> dict[str, Any]:
        """Everything, for JSON."""
        found = asdict(self)
        paths = {
            "folder": str(self.folder),
            "answers": str(self.answers),
            "readers": [str(each) for each in self.readers],
        }
        return {**found, **paths, "notes": list(self.notes)}


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
    error_detection: bool = False,
    readers: Sequence[str | Path | RunResult] = (),
    progress: bool = True,
) -> GenerationResult:
    """Have a run answer the questions of a task, and judge the answers.

    Answers are appended to a file in the run folder as they come: the same call resumes where an earlier one stopped.

    Args:
        run: a run folder of a language model, or what ``train`` gave.
        task: with generated answers (gsm8k, humaneval); by default the one the run was trained on.
        split: of the task.
        num_samples: posterior draws; each answers every question. 0 takes the posterior's mean.
        seed: of draws and sampling.
        samples: answers to each question under each draw; more than one needs a temperature.
        temperature: of sampling; 0 takes the most probable tokens.
        top_p: of sampling.
        max_new_tokens: the maximum number of tokens of an answer; by default the task's.
        rows: at most this many questions, chosen by their content: the same ones for every run.
        batch_size: questions per forward pass; by default the recipe's ``training.eval_batch_size``.
        base: have the pretrained model answer, without the adapter.
        allow_code_execution: let judging run programs that the model wrote; see :mod:`monteclora.system.sandbox` for
            what protects this machine and what does not.
        error_detection: also measure how well scores of the first answers tell wrong ones from right ones; they are
            read again token by token, under draws where the method has any (the recipe's number of them).
        readers: more runs, which read the answers together with this one, as an ensemble.
        progress: whether to draw a progress bar on standard error.

    Raises:
        CheckpointError: not a run, an unfinished one, or a file of answers is damaged.
        ConfigError: an argument does not fit the run or the task.
        DataError: the split is missing or wrong.
        UnsafeCodeError: judging would run programs, and that is not allowed or cannot be confined.
    """
    check_at_least_one(rows=rows, samples=samples, max_new_tokens=max_new_tokens)
    if readers and (base or not error_detection):
        given = "base" if base else "no error_detection"
        raise ConfigError(
            f"several runs were given with {given}",
            "One run writes the answers; for error_detection more can read them again.",
        )
    if samples > 1 and not temperature:
        raise ConfigError(
            f"samples is {samples} at temperature 0, which gives one answer", "Set a temperature, as 0.8."
        )
    loaded = load_run(run.folder if isinstance(run, RunResult) else run, base=base)
    loaded.check_single("generation")
    asked = _asked(loaded, task, allow_code_execution)
    assert asked.generation is not None
    others = folders_of(readers)
    # before answers are written, which takes long: the runs may not fit each other
    reading = load_ensemble([loaded.folder, *others]) if others else loaded
    decoding = Decoding(max_new_tokens or asked.generation.max_new_tokens, temperature, top_p)
    drawn = loaded.sampler(num_samples=num_samples, seed=seed)
    predictor = loaded.predictor(drawn, batch_size)
    draws = 0 if drawn is None else drawn.num_samples
    problems = _chosen(asked.generation.problems(split, loaded.recipe.data.local_folder), rows)
    started = time.perf_counter()
    about = {
        **_about_model(loaded, base),
        **_about_questions(asked.name, split, problems),
        "num_samples": draws,
        "seed": seed,
        **asdict(decoding),
    }
    answers = Answers(loaded.folder / ANSWERS_FOLDER, f"{asked.name}-{split}", about)
    title = f"{loaded.recipe.name}: answers"
    notes = _answer(title, loaded.tokenizer, predictor, problems, answers, decoding, samples, seed, progress)
    slots = sorted((p, d, a) for p in range(len(problems)) for d in range(max(draws, 1)) for a in range(samples))
    verdicts = judge(asked.name, asked.generation, problems, answers.texts, slots, progress)
    table = answers.path.with_suffix(".parquet")
    write_verdicts(table, problems, answers.texts, verdicts)
    result = GenerationResult(
        folder=loaded.folder,
        task=asked.name,
        split=split,
        problems=len(problems),
        num_samples=draws,
        samples=samples,
        scores=scores(len(problems), verdicts),
        answers=table,
        seconds=time.perf_counter() - started,
        notes=(*notes, *counted_notes(verdicts)),
    )
    _keep(result, {**about, "samples": samples})
    if not error_detection:
        return result
    # reading the answers again takes long, and what was judged is on disk by now
    reader = reading.predictor(reading.sampler(ENSEMBLE if others else None, seed=seed), batch_size)
    reader = replace(reader, max_length=_context(loaded.model, loaded.tokenizer))
    told, left_out = errors_told(reader, problems, answers.texts, verdicts)
    result = replace(
        result,
        seconds=time.perf_counter() - started,
        notes=(*result.notes, *left_out),
        error_detection=told,
        readers=tuple(others),
    )
    _keep(result, {**about, "samples": samples})
    return result


def _about_model(loaded: LoadedRun, base: bool) -> dict[str, Any]:
    """What tells answers of this model from those of another, in their file."""
    return {
        "format": _FORMAT,
        "recipe": recipe_sha256(loaded.recipe),
        "model": "base" if base else "adapter",
        # further training and calibration change them without changing the recipe
        "weights_sha256": None if base else weights_sha256(RunFolder(loaded.folder).adapter),
    }


def _about_questions(task: str, split: str, problems: Sequence[Problem]) -> dict[str, Any]:
    prompts = "\0".join(problem.prompt for problem in problems)
    return {"task": task, "split": split, "problems": hashlib.sha256(prompts.encode()).hexdigest()}


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
    title: str,
    tokenizer: PreTrainedTokenizerBase,
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
    context = _context(predictor.model, tokenizer)
    room = context - decoding.max_new_tokens
    if room < 2:
        raise ConfigError(
            f"max_new_tokens is {decoding.max_new_tokens}, and the model reads {context} tokens", "Ask for fewer."
        )
    encoder = Encoder(tokenizer)
    encoded = [encoder.prompt({"prompt": problem.prompt}, room) for problem in problems]
    total = len(problems) * sampler.num_samples * samples
    with quiet_libraries(), progress_bar(title, total, progress) as advance:
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
                with predictor.precision(), sampler.draw(predictor.model, draw):
                    texts = complete(predictor.model, tokenizer, [rows[i] for i in indices], decoding, seeds)
                answers.add({slots[i]: text for i, text in zip(indices, texts, strict=True)})
                advance(len(indices))
    cut = sum(is_cut for _, is_cut in encoded)
    return (f"{cut} of {len(problems)} questions were truncated to {room} tokens",) if cut else ()


def _context(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """The most tokens that the model reads."""
    config: Any = getattr(model, "config", None)
    positions = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    return int(min(positions, tokenizer.model_max_length))


def _seed(seed: int, slot: Slot) -> int:
    text = " ".join(map(str, (seed, *slot)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def _keep(result: GenerationResult, about: Mapping[str, Any]) -> None:
    """Put the result into the run's ``generation.json``, in the place of an earlier one with the same settings."""
    path = result.folder / GENERATION_FILE
    results = read_document(path, _FORMAT, _results) or []
    kept = [each for each in results if each.get("about") != dict(about)]
    write_document(path, _FORMAT, {"results": [*kept, {"about": dict(about), **result.facts()}]})


def _results(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [dict(each) for each in document["results"]]
