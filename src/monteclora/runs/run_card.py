"""The model card of a run: what it learned, what it is worth, how far its confidences are right, how it is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from monteclora.adapters.storage import GRAFTED, POSTERIOR_FILE, StoredPosterior, load_posterior
from monteclora.data.models import STARTERS
from monteclora.methods import get_method
from monteclora.methods.adapters import AdapterMethod
from monteclora.metrics.registry import METRICS
from monteclora.runs.adapter_folder import FACTS_FILE, AdapterFacts
from monteclora.runs.data_facts import DataFacts
from monteclora.runs.recipe import Recipe
from monteclora.runs.records import read_evaluations
from monteclora.runs.run_folder import RunFolder
from monteclora.system.text_tables import markdown_table
from monteclora.system.version import VERSION
from monteclora.tasks.kinds import KINDS

__all__ = ["run_card"]

_PIPELINES = {"SEQ_CLS": "text-classification", "CAUSAL_LM": "text-generation"}
_ERRORS = {
    "ece": "expected calibration error (ECE)",
    "equal_mass": "ECE with bins of equally many rows",
    "smooth": "smooth calibration error",
    "classwise": "class-wise ECE",
}


def run_card(run: RunFolder, recipe: Recipe, data: DataFacts, facts: AdapterFacts, name: str, base: str) -> ModelCard:
    """Write the card of a run, without the paths of the machine that trained it.

    Args:
        run: finished.
        recipe: as it was trained.
        data: what it was trained on.
        facts: what is published beside the adapter.
        name: of the model, as ``owner/name`` or a folder's name.
        base: the base model, as transformers finds it.
    """
    evaluated = _evaluated(run)
    is_adapter = _is_adapter(recipe)
    tags = {recipe.method.name.replace("_", "-"), "monteclora", *(["lora", "peft"] if is_adapter else [])}
    card = ModelCard(
        "---\n{}\n---\n\n"
        + "\n".join(
            [
                f"# {name.rpartition('/')[2]}",
                "",
                _about(run, recipe, data, base),
                *_loading(run, recipe, data, facts, name, base),
                *([] if run.is_adapter else _trained_on(recipe)),
                *_data(data, facts),
                *_metrics(evaluated),
                *_calibration(run, evaluated),
                *([] if run.is_adapter else _training(recipe)),
            ]
        )
        + "\n"
    )
    card.data = ModelCardData(
        base_model=base,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=_PIPELINES[KINDS[data.kind].peft_task],
        tags=sorted(tags),
        model_name=name.rpartition("/")[2],
        eval_results=_results(evaluated, data) or None,
    )
    return card


def _about(run: RunFolder, recipe: Recipe, data: DataFacts, base: str) -> str:
    kind = data.kind.replace("_", " ")
    if not run.is_adapter:
        return (
            f"{base}, fine-tuned on {_rows(data, 'train')} of {data.name} ({kind}) with the method "
            f"`{recipe.method.name}` of monteclora {VERSION}."
        )
    about = f"{base} with a LoRA adapter ({kind}) that was trained elsewhere."
    posterior = _posterior(run)
    if posterior is not None and GRAFTED in (posterior.calibration or {}):
        about += f" monteclora {VERSION} gave it a posterior, whose scale was fitted to rows of {data.name}."
    return about


def _posterior(run: RunFolder) -> StoredPosterior | None:
    path = run.adapter / POSTERIOR_FILE
    return load_posterior(path) if path.is_file() else None


def _evaluated(run: RunFolder) -> dict[str, dict[str, Any]]:
    """The evaluations of the trained model by split."""
    return {split: models["adapter"] for split, models in read_evaluations(run.path).items() if "adapter" in models}


def _rows(data: DataFacts, split: str) -> str:
    count = data.rows.get(split)
    return "rows" if count is None else f"{count:,} {split} rows"


def _is_adapter(recipe: Recipe) -> bool:
    return isinstance(get_method(recipe.method.name), AdapterMethod)


def _loading(run: RunFolder, recipe: Recipe, data: DataFacts, facts: AdapterFacts, name: str, base: str) -> list[str]:
    kind, is_adapter = KINDS[data.kind], _is_adapter(recipe)
    auto, outputs = kind.auto_class, kind.outputs(data.label_names)
    labels = f", id2label={dict(enumerate(outputs))!r}" if outputs else ""
    example = '"..."' if len(facts.text_columns) < 2 else '("...", "...")'
    with_peft = [
        "from peft import PeftModel",
        f"from transformers import AutoTokenizer, {auto}",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        f'base = {auto}.from_pretrained("{base}"{labels})',
        f'model = PeftModel.from_pretrained(base, "{name}").eval()',
    ]
    plain = [f"from transformers import {auto}", "", f'model = {auto}.from_pretrained("{name}")']
    with_uncertainty = [
        "import monteclora",
        "",
        f'answers = monteclora.load("{name}").predict([{example}])',
        "answers.labels, answers.confidence, answers.epistemic",
    ]
    lines = ["", "## Use it", ""]
    lines += ["With peft alone:" if is_adapter else "With transformers alone:", ""]
    lines += ["```python", *(with_peft if is_adapter else plain), "```"]
    if _posterior(run) is not None:
        lines += [
            "",
            f"That is the posterior's mean, a plain LoRA. `{POSTERIOR_FILE}` holds the posterior, from which "
            "monteclora draws to say how uncertain an answer is:",
        ]
    elif is_adapter:
        lines += ["", f"With monteclora, which reads `{FACTS_FILE}`, label names included:"]
    return [*lines, *(["", "```python", *with_uncertainty, "```"] if is_adapter else [])]


def _trained_on(recipe: Recipe) -> list[str]:
    """Where the weights in training were not quite those of the name."""
    spec, starter, lines = recipe.model, STARTERS.get(recipe.model.name), list[str]()
    if starter is not None and starter.file.endswith(".gguf") and starter.path() is not None:
        lines += ["", f"It was trained on the weights of `{starter.file}` (package `{starter.package}`), dequantised."]
    if spec.quantization != "none":
        lines += ["", f"It was trained on weights in {spec.quantization} (bitsandbytes)."]
    return lines


def _data(data: DataFacts, facts: AdapterFacts) -> list[str]:
    rows = [[split, f"{count:,}"] for split, count in data.rows.items()]
    lines = ["", "## Data", "", *_table(["split", "rows"], rows), "", f"At most {facts.max_length} tokens of a row."]
    if data.label_names:
        lines += ["", f"Labels: {', '.join(f'`{label}`' for label in data.label_names)}."]
    return lines


def _metrics(evaluated: Mapping[str, Mapping[str, Any]]) -> list[str]:
    if not evaluated:
        return ["", "## Metrics", "", "It was not evaluated."]
    names = [name for name in METRICS if any(name in facts["point"] for facts in evaluated.values())]
    rows = []
    for split, facts in evaluated.items():
        for how, values in _ways(facts):
            rows.append([split, f"{facts['rows']:,}", how, *(_number(values.get(name)) for name in names)])
    labels = [METRICS[name].label for name in names]
    return ["", "## Metrics", "", *_table(["split", "rows", "prediction", *labels], rows, names=3)]


def _ways(facts: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float]]]:
    calibrator = facts.get("calibrator", "none")
    after = "" if calibrator == "none" else f" + {calibrator}"
    ways = [(f"mean{after}", facts["point"])]
    if facts.get("posterior"):
        ways.append((f"{facts['num_samples']} draws ({facts['sampler']}){after}", facts["posterior"]))
    return ways


def _calibration(run: RunFolder, evaluated: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How far confidences are from how often answers are right, and what was done about it."""
    lines = []
    rows = []
    for split, facts in evaluated.items():
        found = {**(facts.get("posterior") or facts["point"]), **(facts.get("calibration") or {})}
        rows += [[split, words, _number(found[name])] for name, words in _ERRORS.items() if name in found]
    if rows:
        lines += ["", "## Calibration", "", *_table(["split", "error", "value"], rows, names=2)]
    posterior = _posterior(run)
    stored = None if posterior is None else posterior.calibration
    if stored and "report" in stored:
        report = stored["report"]
        names = list(next(iter(report.values())))
        lines += [] if rows else ["", "## Calibration"]
        lines += ["", str(stored["about"]), ""]
        lines += _table(["", *names], [[stage, *(f"{each[n]:.4f}" for n in names)] for stage, each in report.items()])
    return lines


