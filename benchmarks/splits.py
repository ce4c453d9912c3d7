"""Splits with a labelled test set, of a task whose official test labels are hidden.

    MONTECLORA_DATA=DATA python benchmarks/splits.py cola --out splits

``test`` is the official validation split. ``validation`` is 500 training rows, chosen by a hash of their content;
``train`` is the rest, without rows that stand in the other two. So settings can be chosen on rows that no table uses.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from monteclora.system.atomic import write_file

VALIDATION_ROWS = 500


def rows_of(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def key(row: Mapping[str, Any]) -> str:
    """Of a row's content, without its number."""
    content = {name: value for name, value in row.items() if name != "idx"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def split(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of each split, from a folder with the official ``train`` and ``validation``."""
    test = rows_of(folder / "validation.jsonl.gz")
    seen = {key(row) for row in test}
    rest = {key(row): row for row in rows_of(folder / "train.jsonl.gz") if key(row) not in seen}
    held_out = set(sorted(rest)[:VALIDATION_ROWS])
    return {
        "train": [row for name, row in rest.items() if name not in held_out],
        "validation": [rest[name] for name in sorted(held_out)],
        "test": test,
    }


def write(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_file(path, gzip.compress(text.encode(), mtime=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="+", choices=("cola", "boolq"))
    parser.add_argument("--out", type=Path, default=Path("splits"))
    args = parser.parse_args()
    for task in args.tasks:
        (args.out / task).mkdir(parents=True, exist_ok=True)
        for name, rows in split(Path(os.environ["MONTECLORA_DATA"]) / task).items():
            write(rows, args.out / task / f"{name}.jsonl.gz")
            print(f"{task} {name}: {len(rows):,} rows")


if __name__ == "__main__":
    main()
