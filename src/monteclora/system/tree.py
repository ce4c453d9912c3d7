"""Nested state on disk without pickle: the tensors as safetensors, the rest as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from monteclora.errors import CheckpointError

__all__ = ["load_tree", "save_tree"]

# JSON has neither tensors nor tuples, nor keys other than text: each becomes a mapping with one of these keys.
_TENSOR, _TUPLE, _ITEMS = "$tensor", "$tuple", "$items"


def save_tree(stem: Path, tree: Any) -> None:
    """Write ``<stem>.json`` and ``<stem>.safetensors``.

    Args:
        stem: the path without its ending.
        tree: dicts (keys of text or whole numbers), lists, tuples, tensors, numbers, text, booleans and None.

    Raises:
        CheckpointError: the tree holds something else.
    """
    tensors: dict[str, Tensor] = {}
    document = _encode(tree, "", tensors)
    save_file(tensors, f"{stem}.safetensors")
    Path(f"{stem}.json").write_text(json.dumps(document), encoding="utf-8")


def load_tree(stem: Path) -> Any:
    """Read what :func:`save_tree` wrote, tensors on the CPU.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    try:
        document = json.loads(Path(f"{stem}.json").read_text(encoding="utf-8"))
        return _decode(document, load_file(f"{stem}.safetensors"))
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{stem}.json or {stem.name}.safetensors cannot be read: {error}", "Remove the checkpoint's folder."
        ) from error


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    match value:
        case Tensor():
            name = path.removeprefix("/")
            # a copy of its own: safetensors refuses tensors that share memory
            tensors[name] = value.detach().to("cpu", copy=True).contiguous()
            return {_TENSOR: name}
        case None | bool() | int() | float() | str():
            return value
        case tuple():
            return {_TUPLE: [_encode(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]}
        case list():
            return [_encode(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
        case dict() if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: _encode(item, f"{path}/{key}", tensors) for key, item in value.items()}
        case dict() if all(type(key) in (str, int) for key in value):
            return {_ITEMS: [[key, _encode(item, f"{path}/{key}", tensors)] for key, item in value.items()]}
    raise CheckpointError(
        f"the training state holds a {type(value).__name__} at {path}, which cannot be saved",
        "Use an optimiser whose state is made of tensors and numbers.",
    )


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    match value:
        case {"$tensor": name}:
            return tensors[name]
        case {"$tuple": items}:
            return tuple(_decode(item, tensors) for item in items)
        case {"$items": items}:
            return {key: _decode(item, tensors) for key, item in items}
        case dict():
            return {key: _decode(item, tensors) for key, item in value.items()}
        case list():
            return [_decode(item, tensors) for item in value]
    return value
