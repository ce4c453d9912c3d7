"""Variance of the gradient due to the noise alone: per example against shared, closed form against sampled.

    python benchmarks/gradient_variance.py

MiniLM on one fixed batch of 16 messages of the bundled helpdesk data, without dropout: only the adapter's noise differs
between draws. Variances are traces of covariance matrices. Two independent draws give one unbiased estimate, half the
squared distance of their gradients; intervals are 95 % bootstrap intervals over such pairs.

``noise-*`` compares gradients of the task's loss in lora_A and lora_B under shared noise, under noise for each example,
and of one example alone (the mean over the batch). If the examples' gradients varied independently, the last would be
16 times the second; the ratio of the first two tells how far shared noise moves all examples the same way.
``regulariser-*`` compares gradients in rho and eta, of the regulariser alone and of the whole loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from common import Setting, build, load_base, training_step
from results import arguments, run_cases
from timing import bootstrap
from torch import Tensor, nn
from transformers import PreTrainedModel

import monteclora
from monteclora.adapters.active import active_posteriors
from monteclora.data.models import load_tokenizer, resolve_model
from monteclora.tasks.registry import get_task

EXAMPLES = 16
_WARM_STEPS = 60

Batch = dict[str, Tensor]
Parts = Mapping[str, Sequence[nn.Parameter]]


def helpdesk_batches(device: str, rows: int = EXAMPLES) -> Iterator[Batch]:
    """Batches of the training split, without end."""
    tokenizer, task = load_tokenizer(resolve_model("minilm")), get_task("helpdesk")
    messages = [row for _, row in task.loader("train", None).rows()]
    while True:
        for first in range(0, len(messages) - rows + 1, rows):
            part = messages[first : first + rows]
            batch = tokenizer([row["text"] for row in part], padding=True, return_tensors="pt")
            labels = torch.tensor([(task.label_names or ()).index(row["label"]) for row in part])
            yield {name: tensor.to(device) for name, tensor in {**batch, "labels": labels}.items()}


def gradients(loss: Callable[[], Tensor], parts: Parts) -> dict[str, np.ndarray]:
    """The gradient of one draw in each part of the parameters, a vector of float64."""
    parameters = [parameter for part in parts.values() for parameter in part]
    found = iter(torch.autograd.grad(loss(), parameters, materialize_grads=True))
    vectors = {name: torch.cat([next(found).flatten() for _ in part]) for name, part in parts.items()}
    return {name: vector.double().cpu().numpy() for name, vector in vectors.items()}


def pair_variances(loss: Callable[[], Tensor], parts: Parts, pairs: int) -> dict[str, np.ndarray]:
    """Unbiased estimates of the trace of the gradient's covariance, shape (pairs,), independent of each other."""
    estimates: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(pairs):
        one, other = gradients(loss, parts), gradients(loss, parts)
        for name, vector in one.items():
            estimates[name].append(float(np.square(vector - other[name]).sum() / 2))
    return {name: np.array(values) for name, values in estimates.items()}


def parts_of(model: nn.Module, names: Sequence[str]) -> Parts:
    """The parameters whose name contains each of ``names``."""
    return {part: [p for name, p in model.named_parameters() if part in name] for part in names}