def _training(recipe: Recipe) -> list[str]:
    spec = recipe.training
    options = {key: value for key, value in dataclasses.asdict(recipe.method).items() if value not in (None, [], {})}
    given = {
        **{f"method.{key}": value for key, value in options.items()},
        "training.learning_rate": spec.learning_rate,
        "training.batch_size": spec.batch_size,
        "training.epochs": spec.epochs,
        "training.max_steps": spec.max_steps,
        "seed": recipe.seed,
    }
    rows = [[f"`{key}`", f"{value}"] for key, value in given.items() if value is not None]
    return ["", "## Training", "", *_table(["key of the recipe", "value"], rows, names=2)]


def _results(evaluated: Mapping[str, Mapping[str, Any]], data: DataFacts) -> list[EvalResult]:
    """What the hub shows beside a model."""
    task = _PIPELINES[KINDS[data.kind].peft_task]
    return [
        EvalResult(
            task_type=task,
            dataset_type=data.name,
            dataset_name=data.name,
            dataset_split=split,
            metric_type=name,
            metric_name=METRICS[name].label,
            metric_value=round(value, 6),
        )
        for split, facts in evaluated.items()
        for name, value in (facts.get("posterior") or facts["point"]).items()
        if name in METRICS and isinstance(value, float)
    ]


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else ""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], names: int = 1) -> list[str]:
    return markdown_table(header, rows, names=names).splitlines()
