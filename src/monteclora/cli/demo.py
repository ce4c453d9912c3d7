"""``monteclora demo``: the starter model on the bundled data, LoRA beside MonteCLoRA, then a report page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from monteclora.cli.output import print_json, print_table

if TYPE_CHECKING:
    from monteclora.evaluation.inference import SplitPredictions
    from monteclora.evaluation.loading import LoadedRun
    from monteclora.evaluation.run import EvaluationResult
    from monteclora.reports.results import RunReport, UncertainExample
    from monteclora.training.run import RunResult

__all__ = ["demo"]

_METHODS = {"lora": "LoRA", "monteclora": "MonteCLoRA"}
_SHOWN = 12


def demo(
    *,
    out: Path = Path("demo"),
    seed: int = 0,
    num_samples: int = 16,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Fine-tune a real model with LoRA and with MonteCLoRA on the bundled data, and compare them.

    A few minutes on a laptop without a GPU. What is finished is not done again.

    Args:
        out: the folder of the runs and of report.html.
        seed: of both runs.
        num_samples: posterior draws of MonteCLoRA's predictions.
        json: print the result as JSON.
    """
    from monteclora.evaluation.loading import load_run
    from monteclora.evaluation.run import evaluate_loaded
    from monteclora.reports.formats import duration, size
    from monteclora.reports.page import write_page
    from monteclora.training.run import train

    reports, rows, facts, seconds = [], [], {}, {}
    for method, title in _METHODS.items():
        overrides = [("output", str(out / method)), ("seed", str(seed))]
        result = train(f"helpdesk-minilm-{method}", overrides)
        loaded = load_run(result.folder)
        found = evaluate_loaded(loaded, "test", num_samples=num_samples if loaded.has_posterior else 0)
        metrics = found.posterior or found.point
        reports.append(_report(title, result, loaded, found, num_samples))
        cost = [duration(result.seconds), size(result.peak_memory_bytes)]
        rows.append([title, *(f"{metrics[name]:.3f}" for name in ("accuracy", "nll", "ece")), *cost])
        facts[method] = {**metrics, "seconds": result.seconds, "peak_memory_bytes": result.peak_memory_bytes}
        seconds[method] = result.seconds
    page = write_page(out / "report.html", _page(reports, result, seed, num_samples))
    if json:
        print_json({**facts, "report": str(page)})
        return
    print_table(["300 test messages, 12 intents", "accuracy", "NLL", "ECE", "training time", "peak memory"], rows)
    print(f"report: {page}")


def _report(title: str, result: RunResult, loaded: LoadedRun, found: EvaluationResult, num_samples: int) -> RunReport:
    from monteclora.data.helpdesk import ambiguous, out_of_scope
    from monteclora.reports.results import FINISHED, Evaluation, RunReport, Uncertainty

    texts = {"fits two": [message.text for message in ambiguous()], "fits none": list(out_of_scope())}
    groups: dict[str, SplitPredictions] = {"fits one": found.scored.predictions}  # type: ignore[dict-item]
    for group, messages in texts.items():
        groups[group] = _classify(loaded, messages, num_samples)
    labels = found.scored.labels
    assert labels is not None
    test = [(text, label) for text, label in zip(found.rows["text"], labels, strict=True)]
    shown = test + [(text, -1) for messages in texts.values() for text in messages]
    return RunReport(
        name=title,
        method=title,
        status=FINISHED,
        evaluation=Evaluation.of(groups["fits one"].probs, labels),
        training=_curve(result),
        uncertainty={group: Uncertainty(p.total, p.epistemic) for group, p in groups.items()},
        uncertain_examples=_most_uncertain(shown, list(groups.values()), loaded),
        seconds=result.seconds,
        peak_bytes=result.peak_memory_bytes,
        trained_parameters=result.trained_parameters,
    )


def _classify(loaded: LoadedRun, messages: list[str], num_samples: int) -> SplitPredictions:
    from datasets import Dataset

    from monteclora.evaluation.scoring import Sampling, classify

    sampling = Sampling(num_samples if loaded.has_posterior else 0, 0, loaded.recipe.training.eval_batch_size)
    return classify(loaded, Dataset.from_dict({"text": messages}), sampling)[0]


def _most_uncertain(
    messages: list[tuple[str, int]], predictions: list[SplitPredictions], loaded: LoadedRun
) -> list[UncertainExample]:
    import numpy as np

    from monteclora.reports.results import UncertainExample

    probs, total, epistemic = (
        np.concatenate([getattr(found, name) for found in predictions]) for name in ("probs", "total", "epistemic")
    )
    names = loaded.label_names or ()
    return [
        UncertainExample(
            text=messages[index][0],
            label=names[messages[index][1]] if messages[index][1] >= 0 else "",
            prediction=names[int(probs[index].argmax())],
            confidence=float(probs[index].max()),
            total=float(total[index]),
            epistemic=float(epistemic[index]),
        )
        for index in np.argsort(-total, kind="stable")[:_SHOWN]
    ]


def _curve(result: RunResult) -> Any:
    from monteclora.reports.figures import TrainingCurve
    from monteclora.training.run_folder import RunFolder

    logged = [event for event in RunFolder(result.folder).metrics.read() if event["event"] == "train"]
    if not logged:
        return None
    curves = {
        name: [event[key] for event in logged] if key in logged[0] else None
        for name, key in (("kl", "kl"), ("pi_norm_squared", "pi_squared_norm"))
    }
    return TrainingCurve([e["step"] for e in logged], [e["loss"] for e in logged], **curves)


def _page(reports: list[RunReport], result: RunResult, seed: int, num_samples: int) -> Any:
    from monteclora.reports.runs import demo_page
    from monteclora.training.run_folder import RunFolder

    environment = RunFolder(result.folder).environment
    training = result.recipe.training
    compared = [
        "MiniLM, a BERT of 23 million parameters, learns to route short messages to a software company's support desk to "
        "one of 12 intents. Both runs have the same initial weights, batches, dropout masks, learning rate "
        f"({training.learning_rate:g}) and number of epochs ({training.epochs:g}); they differ in the method alone.",
        f"MonteCLoRA's predictions are the mean over {num_samples} posterior draws; LoRA has no draws. Besides the test "
        "messages, which fit one intent, both predict messages written to fit two intents, or none: a model that knows "
        "what it does not know is less certain there.",
    ]
    versions = {name: str(value) for name, value in environment.get("versions", {}).items()}
    facts = {"device": str(environment.get("device", "")), "threads": str(environment.get("threads", ""))}
    command = " ".join(["monteclora", "demo", *(["--seed", str(seed)] if seed else [])])
    return demo_page(
        reports,
        title="LoRA and MonteCLoRA on helpdesk messages",
        subtitle=f"The bundled data set and starter model, seed {seed}",
        compared=compared,
        environment={name: value for name, value in {**versions, **facts}.items() if value},
        reproduce=[command],
    )
