"""Rows a second of ``monteclora predict RUN FILE`` beside a pipeline of transformers.

    python benchmarks/throughput.py --rows 2000

Both answer the same messages at the mean of one MiniLM run, in batches of the same size, rows of like length together,
in turns in one process. The pipeline has the merged export and is given a list in memory; ours reads a csv, and writes
Parquet with every label's probability and three uncertainties. ``with novelty`` is what ``predict`` does by default.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import pipeline

from monteclora.adapters.export import write_model
from monteclora.evaluation.prediction import predict_file
from monteclora.methods import get_method
from monteclora.runs.loading import load_run
from monteclora.system.quiet import quiet_libraries
from monteclora.tasks import DataSpec, load
from monteclora.training.run import train

BATCH = 64


def messages(count: int) -> list[str]:
    """The bundled messages over and over, each with a number of its own."""
    found = load(DataSpec(task="helpdesk"), ("train",)).split("train")["text"][:]
    return [f"{found[i % len(found)]} {i}" for i in range(count)]


def prepared(folder: Path) -> tuple[Path, Any]:
    """A run of a few steps, and a pipeline of its merged model."""
    run = train(
        {
            "name": "throughput",
            "output": str(folder / "run"),
            "model": {"name": "minilm"},
            "data": {"task": "helpdesk", "max_length": 64},
            "method": {"name": "monteclora"},
            "training": {"max_steps": 3, "batch_size": 8, "eval_batch_size": BATCH},
        },
        progress=False,
    ).folder
    loaded = load_run(run)
    with quiet_libraries():
        merged: Any = get_method(loaded.recipe.method.name).merge(loaded.model)
        write_model(merged, folder / "merged", loaded.tokenizer)
    return run, pipeline("text-classification", str(folder / "merged"), device="cpu")


def ratios(times: dict[str, list[float]], reference: str) -> dict[str, list[float]]:
    """Rows a second beside the reference's, round by round."""
    return {
        label: [before / own for before, own in zip(times[reference], found, strict=True)]
        for label, found in times.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run, classify = prepared(folder)
        texts = messages(given.rows)
        with (folder / "rows.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["text"], *([text] for text in texts)])

        def ours(**options: Any) -> None:
            predict_file(run, folder / "rows.csv", folder / "out.parquet", num_samples=0, progress=False, **options)

        def theirs() -> None:
            ordered = sorted(texts, key=len, reverse=True)
            assert len(classify(ordered, batch_size=BATCH, truncation=True, max_length=64)) == len(texts)

        steps: dict[str, Callable[[], None]] = {
            "pipeline": theirs,
            "predict --without-novelty": lambda: ours(novelty=False),
            "predict": ours,
        }
        times: dict[str, list[float]] = {label: [] for label in steps}
        for number in range(-1, given.rounds):  # the first round warms up, and measures what novelty needs
            for label in list(steps)[:: 1 if number % 2 else -1]:
                begin = time.perf_counter()
                steps[label]()
                if number >= 0:
                    times[label].append(time.perf_counter() - begin)
        print(f"{given.rows:,} rows, batches of {BATCH}, {given.rounds} rounds; rows a second, times the pipeline's")
        for label, found in ratios(times, "pipeline").items():
            rate = given.rows / statistics.median(times[label])
            print(f"{label:28s} {rate:8.0f} {statistics.median(found):6.2f} ({min(found):.2f} to {max(found):.2f})")


if __name__ == "__main__":
    main()