def ratio_row(values: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """The variance, and how many times smaller it is than the reference's, with an interval."""
    row = {"variance": float(values.mean()), "standard_error": float(values.std(ddof=1) / len(values) ** 0.5)}
    if values.mean() == 0.0:
        return row
    both = np.stack([values, reference], axis=-1)
    low, high = bootstrap(both, lambda sample: sample[..., 1].mean(1) / sample[..., 0].mean(1))
    return {**row, "factor": float(reference.mean() / values.mean()), "factor_low": low, "factor_high": high}


def prepared(base: PreTrainedModel, setting: Setting, kind: str, batches: Sequence[Batch], **options: Any) -> nn.Module:
    """A model without dropout, after a training step on each of ``batches`` under shared noise, whatever its kind."""
    trained = without_dropout(build("shared", base, setting, **options))
    for batch in batches:
        training_step("shared", trained, batch, setting)()
    model = without_dropout(build(kind, base, setting, **options))
    model.load_state_dict(trained.state_dict())
    for posterior in active_posteriors(model):
        posterior.draws = 0  # the stream begins anew after the warm-up
    return model


def without_dropout(model: nn.Module) -> nn.Module:
    """The model with every dropout turned off."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def task_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The task's loss under the next draw."""
    return model(**batch).loss


def measure_noise(
    base: PreTrainedModel, setting: Setting, batch: Batch, warm: Sequence[Batch], pairs: int
) -> dict[str, Any]:
    """Gradients of the task's loss in lora_A and lora_B."""
    models = {kind: prepared(base, setting, kind, warm) for kind in ("shared", "per_example")}
    examples = [{name: tensor[i : i + 1] for name, tensor in batch.items()} for i in range(len(batch["labels"]))]
    names = ("lora_A", "lora_B")
    parts = {kind: parts_of(model, names) for kind, model in models.items()}
    found = {kind: pair_variances(partial(task_loss, models[kind], batch), parts[kind], pairs) for kind in models}
    alone = [pair_variances(partial(task_loss, models["shared"], e), parts["shared"], pairs) for e in examples]
    found["one example alone"] = {part: np.mean([one[part] for one in alone], axis=0) for part in names}
    rows: dict[str, dict[str, float]] = {}
    for part in names:
        rows |= {f"{part}, {label}": ratio_row(one[part], found["shared"][part]) for label, one in found.items()}
        beside = ratio_row(found["per_example"][part], found["one example alone"][part])
        rows[f"{part}, per_example beside one alone"] = beside
    return {"rows": rows, "pairs": pairs}


def measure_regulariser(
    base: PreTrainedModel, setting: Setting, batch: Batch, warm: Sequence[Batch], pairs: int
) -> dict[str, Any]:
    """Gradients in rho and eta, with the regulariser in closed form and with that of the draw."""
    estimators = ("sampled", "expected")
    models = {name: prepared(base, setting, "shared", warm, regulariser=name) for name in estimators}

    def alone(model: nn.Module) -> Tensor:
        for posterior in active_posteriors(model):
            posterior.draw()
        return monteclora.variational_loss(model)

    def whole(model: nn.Module) -> Tensor:
        return task_loss(model, batch) + monteclora.variational_loss(model)

    names = (".rho", ".eta")
    rows = {}
    for title, loss in (("regulariser alone", alone), ("whole loss", whole)):
        found = {e: pair_variances(partial(loss, m), parts_of(m, names), pairs) for e, m in models.items()}
        for part in names:
            sampled = found["sampled"][part]
            rows |= {f"{part[1:]}, {title}, {e}": ratio_row(one[part], sampled) for e, one in found.items()}
    return {"rows": rows, "pairs": pairs}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--pairs", type=int, default=100, help="pairs of draws for each variance")
    args = parser.parse_args()
    setting = Setting("minilm", f"{EXAMPLES}x0")

    def case(how: Any, warm_steps: int) -> dict[str, Any]:
        batches = helpdesk_batches(args.device)
        batch, warm = next(batches), [next(batches) for _ in range(warm_steps)]
        return how(load_base("minilm", args.device, num_labels=12), setting, batch, warm, args.pairs)

    run_cases(
        "gradient_variance",
        {
            "noise-at-the-start": partial(case, measure_noise, 0),
            "noise-after-training": partial(case, measure_noise, _WARM_STEPS),
            "regulariser-at-the-start": partial(case, measure_regulariser, 0),
            "regulariser-after-training": partial(case, measure_regulariser, _WARM_STEPS),
        },
        args,
    )


if __name__ == "__main__":
    main()
