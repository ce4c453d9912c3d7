"""The report of a run folder: what is measured for it, and the page it becomes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

from monteclora.evaluation.result import EvaluationResult
from monteclora.evaluation.run import evaluate_loaded, keep_facts
from monteclora.evaluation.verdict import Verdict, verdict
from monteclora.metrics.registry import METRICS
from monteclora.prediction.labels import LabelPredictions
from monteclora.prediction.predictions import Predictions
from monteclora.prediction.scores import ScorePredictions
from monteclora.reports.answers import label_section
from monteclora.reports.figures import TrainingCurve
from monteclora.reports.page import Column, Row, Section, Table, write_page
from monteclora.reports.results import FINISHED, Evaluation, Example, RunReport, Uncertainty
from monteclora.reports.runs import run_page
from monteclora.reports.texts import text_sections
from monteclora.reports.trust import scale_section, trust_sections
from monteclora.runs.calibration import read_calibration
from monteclora.runs.determining import settings
from monteclora.runs.loading import LoadedRun, load_run
from monteclora.runs.recipe import Recipe
from monteclora.runs.records import read_evaluations
from monteclora.runs.result import learning_rate_found
from monteclora.runs.run_folder import RunFolder
from monteclora.system.quiet import quiet_libraries
from monteclora.tasks.base import AnyPredictions, TokenKind
from monteclora.tasks.kinds import KINDS

__all__ = ["PAGE", "environment_facts", "training_curve", "write_run_report"]

PAGE = "report.html"
_EXAMPLES = 12
_TEXTS, _LONGEST = 3, 48
_SAME = ("sha256", "rows", "weights_sha256", "sampler", "members", "calibrator", "num_samples", "layers", "seed")
_VERSIONS = ("torch", "transformers", "peft")


def write_run_report(
    folder: Path,
    split: str | None = None,
    *,
    ood: str | Path | None = None,
    shift: bool = False,
    progress: bool = True,
) -> Path:
    """Evaluate a finished run on a split, and write ``report.html`` into its folder.

    Args:
        folder: made by ``monteclora train``.
        split: by default test where it has labels, else validation.
        ood, shift: as for :func:`monteclora.evaluate`. Outside rows that the last evaluation of the split had are
            measured again; what it found under corruption, which takes long, is kept if it is of the same predictions.
        progress: whether to draw a progress bar on standard error.

    Raises:
        CheckpointError: not a run, an unfinished or a damaged one, or the page cannot be written.
        ConfigError: an argument does not fit the run.
        DataError: the split is missing or wrong.
    """
    loaded = load_run(folder)
    run = RunFolder(folder)
    before = _before(folder, split)
    file = before.get("ood", {}).get("file")
    ood = ood or (file if file and Path(file).is_file() else None)
    result = evaluate_loaded(loaded, split, ood=ood, shift=shift, progress=progress)
    if not shift and "corrupted" in before:
        result = _with_corrupted(loaded, result, before)
    finished: Mapping[str, Any] = run.finished or {}
    predictions = result.scored.predictions
    evaluation = _evaluation(predictions)
    examples = [] if evaluation is None else _most_uncertain(result)
    judged = _judged(run)
    report = RunReport(
        name=loaded.recipe.name,
        method=loaded.recipe.method.name,
        status=FINISHED,
        evaluation=evaluation,
        training=None if run.members else training_curve(run),
        uncertainty={result.split: Uncertainty(predictions.total, predictions.epistemic)},
        uncertain_examples=examples,
        worst_errors=[] if evaluation is None else _worst(result),
        seconds=finished["seconds"],
        peak_bytes=finished["peak_memory_bytes"],
        trained_parameters=finished["trained_parameters"],
        notes=(*result.notes, *judged.warnings),
        unit="score²" if isinstance(predictions, ScorePredictions) else "nats",
    )
    written, left_out = _written(loaded, result)
    report = replace(report, notes=(*report.notes, *left_out))
    page = run_page(
        report,
        subtitle=f"{loaded.recipe.model.name} on {run.environment['data']['name']}",
        trained=_trained(loaded.recipe, finished, result),
        environment=environment_facts(run),
        reproduce=[
            f"monteclora train {quote(str(run.recipe_file))}",
            f"monteclora report {quote(str(folder))} --split {quote(result.split)}"
            + (f" --ood {quote(str(ood))}" if ood else "")
            + (" --shift" if result.corrupted else ""),
        ],
    )
    further = [
        label_section(predictions, loaded.label_names or ()),
        scale_section(read_calibration(folder).get("posterior_scale")),
        *trust_sections(result),
        *written,
        _settings(loaded.recipe),
    ]
    sections = [*page.sections, *(section for section in further if section is not None)]
    findings = [f"{finding[0].upper()}{finding[1:]}." for finding in judged.findings]
    return write_page(folder / PAGE, replace(page, summary=[*page.summary, *findings], sections=sections))


def _judged(run: RunFolder) -> Verdict:
    """What training said of the run at its end, but for the comparison with frozen features."""
    if run.members or "metrics" not in (run.finished or {}):
        return Verdict((), ())
    return verdict(run.path, baseline=False)


def _settings(recipe: Recipe) -> Section:
    shown = settings(recipe)
    rows = [Row([key, json.dumps(value, ensure_ascii=False)]) for key, value in shown.items()]
    caption = "All other keys have their defaults. Paths lead from the folder in which the run was started."
    return Section("Settings", tables=[Table([Column("Key"), Column("Value")], rows, caption)])


def _before(folder: Path, split: str | None) -> Mapping[str, Any]:
    """The facts of the evaluation that the report's own one replaces; none where there was none."""
    stored = read_evaluations(folder)
    found: Mapping[str, Any] = stored.get(split or ("test" if "test" in stored else "validation"), {}).get(
        "adapter", {}
    )
    return found


