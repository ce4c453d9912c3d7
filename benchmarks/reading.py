"""Time and peak memory of reading a file of rows, beside ``datasets.load_dataset`` on the same file.

    python benchmarks/reading.py [--rows 1000000] [--rounds 3]

Rows are made up: twelve words and one of seven labels. Every reading has a process of its own, in turns; its time is
without the imports, its memory the whole process's. Prints a line for each kind of file: medians and their ratios.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

_READERS = {
    "monteclora": """
import datasets, pyarrow.compute, pyarrow.csv, pyarrow.json  # which load() imports when it needs them
from monteclora.tasks import DataSpec, load
begin = time.perf_counter()
rows = len(load(DataSpec(train_file=path, validation_fraction=0.0)).split("train"))
""",
    "datasets": """
import datasets
begin = time.perf_counter()
kind = "csv" if path.endswith(".csv") else "json"
rows = len(datasets.load_dataset(kind, data_files=path, cache_dir=cache, split="train"))
""",
}
_PROGRAM = """
import json, resource, sys, time
path, cache = sys.argv[1:]
{reader}
seconds = time.perf_counter() - begin
print(json.dumps([rows, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
"""


def write_rows(folder: Path, count: int) -> list[Path]:
    """The same rows as csv and as jsonl."""
    choose = random.Random(0)
    words = ["".join(choose.choices("abcdefghij", k=choose.randint(2, 9))) for _ in range(5000)]
    files = [folder / "rows.csv", folder / "rows.jsonl"]
    with files[0].open("w", newline="") as table, files[1].open("w") as lines:
        writer = csv.writer(table)
        writer.writerow(["text", "label"])
        for number in range(count):
            text, label = " ".join(choose.choices(words, k=12)), f"c{number % 7}"
            writer.writerow([text, label])
            lines.write(json.dumps({"text": text, "label": label}) + "\n")
    return files


def read(reader: str, path: Path, count: int) -> tuple[float, float]:
    """Seconds and MB of one reading, in a process and with a cache of its own."""
    with tempfile.TemporaryDirectory() as cache:
        program = _PROGRAM.format(reader=_READERS[reader])
        done = subprocess.run([sys.executable, "-c", program, path, cache], capture_output=True, text=True, check=True)
    rows, seconds, memory = json.loads(done.stdout.strip().splitlines()[-1])
    if rows != count:
        raise RuntimeError(f"{reader} read {rows} of {count} rows")
    return seconds, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for path in write_rows(Path(folder), arguments.rows):
            rounds = [
                {reader: read(reader, path, arguments.rows) for reader in _READERS} for _ in range(arguments.rounds)
            ]
            for i, unit in enumerate(("s", "MB")):
                ours, theirs = (statistics.median(each[reader][i] for each in rounds) for reader in _READERS)
                print(f"{path.suffix}: {ours:.2f} {unit}, datasets {theirs:.2f} {unit}, ratio {ours / theirs:.2f}")


if __name__ == "__main__":
    main()
