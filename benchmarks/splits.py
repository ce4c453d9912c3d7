"""Splits with validation and labelled test rows, of a task that lacks one of them.

    MONTECLORA_DATA=DATA python benchmarks/splits.py cola boolq arc_easy winogrande --out splits [--test-rows 1000]

``test`` is the official test split of arc_easy and the official validation split of the others, whose test labels are
hidden: the rows of the smallest hashes of their content, or all. ``validation`` is 500 training rows, chosen in the
same way; ``train`` is the rest, without rows that stand in the other two. So settings can be chosen on rows that no
table uses. A recipe takes them by ``data.folder: splits``.
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
TEST = {"cola": "validation", "boolq": "validation", "arc_easy": "test", "winogrande": "validation"}


def rows_of(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def key(row: Mapping[str, Any]) -> str:
    """Of a row's content, without its number or id."""
    content = {name: value for name, value in row.items() if name not in ("idx", "id")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def split(folder: Path, test_split: str, test_rows: int | None) -> dict[str, list[dict[str, Any]]]:
    """The rows of each split, from a folder with the official ``train`` and the split that is tested on."""
    official = rows_of(folder / f"{test_split}.jsonl.gz")
    seen = {key(row) for row in official}
    rest = {key(row): row for row in rows_of(folder / "train.jsonl.gz") if key(row) not in seen}
    held_out = set(sorted(rest)[:VALIDATION_ROWS])
    return {
        "train": [row for name, row in rest.items() if name not in held_out],
        "validation": [rest[name] for name in sorted(held_out)],
        "test": official if test_rows is None else sorted(official, key=key)[:test_rows],
    }


def write(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_file(path, gzip.compress(text.encode(), mtime=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="+", choices=TEST)
    parser.add_argument("--out", type=Path, default=Path("splits"))
    parser.add_argument("--test-rows", type=int, help="fewer rows to test on")
    args = parser.parse_args()
    for task in args.tasks:
        (args.out / task).mkdir(parents=True, exist_ok=True)
        for name, rows in split(Path(os.environ["MONTECLORA_DATA"]) / task, TEST[task], args.test_rows).items():
            write(rows, args.out / task / f"{name}.jsonl.gz")
            print(f"{task} {name}: {len(rows):,} rows")


if __name__ == "__main__":
    main()
