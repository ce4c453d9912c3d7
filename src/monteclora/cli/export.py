"""``monteclora export``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from monteclora.cli.output import Json, print_json, print_line
from monteclora.errors import ConfigError

__all__ = ["export"]


def export(
    run: str,
    /,
    *,
    kind: Annotated[Literal["merged", "adapter", "samples", "gguf"], Parameter(name="--format")],
    out: Path | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """Write a run's model for use without monteclora.

    Args:
        run: a run folder.
        kind: merged is the pretrained model with the posterior's mean merged in, an ordinary transformers folder;
            adapter is the adapter with its labels, tokenizer and a model card, as push sends it to the hub; samples
            are plain LoRA adapters drawn from the posterior as predict draws, for servers that serve several; gguf are
            the mean and such samples as files for llama.cpp.
        out: the folder to write; by default one of the format's name in the run folder.
        num_samples: how many adapters to draw; by default 8, of gguf 0 for a method without a posterior.
        seed: of the draws.
    """
    from monteclora.adapters.export import export_samples, write_model
    from monteclora.adapters.gguf import export_gguf
    from monteclora.methods import get_method
    from monteclora.runs.loading import load_run
    from monteclora.runs.publishing import export_adapter
    from monteclora.runs.run_folder import RunFolder
    from monteclora.system.quiet import quiet_libraries

    if out is not None and out.is_file():
        raise ConfigError(f"{out} is a file", "Give the name of a folder.")
    if kind == "adapter":
        _check_no_draws(num_samples)
        _print([export_adapter(run, out or RunFolder.existing(run).path / "published")], as_json)
        return
    loaded = load_run(run)
    loaded.check_single("export")
    target = out or loaded.folder / kind
    count = num_samples if num_samples is not None else 8 if kind == "samples" or loaded.has_posterior else 0
    if not loaded.has_posterior and (kind == "samples" or (kind == "gguf" and count)):
        raise ConfigError(
            f"the method {loaded.recipe.method.name} of {loaded.folder} has no posterior to draw from",
            "Export it with --format merged or --format gguf; its adapter folder is a plain LoRA adapter.",
        )
    model: Any = loaded.model
    if kind == "gguf" and not hasattr(model, "peft_config"):
        raise ConfigError(
            f"the method {loaded.recipe.method.name} of {loaded.folder} has no adapter to convert",
            "Export it with --format merged, and convert that folder with llama.cpp's convert_hf_to_gguf.py.",
        )
    layers = loaded.drawn_layers if count else None  # served draws are those of predict
    with quiet_libraries():
        if kind == "merged":
            merged: Any = get_method(loaded.recipe.method.name).merge(model)
            written = [write_model(merged, target, loaded.tokenizer)]
        elif kind == "samples":
            written = export_samples(model, target, count, seed, layers)
        else:
            written = export_gguf(model, target, count, seed, layers)
    _print(written, as_json)


def _check_no_draws(num_samples: int | None) -> None:
    if num_samples is not None:
        raise ConfigError("--num-samples is for samples and gguf, and the format is adapter", "Leave it out.")


def _print(written: Sequence[Path], as_json: bool) -> None:
    if as_json:
        print_json({"written": list(written)})
        return
    for folder in written:
        print_line(str(folder))
