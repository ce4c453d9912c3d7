"""Time of wrapping a model and of loading an adapter beside peft's LoRA, and what the adapters take on disk.

python benchmarks/loading.py
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import peft
from common import OURS, Setting, adapter_config, clone, load_base, wrap
from results import run_cases, timed_arguments
from timing import alternate, compare
from torch import nn
from transformers import PreTrainedModel

import monteclora

KINDS = ("lora", "shared", "peft_monteclora")
_FILES = ("adapter_model.safetensors", "posterior.safetensors")


def load(kind: str, model: PreTrainedModel, folder: Path) -> nn.Module:
    """Load a saved adapter."""
    return (monteclora.from_pretrained if kind in OURS else peft.PeftModel.from_pretrained)(model, folder)


def measure(
    base: PreTrainedModel, setting: Setting, kinds: Sequence[str], folder: Path, **options: Any
) -> dict[str, Any]:
    """Wrap and load in turns, each time a fresh copy of the modules.

    Args:
        base: the model to wrap.
        setting: of all kinds.
        kinds: to compare, ``lora`` among them.
        folder: for the adapters.
        **options: ``seconds`` and ``rounds`` of :func:`timing.alternate`.
    """
    fresh: dict[str, PreTrainedModel] = {}
    steps: dict[str, Callable[[], object]] = {}
    for kind in kinds:
        wrapped = wrap(kind, clone(base), adapter_config(kind, base, setting))
        wrapped.save_pretrained(folder / kind)
        wrapping, loading = f"wrapping, {kind}", f"loading, {kind}"
        steps[wrapping] = partial(_wrap_fresh, kind, setting, fresh, wrapping)
        steps[loading] = partial(_load_fresh, kind, folder / kind, fresh, loading)

    def before() -> None:
        fresh.clear()
        fresh.update({label: clone(base) for label in steps})
        gc.collect()

    times = alternate(steps, base.device, before=before, **options)
    rows = compare(times, {label: f"{label.partition(',')[0]}, lora" for label in steps})
    for kind in kinds:
        sizes = {f"{name.partition('.')[0]}_bytes": folder / kind / name for name in _FILES}
        rows[f"loading, {kind}"] |= {name: path.stat().st_size for name, path in sizes.items() if path.exists()}
    return {"rows": rows, "seconds": times}


def _wrap_fresh(kind: str, setting: Setting, fresh: dict[str, PreTrainedModel], label: str) -> None:
    model = fresh[label]
    wrap(kind, model, adapter_config(kind, model, setting))


def _load_fresh(kind: str, folder: Path, fresh: dict[str, PreTrainedModel], label: str) -> None:
    load(kind, fresh[label], folder)


def main() -> None:
    args = timed_arguments(__doc__).parse_args()

    def case(model: str) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            options = {"seconds": args.seconds, "rounds": args.rounds}
            setting = Setting(model, "1x1")
            return measure(load_base(model, args.device), setting, KINDS, Path(folder), **options)

    run_cases("loading", {model: partial(case, model) for model in ("minilm", "smollm2")}, args)


if __name__ == "__main__":
    main()
