"""``monteclora generate``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from monteclora.cli.output import Flag, Json, note, print_json, print_line, print_table

if TYPE_CHECKING:
    from monteclora.evaluation.generation import GenerationResult

__all__ = ["generate"]


def generate(
    run: str,
    /,
    *others: str,
    task: str | None = None,
    split: str = "test",
    num_samples: int = 0,
    seed: int = 0,
    samples: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_new_tokens: int | None = None,
    rows: int | None = None,
    batch_size: int | None = None,
    base: Flag = False,
    allow_code_execution: Flag = False,
    error_detection: Flag = False,
    as_json: Json = False,
) -> None:
    """Have a run write answers to a task's questions, and judge them: gsm8k by exact match, humaneval by running them.

    Answers are kept as they come: the same command resumes where an earlier one stopped.

    Args:
        run: a run folder of a language model.
        others: more run folders, whose models read the answers together with the first one's, as an ensemble, for
            --error-detection.
        task: by default the one it was trained on.
        split: of the task.
        num_samples: posterior draws, each of which answers every question; 0 for the mean.
        seed: of draws and sampling.
        samples: answers to each question under each draw, for pass@k; more than one needs a temperature.
        temperature: of sampling, 0 for the most probable tokens.
        top_p: of sampling.
        max_new_tokens: the maximum number of tokens of an answer; by default the task's.
        rows: answer at most this many questions, the same ones for every run.
        batch_size: questions per forward pass; by default the recipe's training.eval_batch_size.
        base: have the pretrained model answer, without the adapter.
        allow_code_execution: let judging run programs that the model wrote, in a sandbox (Linux only).
        error_detection: also measure how well scores of the first answers, read again token by token under draws where
            the method has any, tell wrong ones from right ones.
    """
    from monteclora.evaluation.generation import generate as answer

    result = answer(
        run,
        task,
        split,
        num_samples=num_samples,
        seed=seed,
        samples=samples,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        rows=rows,
        batch_size=batch_size,
        base=base,
        allow_code_execution=allow_code_execution,
        error_detection=error_detection,
        readers=others,
    )
    if as_json:
        print_json(result.facts())
        return
    _print_scores(result, "pretrained" if base else "mean")


def _print_scores(result: GenerationResult, model: str) -> None:
    from monteclora.evaluation.answer_scores import ANSWER_SCORES

    how = f"{result.num_samples} posterior draws" if result.num_samples else model
    title = f"{result.folder} on {result.task}, {result.split} ({result.problems:,} questions, {how})"
    shown = [
        (name, f"{score.mean:.3f}", "" if score.low is None else f"{score.low:.3f} to {score.high:.3f}")
        for name, score in result.scores.items()
    ]
    print_table(["", "right", "95 % interval"], shown, title)
    readers = f", read by {1 + len(result.readers)} runs," if result.readers else ""
    for criterion, told in (result.error_detection or {}).items():
        by = ", ".join(f"{ANSWER_SCORES[score]} {value:.3f}" for score, value in told.items())
        print_line(f"AUROC of wrong against right answers ({criterion}){readers} by {by}")
    print_line(f"written: {result.answers}")
    for text in result.notes:
        note(text)
