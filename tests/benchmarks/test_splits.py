"""Rows that a table is made of are not those that its settings were chosen on."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import splits


def test_no_row_is_in_two_splits_and_fewer_test_rows_change_no_other(tmp_path: Path) -> None:
    rows = [{"sentence": f"text {number}", "label": number % 2, "idx": number} for number in range(620)]
    for name, of in (("train", [*rows[:600], {**rows[0], "idx": 900}]), ("validation", rows[590:])):
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in of)
    found = splits.split(tmp_path, "validation", None)
    keys = {name: [splits.key(row) for row in of] for name, of in found.items()}
    assert {name: len(of) for name, of in keys.items()} == {"train": 90, "validation": 500, "test": 30}
    assert len(set().union(*keys.values())) == 620  # each once: neither repeated nor in two splits
    fewer = splits.split(tmp_path, "validation", 10)
    assert (fewer["train"], fewer["validation"]) == (found["train"], found["validation"])
    assert [splits.key(row) for row in fewer["test"]] == sorted(keys["test"])[:10]
