"""Answers that a model wrote, kept in a file as they come, so that an interrupted call resumes where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monteclora.errors import CheckpointError

__all__ = ["Answers", "Slot"]

Slot = tuple[int, int, int]
"""The number of the problem, of the draw, and of the answer under that draw."""


class Answers:
    """A file of JSON lines: what the answers depend on, then an answer a line.

    Args:
        folder: of the file.
        stem: its name begins with it.
        about: what the answers depend on; answers with other values go to another file.

    Raises:
        CheckpointError: there is such a file, and a line of it is damaged.
    """

    def __init__(self, folder: Path, stem: str, about: Mapping[str, Any]) -> None:
        first = json.dumps(about, sort_keys=True)
        self.path = folder / f"{stem}-{hashlib.sha256(first.encode()).hexdigest()[:12]}.jsonl"
        self.texts: dict[Slot, str] = {}
        if self.path.is_file():
            self._read(first)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            self.path.write_text(first + "\n", encoding="utf-8")

    def _read(self, first: str) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        head, *lines = whole.split(b"\n")[:-1] or [b""]
        if head != first.encode():
            raise CheckpointError(f"{self.path} does not begin as it was written", "Remove it.")
        for number, line in enumerate(lines, start=2):
            try:
                row = json.loads(line)
                self.texts[int(row["problem"]), int(row["draw"]), int(row["answer"])] = str(row["text"])
            except (ValueError, KeyError, TypeError):
                raise CheckpointError(f"{self.path}, line {number} is damaged", "Remove the file.") from None
        if len(whole) < len(content):  # the process was killed while it wrote the last line
            with self.path.open("rb+") as file:
                file.truncate(len(whole))

    def add(self, texts: Mapping[Slot, str]) -> None:
        """Append answers."""
        lines = [
            json.dumps({"problem": problem, "draw": draw, "answer": answer, "text": text}, ensure_ascii=False)
            for (problem, draw, answer), text in texts.items()
        ]
        with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(line + "\n" for line in lines)
        self.texts.update(texts)
