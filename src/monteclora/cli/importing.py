"""``monteclora import``."""

from __future__ import annotations

from pathlib import Path

from monteclora.cli.output import Json, note, print_json, print_line

__all__ = ["import_adapter"]


def import_adapter(adapter: Path, out: Path, /, *, base: str | None = None, as_json: Json = False) -> None:
    """Write an adapter of peft's MonteCLoRA variant as a plain LoRA with a posterior that this package draws from.

    Its mean stays as it is, bit for bit. What has no counterpart here is named.

    Args:
        adapter: the folder that peft wrote, or a run of the method peft_monteclora.
        out: the folder to write, a new one. monteclora calibrate, evaluate and from_pretrained take it.
        base: the model it was trained on; by default the one that its configuration names.
    """
    from monteclora.runs.importing import import_folder

    found = import_folder(adapter, out, base)
    if as_json:
        print_json({"folder": found.folder, "settings": found.settings.given(), "left_out": list(found.left_out)})
        return
    print_line(str(found.folder))
    for text in found.left_out:
        note(f"left out: {text}")
