"""The model card of an adapter, and a name of its base model that means the same on every machine."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath, PureWindowsPath

from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from monteclora.posterior.settings import PosteriorSettings
from monteclora.system.atomic import write_file
from monteclora.system.text_tables import markdown_table
from monteclora.system.version import VERSION

__all__ = [
    "add_calibration",
    "mark_own",
    "name_base_portably",
    "portable_name",
    "remove_calibration",
    "tags_of",
    "without_calibration",
    "write_card",
]

_BEGIN, _END = "<!-- calibration -->", "<!-- end of calibration -->"
_OWN = "<!-- this card was written by monteclora calibrate, and goes with calibrate --undo -->"
_BASE_TAG = "base_model:adapter:"
_PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
}


def portable_name(name: str | None) -> str | None:
    """The name of a base model without the path of the machine that trained its adapter.

    A folder of the hub's cache is the repository it holds; of any other absolute path the last folder's name is left.
    """
    if not name:
        return None
    path: PurePath = PureWindowsPath(name) if "\\" in name else PurePath(name)
    for part in path.parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    return path.name if path.is_absolute() or os.path.isdir(name) else name


def name_base_portably(path: Path) -> None:
    """Replace the base model's name in an ``adapter_config.json`` by its portable one."""
    config = json.loads(path.read_text(encoding="utf-8"))
    portable = portable_name(config.get("base_model_name_or_path"))
    if portable != config.get("base_model_name_or_path"):
        config["base_model_name_or_path"] = portable
        write_file(path, json.dumps(config, indent=2, sort_keys=True).encode())


def tags_of(model: nn.Module) -> set[str]:
    """What a base model's adapters are found under on the hub: its own tags, and the library it is of."""
    own = set(getattr(model, "model_tags", None) or ())
    return own | {"transformers"} if isinstance(model, PreTrainedModel) else own


def write_card(
    folder: Path,
    config: LoraConfig,
    settings: PosteriorSettings | None,
    base: str | None,
    labels: Mapping[int, str],
    tags: Iterable[str] = (),
) -> None:
    """Write ``README.md``; of one that is there the metadata are completed and the text is left as it is.

    Args:
        folder: the adapter's.
        config: its configuration.
        settings: of its posterior, None for a plain LoRA.
        base: the base model's name.
        labels: label names of a classifier, by class.
        tags: those of the base model.
    """
    path = folder / "README.md"
    if path.exists():
        card = ModelCard.load(path)
    else:
        card = ModelCard("---\n{}\n---\n\n" + _text(config, settings, base, labels))
        card.data = ModelCardData()
    card.data["library_name"] = "peft"
    earlier = {tag for tag in card.data.get("tags") or [] if not tag.startswith(_BASE_TAG)}
    found = earlier | {*tags, "lora", "peft"}
    if settings is not None:
        found.add("monteclora")
    if base is not None:
        card.data["base_model"] = base
        found.add(_BASE_TAG + base)
    card.data["tags"] = sorted(found)
    if not card.data.get("pipeline_tag") and config.task_type in _PIPELINES:
        card.data["pipeline_tag"] = _PIPELINES[config.task_type]  # a TaskType is a string too
    card.save(path)


def add_calibration(folder: Path, report: Mapping[str, Mapping[str, float]], about: str) -> None:
    """Put the table of a calibration into the card of an adapter, in the place of an earlier one.

    Args:
        folder: the adapter's; it has a card.
        report: metrics by name, of each stage.
        about: what the numbers are of, in words.
    """
    path = folder / "README.md"
    names = list(next(iter(report.values())))
    rows = [[stage, *(f"{metrics[name]:.4f}" for name in names)] for stage, metrics in report.items()]
    lines = ["## Calibration", "", about, "", *markdown_table(["", *names], rows).splitlines()]
    text = without_calibration(path.read_text(encoding="utf-8")).rstrip("\n")
    write_file(path, "\n".join([text, "", _BEGIN, *lines, _END, ""]).encode())


def without_calibration(text: str) -> str:
    """A card without that table."""
    before, mark, rest = text.partition(_BEGIN)
    return before.rstrip("\n") + "\n" + rest.partition(_END)[2].lstrip("\n") if mark else text


def remove_calibration(folder: Path) -> None:
    """Take the table out of a card; take away a card that was written for it."""
    path = folder / "README.md"
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    if _OWN in text:
        path.unlink()
    elif _BEGIN in text:
        write_file(path, without_calibration(text).encode())


def mark_own(folder: Path) -> None:
    """Note in a card that it was written for a calibration."""
    path = folder / "README.md"
    write_file(path, f"{path.read_text(encoding='utf-8').rstrip()}\n\n{_OWN}\n".encode())


def _text(config: LoraConfig, s: PosteriorSettings | None, base: str | None, labels: Mapping[int, str]) -> str:
    shown = base or "the base model it was trained on"
    lines = [f"# LoRA adapter for {shown}", ""]
    if s is not None:
        lines = [
            f"# MonteCLoRA adapter for {shown}",
            "",
            "A LoRA adapter whose A was drawn from a learned posterior while it was trained (Seth et al. 2025, arXiv",
            "2411.04358). `adapter_model.safetensors` is a plain LoRA, the posterior's mean: `peft.PeftModel` and",
            "servers load it as they load any other. `posterior.safetensors` holds the posterior.",
            "",
            "```python",
            "import monteclora",
            "",
            "model = monteclora.from_pretrained(base_model, folder)",
            "prediction = monteclora.predict(model, batch, num_samples=16)",
            "```",
            "",
            *markdown_table(["setting", "value"], _settings(config, s), names=2).splitlines(),
        ]
    else:
        lines += ["Load it with `peft.PeftModel.from_pretrained(base_model, folder)`."]
    if labels:
        lines += ["", "## Labels", "", *(f"{index}. {name}" for index, name in sorted(labels.items()))]
    return "\n".join(lines) + "\n"


def _settings(config: LoraConfig, s: PosteriorSettings) -> list[list[str]]:
    return [
        ["rank r, lora_alpha", f"{config.r}, {config.lora_alpha}"],
        ["mixture components N", f"{s.num_components}"],
        ["sample_scale", f"{s.sample_scale}"],
        ["kl_weight, coop_weight", f"{s.kl_weight:g}, {s.coop_weight:g}"],
        ["covariance, dirichlet, noise", f"{s.covariance}, {s.dirichlet}, {s.noise}"],
        ["monteclora", VERSION],
    ]