def _with_corrupted(loaded: LoadedRun, result: EvaluationResult, before: Mapping[str, Any]) -> EvaluationResult:
    """With what was found under corruption before, where these are the same predictions of the same rows."""
    facts = result.facts()
    if any(before.get(name) != facts.get(name) for name in _SAME):
        why = "corrupted rows are left out: they were measured of other rows, weights or draws. Add --shift"
        return replace(result, notes=(*result.notes, why))
    found = replace(result, corrupted=before["corrupted"])
    keep_facts(loaded, found)
    return found


def _written(loaded: LoadedRun, result: EvaluationResult) -> tuple[list[Section], Sequence[str]]:
    """What a model that writes texts answers to the first rows, token by token; why it is left out, in words."""
    kind = KINDS[loaded.kind]
    if not isinstance(kind, TokenKind):
        return [], ()
    longest = loaded.tokenizer.model_max_length - loaded.recipe.data.max_length
    if longest < 1 or loaded.members:
        why = "that is done for single runs" if loaded.members else "its prompts leave no room for answers"
        return [], (f"no answers are shown token by token: {why}",)
    predictor = loaded.predictor(loaded.sampler())
    with quiet_libraries():
        found = kind.predict_tokens(
            predictor, result.rows.select(range(min(_TEXTS, len(result.rows)))), min(longest, _LONGEST)
        )
    columns = {name: list(values) for name, values in found.columns.items()}
    records = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    sections = text_sections(records)
    return [replace(each, title=f"An answer, token by token ({i})") for i, each in enumerate(sections, 1)], ()


def _evaluation(found: AnyPredictions) -> Evaluation | None:
    """What a page says of labelled predictions; None for completions."""
    if isinstance(found, Predictions) and found.labels is not None:
        return Evaluation.of(found.probs, found.labels)
    if isinstance(found, ScorePredictions) and found.scores is not None:
        return Evaluation.of_scores(found.mean, found.total, found.scores)
    if isinstance(found, LabelPredictions) and found.decisions.labels is not None:
        return Evaluation.of_labels(found.probs, found.decisions.labels.reshape(found.probs.shape))
    return None


