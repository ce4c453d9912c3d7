"""Time of evaluation and prediction.

    python benchmarks/prediction.py

``evaluation-*``: a forward pass in evaluation mode, of the mean weights beside peft's LoRA, and of the merged model
beside the base. ``posterior-*``: the predictive distribution of 16 posterior draws from ``monteclora.predict``, which
batches them, beside one forward pass a draw. ``layers-*``: with noise in the last k of L blocks, beside one pass at the
mean; ``ideal`` is (1 - k / L) + S k / L, what it would cost if the blocks were everything, ``operations`` the ratio of
the operations of matrix products, which no other load changes. They alone, in under four minutes on a quiet machine:

    python benchmarks/prediction.py --only 'layers-*' --rounds 5
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from common import Setting, batch_of, build, clone, load_base, refusal, usual_settings
from results import available_memory, run_cases, timed_arguments
from timing import alternate, compare
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

import monteclora
from monteclora.prediction.predictive import class_logits, evaluating

DRAWS = 16
POSTERIOR = (
    Setting("minilm", "1x32"),
    Setting("minilm", "32x32"),
    Setting("smollm2", "1x16"),
    Setting("smollm2", "1x64"),
)


LAYERS = ((Setting("minilm", "32x64"), 1), (Setting("smollm2", "32x64"), 2))


def measure_evaluation(base: PreTrainedModel, setting: Setting, **options: Any) -> dict[str, Any]:
    """Forward passes without gradients: base, LoRA, the mean, merged, and peft's MonteCLoRA."""
    reason = refusal("peft_monteclora", base, setting, available_memory(str(base.device)))
    kinds = ["lora", "shared", *([] if reason else ["peft_monteclora"])]
    models: dict[str, nn.Module] = {kind: build(kind, base, setting) for kind in kinds}
    models["base"] = clone(base)
    # merging changes weights, so this one needs its own
    models["merged"] = build("shared", copy.deepcopy(base), setting).merge_and_unload()
    inputs = {name: tensor for name, tensor in batch_of(base, setting).items() if name != "labels"}
    steps = {label: partial(_forward, model.eval(), inputs) for label, model in models.items()}
    times = alternate(steps, base.device, **options)
    references = {**dict.fromkeys(kinds, "lora"), "merged": "base"}
    return {
        "rows": compare(times, references),
        "left_out": {"peft_monteclora": reason} if reason else {},
        "references": references,
        "seconds": times,
    }


def _forward(model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        model(**inputs)


def measure_posterior(base: PreTrainedModel, setting: Setting, draws: int = DRAWS, **options: Any) -> dict[str, Any]:
    """``draws`` posterior draws at once, beside as many passes, beside a single pass at the mean."""
    model = build("shared", base, setting).eval()
    inputs = batch_of(base, setting)

    def separate() -> Tensor:
        with evaluating(model), monteclora.posterior_sampling(model, seed=0):
            return torch.stack([class_logits(model, without_labels).softmax(-1) for _ in range(draws)])

    def mean() -> Tensor:
        with evaluating(model):
            return class_logits(model, without_labels).softmax(-1)

    without_labels = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    steps = {
        f"{draws} draws, one by one": separate,
        f"{draws} draws, monteclora.predict": partial(monteclora.predict, model, inputs, draws),
        "mean, one pass": mean,
    }
    times = alternate(steps, base.device, **options)
    return {"rows": compare(times, dict.fromkeys(steps, f"{draws} draws, one by one")), "seconds": times}


def measure_layers(
    base: PreTrainedModel, setting: Setting, layers: int, draws: int = DRAWS, **options: Any
) -> dict[str, Any]:
    """``draws`` posterior draws of the last ``layers`` blocks, beside one pass at the mean: time and operations."""
    model = build("shared", base, setting).eval()
    inputs = {name: tensor for name, tensor in batch_of(base, setting).items() if name != "labels"}

    def mean() -> Tensor:
        with evaluating(model):
            return class_logits(model, inputs).softmax(-1)

    once, last = "mean, one pass", f"{draws} draws of the last {layers} blocks"
    steps = {once: mean, last: partial(monteclora.predict, model, inputs, draws, layers=layers)}
    steps[last]()  # the first call finds out that the blocks below may run once, which takes passes of its own
    counts = {label: _operations(step) for label, step in steps.items()}
    times = alternate(steps, base.device, **options)
    rows = compare(times, dict.fromkeys(steps, once))
    share = layers / base.config.num_hidden_layers
    rows[last] |= {"ideal": 1 - share + draws * share, "operations": counts[last] / counts[once]}
    return {"rows": rows, "seconds": times}


def _operations(step: Callable[[], object]) -> int:
    """Of matrix products."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def main() -> None:
    args = timed_arguments(__doc__).parse_args()
    options = {"seconds": args.seconds, "rounds": args.rounds}

    def case(setting: Setting, how: Any) -> dict[str, Any]:
        return how(load_base(setting.model, args.device), setting, **options)

    cases = {f"evaluation-{s.name}": partial(case, s, measure_evaluation) for s in usual_settings()}
    cases |= {f"posterior-{s.name}": partial(case, s, measure_posterior) for s in POSTERIOR}
    cases |= {f"layers-{s.name}": partial(case, s, partial(measure_layers, layers=k)) for s, k in LAYERS}
    run_cases("prediction", cases, args)


if __name__ == "__main__":
    main()
