"""Time of a training step beside peft's LoRA, peft's MonteCLoRA and the frozen base, in turns.

    python benchmarks/step_time.py
    python benchmarks/step_time.py --only 'smollm2-1x64*' --kinds lora,shared
    python benchmarks/step_time.py --compile

A step is forward, loss, regulariser, backward and AdamW. First every model at every size (r = 8, N = 4, all linear
layers, float32), then one factor at a time at 64 tokens of smollm2. ``N-sweep`` runs several N in one process. peft's
MonteCLoRA draws its noise for 150 steps in advance; its medians leave out the step that draws.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from common import KINDS, Setting, batch_of, build, load_base, refusal, training_step, usual_settings
from results import available_memory, run_cases, timed_arguments
from timing import alternate, compare
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

_PROBE = Setting("smollm2", "1x64")
_SWEEP = (1, 4, 16, 64, 256)
FACTORS = (
    *(replace(_PROBE, r=r) for r in (4, 32, 64)),
    replace(_PROBE, targets="qkv"),
    replace(_PROBE, checkpointing=True),
    replace(_PROBE, dtype="bf16"),
)

Methods = Mapping[str, tuple[str, Setting]]


def prepare(
    base: PreTrainedModel, methods: Methods, change: Callable[[nn.Module], object] | None = None
) -> tuple[dict[str, Callable[[], None]], dict[str, str]]:
    """The steps of every method, the first of each taken, and why others are left out.

    Args:
        base: all methods run on its weights; it is left as it is.
        methods: kind and setting, by label.
        change: called with every model before its first step.
    """
    steps: dict[str, Callable[[], None]] = {}
    left_out: dict[str, str] = {}
    for label, (kind, setting) in methods.items():
        reason = refusal(kind, base, setting, available_memory(str(base.device)))
        if reason is None:
            model = build(kind, base, setting)
            if change is not None:
                change(model)
            step = training_step(kind, model, batch_of(base, setting), setting)
            reason = _failure(kind, step)
        if reason is None:
            steps[label] = step
        else:
            left_out[label] = reason
    return steps, left_out


def measure(
    base: PreTrainedModel, methods: Methods, *, seconds: float = 90.0, rounds: int | None = None
) -> dict[str, Any]:
    """Time the methods beside the one labelled ``lora``."""
    steps, left_out = prepare(base, methods)
    times = alternate(steps, base.device, seconds=seconds, rounds=rounds)
    return _record(methods, times, left_out)


def measure_compiled(
    base: PreTrainedModel, methods: Methods, *, seconds: float = 90.0, rounds: int | None = None
) -> dict[str, Any]:
    """Time the methods with compiled blocks; count graph breaks, and what is compiled after the first two steps."""
    from torch._dynamo.utils import counters

    # transformers would be compiled anew for every entry of a cache that training has no use for
    base.config.use_cache = False
    torch._dynamo.reset()
    counters.clear()
    steps, left_out = prepare(base, methods, compile_blocks)
    for step in steps.values():
        step()
    graphs = counters["stats"]["unique_graphs"]
    times = alternate(steps, base.device, seconds=seconds, rounds=rounds)
    later = counters["stats"]["unique_graphs"] - graphs
    counts = {"graphs": graphs, "graphs_compiled_later": later, "graph_breaks": sum(counters["graph_break"].values())}
    return {**_record(methods, times, left_out), **counts}


def compile_blocks(model: nn.Module) -> None:
    """Compile every transformer block on its own."""
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile()


def _record(methods: Methods, times: dict[str, list[float]], left_out: dict[str, str]) -> dict[str, Any]:
    settings = {label: {"kind": kind, **asdict(setting)} for label, (kind, setting) in methods.items()}
    rows = compare(times, dict.fromkeys(times, "lora"))
    return {"rows": rows, "left_out": left_out, "settings": settings, "seconds": times}


def _failure(kind: str, step: Callable[[], None]) -> str | None:
    """Take the first step. Of peft's variant it is known to fail in some settings, which is then a result."""
    try:
        step()
    except RuntimeError as error:
        if kind != "peft_monteclora":
            raise
        return f"fails with {type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def of_kinds(kinds: Sequence[str], setting: Setting) -> Methods:
    """Every kind in the same setting."""
    return {kind: (kind, setting) for kind in kinds}


def sweep(kinds: Sequence[str]) -> Methods:
    """LoRA beside every N, in one process."""
    found: dict[str, tuple[str, Setting]] = {"lora": ("lora", _PROBE)}
    for kind in (kind for kind in kinds if kind not in ("lora", "base")):
        found |= {f"{kind} N={n}": (kind, replace(_PROBE, num_components=n)) for n in _SWEEP}
    return found


def cases(args: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    """What there is to measure, by name."""
    kinds = args.kinds.split(",")

    def timed(setting: Setting, methods: Methods, how: Callable[..., dict[str, Any]] = measure) -> dict[str, Any]:
        base = load_base(setting.model, args.device, setting.dtype)
        return how(base, methods, seconds=args.seconds, rounds=args.rounds)

    if args.compile:
        compiled = [kind for kind in kinds if kind != "peft_monteclora"]
        return {f"{_PROBE.name}-compiled": partial(timed, _PROBE, of_kinds(compiled, _PROBE), measure_compiled)}
    found = {setting.name: partial(timed, setting, of_kinds(kinds, setting)) for setting in usual_settings()}
    found |= {setting.name: partial(timed, setting, of_kinds(kinds, setting)) for setting in FACTORS}
    return found | {f"{_PROBE.name}-N-sweep": partial(timed, _PROBE, sweep(kinds))}


def main() -> None:
    parser = timed_arguments(__doc__)
    parser.add_argument("--kinds", default=",".join(KINDS), help="what to compare; lora is the reference")
    parser.add_argument("--compile", action="store_true", help="measure with compiled blocks instead")
    args = parser.parse_args()
    run_cases("step_time", cases(args), args)


if __name__ == "__main__":
    main()