def training_curve(run: RunFolder) -> TrainingCurve:
    """What a run logged of its training."""
    events = run.metrics.read()
    logged = [event for event in events if event["event"] == "train"]
    drawn = bool(logged) and all("kl" in event for event in logged)
    validated = [event for event in events if event["event"] == "eval" and "nll" in event]
    tempered = [event.get("tempered_nll", math.nan) for event in validated]
    return TrainingCurve(
        steps=[event["step"] for event in logged],
        loss=[event["loss"] for event in logged],
        kl=[event["kl"] for event in logged] if drawn else None,
        pi_norm_squared=[event["pi_squared_norm"] for event in logged] if drawn else None,
        validation_steps=[event["step"] for event in validated],
        validation_nll=[event["nll"] for event in validated],
        tempered_nll=tempered if any(map(math.isfinite, tempered)) else [],
        kept_step=(run.finished or {}).get("kept_step"),
    )


def environment_facts(run: RunFolder) -> dict[str, str]:
    """Versions, device, threads and seed, for the foot of a page."""
    environment = run.environment
    facts = {"monteclora": environment["monteclora"], "Python": environment["python"]}
    facts |= {name: environment["packages"][name] for name in _VERSIONS}
    return facts | {
        "device": environment["device"],
        "threads": str(environment["threads"]),
        "seed": str(run.recipe.seed),
    }


def _trained(recipe: Recipe, finished: Mapping[str, Any], result: EvaluationResult) -> Sequence[str]:
    training, kept = recipe.training, finished["kept_step"]
    best = f" Kept are the weights of step {kept:,}." if kept != finished["step"] else ""
    if "temperature" in finished:
        best += f" Its head is divided by {finished['temperature']:.3g}, the best temperature of the validation rows."
    of = "runs" if result.members else "posterior draws"
    drawn = f" The predictions are means over {result.num_samples} {of}." if result.num_samples else ""
    metrics = result.posterior or result.point
    listed = ", ".join(f"{METRICS[name].label} {value:.3f}" for name, value in metrics.items())
    return [
        f"Method {recipe.method.name}, {finished['step']:,} steps at batch size {training.batch_size}, peak learning "
        f"rate {_rate(recipe, finished)}, seed {recipe.seed}.{best}",
        f"Measured on {result.source.rows:,} rows of the {result.split} split ({result.source.origin}).{drawn} "
        f"{listed}.",
    ]


def _rate(recipe: Recipe, finished: Mapping[str, Any]) -> str:
    """The peak learning rate, and how the run came to it."""
    steps, times = finished.get("range_test_steps", 0), finished.get("back_offs", 0)
    found = learning_rate_found(finished.get("learning_rate"), steps, times)
    return found or f"{recipe.training.learning_rate:g}"


def _most_uncertain(result: EvaluationResult) -> list[Example]:
    """The rows with the largest total uncertainty."""
    return _examples(sorted(result.scored.table.to_pylist(), key=lambda row: -row["total"]))


def _worst(result: EvaluationResult) -> list[Example]:
    """The rows with a wrong answer, the most confident first; of scores, those that are farthest off."""
    rows = [row for row in result.scored.table.to_pylist() if row["label"] != row["prediction"]]
    if isinstance(result.scored.predictions, ScorePredictions):
        return _examples(sorted(rows, key=lambda row: -abs(row["label"] - row["prediction"])))
    return _examples(sorted(rows, key=lambda row: (-(row.get("confidence") or 0.0), row["total"])))


def _examples(rows: Sequence[Mapping[str, Any]]) -> list[Example]:
    """The first rows as their table has them."""
    return [
        Example(
            text=" / ".join(str(row[name]) for name in ("text", "text_pair", "prompt") if row.get(name)),
            label=_shown(row["label"]),
            prediction=_shown(row["prediction"]),
            confidence=row.get("confidence"),
            total=row["total"],
            epistemic=row["epistemic"],
        )
        for row in rows[:_EXAMPLES]
    ]


def _shown(answer: object) -> str:
    """A label, the labels of a row, or a score."""
    if isinstance(answer, list):
        return ", ".join(answer) or "none"
    return f"{answer:.4g}" if isinstance(answer, float) else str(answer)
