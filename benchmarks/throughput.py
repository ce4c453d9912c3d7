"""Rows a second of ``monteclora predict RUN FILE`` beside a pipeline of transformers.

    python benchmarks/throughput.py --rows 2000
    python benchmarks/throughput.py --peak 10000 1000000

Both answer the same messages at the mean of one MiniLM run, in batches of the same size, rows of like length together,
in turns in one process. The pipeline has the merged export and is given a list in memory; ours reads a csv, and writes
Parquet with every label's probability and three uncertainties. ``predict`` is what the command does by default, with
novelty. ``--peak`` measures memory instead: the most that ``monteclora predict`` has resident for so many rows, each in
a process of its own, with a model of two small layers, whose own memory hides nothing.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, pipeline

from monteclora.adapters.export import write_model
from monteclora.data.models import resolve_model
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


def run_of(model: str, folder: Path) -> Path:
    """A run of a few steps."""
    return train(
        {
            "name": "throughput",
            "output": str(folder / "run"),
            "model": {"name": model},
            "data": {"task": "helpdesk", "max_length": 64},
            "method": {"name": "monteclora"},
            "training": {"max_steps": 3, "batch_size": 8, "eval_batch_size": BATCH},
        },
        progress=False,
    ).folder


def prepared(folder: Path) -> tuple[Path, Any]:
    """A run of MiniLM, and a pipeline of its merged model."""
    run = run_of("minilm", folder)
    loaded = load_run(run)
    with quiet_libraries():
        merged: Any = get_method(loaded.recipe.method.name).merge(loaded.model)
        write_model(merged, folder / "merged", loaded.tokenizer)
    return run, pipeline("text-classification", str(folder / "merged"), device="cpu")


def small_run(folder: Path) -> Path:
    """A run of a few steps of a random model, with MiniLM's tokenizer."""
    base = folder / "small"
    tokenizer: Any = AutoTokenizer.from_pretrained(resolve_model("minilm").path)
    tokenizer.save_pretrained(base)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(base)
    return run_of(str(base), folder)


def peak(run: Path, file: Path, out: Path) -> tuple[int, float]:
    """The most bytes that predicting a file takes in a process of its own, and the seconds."""
    command = [sys.executable, "-m", "monteclora", "predict", str(run), str(file), "--num-samples", "0"]
    begin = time.perf_counter()
    process = subprocess.Popen([*command, "--out", str(out)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return 1024 * usage.ru_maxrss, time.perf_counter() - begin


def peaks(counts: Sequence[int]) -> None:
    """Print the peak memory for each number of rows."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run = small_run(folder)
        shown = []
        for count in (min(counts), *counts):  # the first call measures what novelty needs, and is not shown
            write_rows(folder / "rows.csv", messages(count))
            found, seconds = peak(run, folder / "rows.csv", folder / "out.parquet")
            size = (folder / "rows.csv").stat().st_size
            rate = f"{count / seconds:.0f} rows a second"
            shown.append(f"{count:12,} rows ({size / 1e6:.1f} MB): peak {found / 1e6:,.0f} MB, {rate}")
        print("\n".join(shown[1:]))


def write_rows(file: Path, texts: Sequence[str]) -> None:
    """As a csv with one column."""
    with file.open("w", newline="", encoding="utf-8") as opened:
        csv.writer(opened).writerows([["text"], *([text] for text in texts)])


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
    parser.add_argument("--peak", type=int, nargs="+", metavar="ROWS", help="measure memory for so many rows instead")
    given = parser.parse_args(arguments)
    if given.peak:
        peaks(given.peak)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run, classify = prepared(folder)
        texts = messages(given.rows)
        write_rows(folder / "rows.csv", texts)

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
